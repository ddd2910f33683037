"""The mesh of devices: its sizes, what is refused, and that it changes no result."""

import os
import pathlib
import subprocess
import sys

import pytest

from freqformer.config import ConfigError, build
from freqformer.train import mesh
from freqformer.train.mesh import MeshConfig, describe, make_mesh


@pytest.mark.parametrize(
  "data, fsdp, devices, sizes",
  [
    (-1, 1, 1, (1, 1)),
    (-1, 1, 8, (8, 1)),
    (-1, 4, 8, (2, 4)),
    (2, 1, 8, (2, 1)),
    (1, 8, 8, (1, 8)),
  ],
)
def test_sizes(data, fsdp, devices, sizes):
  assert MeshConfig(data, fsdp).sizes(devices) == sizes


@pytest.mark.parametrize(
  "data, fsdp, devices, text",
  [
    (-1, 3, 8, "data=-1 and fsdp=3, and JAX finds 8 devices: set mesh.fsdp to one of 1, 2, 4, 8 "),
    (4, 4, 8, "data=4 and fsdp=4, and JAX finds 8 devices"),
    (-1, 2, 1, "JAX finds 1 device: set mesh.fsdp to one of 1 "),
  ],
)
def test_devices_that_cannot_be_divided(data, fsdp, devices, text):
  with pytest.raises(ConfigError, match=text):
    MeshConfig(data, fsdp).sizes(devices)


@pytest.mark.parametrize("values", [{"data": 0}, {"data": -2}, {"fsdp": 0}, {"fspd": 1}])
def test_refused_values(values):
  with pytest.raises(ConfigError, match="config.mesh"):
    build(MeshConfig, values, "mesh")


def test_batches_are_split_whole(monkeypatch):
  monkeypatch.setattr(mesh, "all_devices", lambda: [None] * 8)
  with pytest.raises(
    ConfigError, match="batch_size=12 cannot be split over 8 devices: set it to 16"
  ):
    make_mesh(MeshConfig(), 12)


def test_one_device_is_a_mesh_of_one():
  found = make_mesh(MeshConfig(), 3)
  assert dict(found.shape) == {"data": 1, "fsdp": 1}
  assert describe(found) == "runs on cpu"


def test_eight_devices():
  """In a process of its own: the number of CPU devices is fixed when jax starts."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  tests = pathlib.Path(__file__).with_name("on_eight_devices.py")
  run = subprocess.run(
    [sys.executable, *"-m pytest -x -q -n0 -p no:cacheprovider".split(), str(tests)],
    capture_output=True,
    text=True,
    cwd=tests.parents[2],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
  )
  assert run.returncode == 0, run.stdout[-5000:]
