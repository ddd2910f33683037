"""Attention on eight emulated devices."""

import os
import pathlib
import subprocess
import sys


def test_on_a_mesh():
  """In a process of its own: the number of CPU devices is fixed when jax starts."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  folder = pathlib.Path(__file__).parent
  options = "-m pytest -x -q -n0 -p no:cacheprovider"
  run = subprocess.run(
    [sys.executable, *options.split(), folder / "on_a_mesh.py"],
    capture_output=True,
    text=True,
    cwd=folder.parents[2],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
  )
  assert run.returncode == 0, run.stdout[-5000:]
