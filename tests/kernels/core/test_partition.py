"""Attention over several devices: each runs its own samples and heads, and the numbers stay."""

import os
import pathlib
import subprocess
import sys


def test_four_devices_equal_one():
  """In a process of its own: the number of CPU devices is fixed when jax starts."""
  env = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
  }
  root = pathlib.Path(__file__).parents[3]
  run = subprocess.run(
    [sys.executable, "-m", "tests.kernels.core.partition_program"],
    capture_output=True,
    text=True,
    cwd=root,
    env=env,
  )
  assert run.returncode == 0, run.stderr[-3000:]
  assert "same on four devices" in run.stdout
