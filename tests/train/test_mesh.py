"""The mesh of devices: its sizes, what is refused, and that it changes no result."""

import math
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from freqformer.config import ConfigError, build
from freqformer.model.architectures import model_config
from freqformer.placement import AXES
from freqformer.simulation.descriptions import load_gpu
from freqformer.train import mesh
from freqformer.train.experiment import experiment
from freqformer.train.mesh import MeshConfig, describe, make_mesh, whole_mesh
from freqformer.train.throughput import Throughput
from tests.tiny_config import get_config

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
  "asked, devices, sizes",
  [
    ((-1, 1, 1), 1, (1, 1, 1)),
    ((-1, 1, 1), 8, (8, 1, 1)),
    ((-1, 4, 1), 8, (2, 4, 1)),
    ((2, 1, 1), 8, (2, 1, 1)),
    ((1, 8, 1), 8, (1, 8, 1)),
    ((-1, 2, 2), 8, (2, 2, 2)),
    ((-1, 1, 8), 8, (1, 1, 8)),
  ],
)
def test_sizes(asked, devices, sizes):
  assert MeshConfig(*asked).sizes(devices) == sizes


@pytest.mark.parametrize(
  "asked, devices, text",
  [
    ((-1, 3, 1), 8, "fsdp=3 and context=1, and JAX finds 8 devices: .* to one of 1, 2, 4, 8[.]"),
    ((4, 4, 1), 8, "data=4, fsdp=4 and context=1, and JAX finds 8 devices"),
    ((-1, 4, 4), 8, "fsdp=4 and context=4, and JAX finds 8 devices"),
    ((-1, 2, 1), 1, "JAX finds 1 device: .* mesh.fsdp times mesh.context to one of 1[.]"),
  ],
)
def test_devices_that_cannot_be_divided(asked, devices, text):
  with pytest.raises(ConfigError, match=text):
    MeshConfig(*asked).sizes(devices)


@pytest.mark.parametrize(
  "values", [{"data": 0}, {"data": -2}, {"fsdp": 0}, {"context": 0}, {"fspd": 1}]
)
def test_refused_values(values):
  with pytest.raises(ConfigError, match="config.mesh"):
    build(MeshConfig, values, "mesh")


def test_batches_are_split_whole(monkeypatch):
  monkeypatch.setattr(mesh, "all_devices", lambda: [None] * 8)
  with pytest.raises(
    ConfigError, match="batch_size=12 cannot be split over 8 devices: set it to 16"
  ):
    make_mesh(MeshConfig(), 12)
  with pytest.raises(ConfigError, match="=8 in 4 micro-batches cannot be split over 8 .* to 32"):
    make_mesh(MeshConfig(), 8, 4)


def test_groups_of_devices_share_a_sample(monkeypatch):
  monkeypatch.setattr(mesh, "all_devices", lambda: [None] * 8)
  with pytest.raises(ConfigError, match="=3 cannot be split over 2 groups of 4: set it to 4"):
    make_mesh(MeshConfig(context=4), 3)


@pytest.mark.parametrize(
  "context, text",
  [(5, "6 tiles and 2 heads evenly: .* one of 1, 2, or"), (3, "context=3 devices cannot")],
)
def test_tiles_and_heads_are_shared_evenly(context, text):
  config = get_config()
  config.mesh = {"context": context}
  found = experiment(config)  # may be read, to be sampled elsewhere
  with pytest.raises(ConfigError, match=text):
    found.make_mesh()


@pytest.mark.parametrize("dense_steps, refused", [(0, "JAX finds 1 device"), (1, "2 heads")])
def test_static_tables_need_no_heads_that_divide(dense_steps, refused):
  """Dense steps exchange heads: the sentence is of them, and not of devices that are missing."""
  config = get_config()
  config.mesh = {"context": 3}
  config.model.attention.method = "radial"
  config.train.dense_steps = dense_steps
  with pytest.raises(ConfigError, match=refused):
    experiment(config).make_mesh()


def test_samples_on_devices_that_do_not_divide(monkeypatch):
  monkeypatch.setattr(mesh, "all_devices", lambda: [None] * 8)
  with pytest.raises(ConfigError, match="--context=3 must divide the 8 devices that JAX finds"):
    whole_mesh(context=3)


def test_one_device_is_a_mesh_of_one():
  found = make_mesh(MeshConfig(), 3)
  assert dict(found.shape) == {"data": 1, "fsdp": 1, "context": 1}
  assert describe(found) == "runs on cpu"


@pytest.mark.parametrize(
  "sizes, devices, line",
  [
    ((2, 4, 1), 8, f"runs on 8 of 8 {H100} (data 2 x fsdp 4 x context 1)"),
    ((1, 1, 1), 2, f"runs on 1 of 2 {H100} (data 1 x fsdp 1 x context 1); 1 idles"),
    ((1, 1, 3), 8, f"runs on 3 of 8 {H100} (data 1 x fsdp 1 x context 3); 5 idle"),
  ],
)
def test_idle_devices_are_named(monkeypatch, sizes, devices, line):
  found = [types.SimpleNamespace(device_kind=H100)] * devices
  monkeypatch.setattr(mesh, "all_devices", lambda: found)
  used = np.array(found[: math.prod(sizes)]).reshape(sizes)
  of = types.SimpleNamespace(
    devices=used, size=used.size, shape=dict(zip(AXES, sizes, strict=True))
  )
  assert describe(of) == line


@pytest.mark.parametrize("count", [1, 4])
def test_rates_are_those_of_the_devices_that_run(count):
  device = types.SimpleNamespace(device_kind=H100, platform="gpu")
  config = model_config(get_config().model.to_dict())
  peak = Throughput.of(config, (8, 64, 64, 4), 2, [device] * count).peak
  assert peak == count * load_gpu("h100").tensor_flops


@pytest.mark.parametrize(
  "error, reason",
  [
    (RuntimeError("Unable to initialize backend 'cuda': no driver\nmore"), "'cuda': no driver)"),
    (AssertionError(), "(AssertionError)"),
  ],
)
def test_absent_devices_are_one_sentence(monkeypatch, error, reason):
  def devices():
    raise error

  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  monkeypatch.setattr(mesh.jax, "devices", devices)
  with pytest.raises(ConfigError, match="^JAX_PLATFORMS=cuda names .*unset it .*$") as found:
    whole_mesh()
  assert reason in str(found.value)


def test_eight_devices():
  """In a process of its own: the number of CPU devices is fixed when jax starts."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  folder = pathlib.Path(__file__).parent
  tests = [str(folder / name) for name in ("on_eight_devices.py", "context_on_eight_devices.py")]
  run = subprocess.run(
    [sys.executable, *"-m pytest -x -q -n0 -p no:cacheprovider".split(), *tests],
    capture_output=True,
    text=True,
    cwd=folder.parents[1],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
  )
  assert run.returncode == 0, run.stdout[-5000:]
