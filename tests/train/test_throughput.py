"""Rates of a training run: scored work over time, and over the peak of a described device."""

import jax
import pytest

from freqformer.cost import model_cost, training_flops
from freqformer.model.config import model_config
from freqformer.simulation.descriptions import load_gpu
from freqformer.train.throughput import Throughput, peak_of, steps_within
from tests.tiny_config import get_config

SHAPE = (8, 64, 64, 4)


def test_sparse_work_is_counted_not_dense():
  config = model_config(get_config().model.to_dict())
  dense, routed = (
    Throughput.of(config.with_method(name), SHAPE, 2, jax.devices())
    for name in ("dense", "sliding_tile")
  )
  assert routed.flops < routed.dense_flops == dense.dense_flops == dense.flops
  dense = dense.flops
  assert dense == 2 * training_flops(model_cost(config.with_method("dense"), SHAPE))


@pytest.mark.parametrize(
  "seconds, step_seconds, want",
  [(100, 0.05, 1000), (100, 0.15, 650), (100, 3.0, 50), (-5, 0.1, 50)],
)
def test_as_many_steps_as_there_is_time_for(seconds, step_seconds, want):
  assert steps_within(seconds, step_seconds, 1000, 50) == want


def test_rates():
  half = Throughput(flops=2e12, dense_flops=6e12, peak=1e13).rates(2.5)
  assert half == {
    "steps_per_s": 2.5,
    "tflops_per_s": 5.0,
    "mfu": pytest.approx(0.5),
    "dense_equivalent_tflops_per_s": 15.0,
    "dense_equivalent_mfu": pytest.approx(1.5),
  }
  assert not [name for name in Throughput(2e12, 6e12, None).rates(2.5) if "mfu" in name]


def test_peak_by_the_devices_own_name():
  assert peak_of("NVIDIA H100 80GB HBM3") == load_gpu("h100").tensor_flops
  assert peak_of("NVIDIA GH100X") is None and peak_of("TPU v5") is None
