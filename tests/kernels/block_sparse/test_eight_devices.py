"""The tests of transformations once more, on eight emulated devices."""

import os
import pathlib
import subprocess
import sys

from tests.kernels.block_sparse import test_transformed


def test_transformations():
  """In a process of its own: the number of CPU devices is fixed when jax starts."""
  count = test_transformed.DEVICES
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
  options = "-m pytest -x -q -p no:cacheprovider"
  run = subprocess.run(
    [sys.executable, *options.split(), test_transformed.__file__],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[3],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
  )
  assert run.returncode == 0, run.stdout[-5000:]
