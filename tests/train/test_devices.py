"""Which devices run is said in one line, counted in rates, and refused in one sentence."""

import logging
import types

import pytest

from freqformer.command import cli
from freqformer.config import ConfigError
from freqformer.model.config import model_config
from freqformer.simulation.descriptions import load_gpu
from freqformer.train import devices
from freqformer.train.throughput import Throughput
from tests.tiny_config import get_config

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def machine(monkeypatch):
  """Returns a function that gives JAX some devices, or an error instead of any."""

  def of(count, kind=H100, error=None):
    device = types.SimpleNamespace(device_kind=kind, platform="cpu" if kind == "cpu" else "gpu")

    def found():
      if error is not None:
        raise error
      return [device] * count

    fake = types.SimpleNamespace(devices=found, config=devices.jax.config, Device=None)
    monkeypatch.setattr(devices, "jax", fake)

  return of


@pytest.mark.parametrize(
  "count, kind, line",
  [
    (1, "cpu", "runs on cpu"),
    (1, H100, f"runs on {H100}"),
    (2, H100, f"runs on 1 of 2 {H100}; the other idles"),
    (4, "cpu", "runs on 1 of 4 cpu; the others idle"),
  ],
)
def test_idle_devices_are_named(machine, count, kind, line):
  machine(count, kind)
  assert devices.describe_devices() == line


@pytest.mark.parametrize("count", [1, 4])
def test_rates_are_those_of_the_devices_that_run(machine, count):
  machine(count)
  config = model_config(get_config().model.to_dict())
  peak = Throughput.of(config, (8, 64, 64, 4), 2, devices.all_devices()).peak
  assert peak == count * load_gpu("h100").tensor_flops


@pytest.mark.parametrize(
  "error, reason",
  [
    (RuntimeError("Unable to initialize backend 'cuda': no driver\nmore"), "'cuda': no driver)"),
    (AssertionError(), "(AssertionError)"),
  ],
)
def test_absent_devices_are_one_sentence(machine, monkeypatch, error, reason):
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  machine(0, error=error)
  with pytest.raises(ConfigError, match="^JAX_PLATFORMS=cuda names .*unset it .*$") as found:
    devices.describe_devices()
  assert reason in str(found.value)


@pytest.mark.parametrize(
  "name, level, shown",
  [
    ("jax._src.xla_bridge", logging.WARNING, True),
    ("jax._src.xla_bridge", logging.INFO, False),
    ("orbax", logging.WARNING, False),
    ("orbax", logging.ERROR, True),
  ],
)
def test_warnings_of_others_are_about_devices(name, level, shown):
  record = logging.LogRecord(name, level, "/site-packages/x.py", 1, "", None, None)
  assert cli._worth_reading(record) == shown


def test_errors_that_others_log_are_one_line():
  error = RuntimeError("Unable to load cuDNN.")
  trace = (RuntimeError, error, None)
  record = logging.LogRecord("jax", logging.ERROR, "/site-packages/x.py", 1, "%s", ("Bad",), trace)
  assert cli._worth_reading(record)
  assert logging.Formatter().format(record) == "Bad (Unable to load cuDNN.)"
