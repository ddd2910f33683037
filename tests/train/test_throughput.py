"""Rates of a training run: scored work over time, and over the peak of a described device."""

import collections

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from freqformer import cost
from freqformer.cost import model_cost, step_cost, training_flops
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.simulation.descriptions import load_gpu
from freqformer.train.step import TrainConfig, make_gradients
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


GRID = (2, 8, 8, 3)
# A run of layers before the first one with parameters of its own, and two layers of that.
LAYERS = ((0, 1, "dense"), (1, None, "block_topk(density=0.5)"))
FROZEN = dict(freeze="backbone", init_from="any")
EMBEDDERS = 2 * (256 * 24 + 24 * 24) + 2 * 24 * 48  # of time; the last modulation
AT_LAYERS = dict(distill=1.0, distill_at="layers")


def layered(remat=False):
  attention = dict(layers=LAYERS, block=32, implementation="reference")
  sizes = dict(size="custom", width=24, depth=3, heads=2, patch=(1, 1, 1), remat=remat)
  return model_config(sizes | dict(attention=attention)).resolved(GRID)


def products(model, train, monkeypatch):
  """FLOPs of all matrix products in the traced gradients, of attention and of the rest."""
  graphdef, params = nnx.split(nnx.eval_shape(lambda: VideoDiT(model, GRID, 2, nnx.Rngs(0))))
  gradients = make_gradients(graphdef, train)

  def run(params, batch, tables):
    return gradients(params, jax.random.key(0), batch, tables, train, None, 0.5)

  count = train.batch_size
  batch = {"latent": jnp.zeros((count, *GRID)), "label": jnp.zeros(count, int)}
  traced = jax.make_jaxpr(run)(params, batch, make_tables(model, GRID, with_dense=True))
  found = collections.Counter()
  with monkeypatch.context() as patch:
    patch.setattr(cost, "_NOT_AROUND", ())
    for scopes, flops in cost._walk(traced.jaxpr):
      found[any("attention" in name for name in scopes)] += flops / count
  return found[True], found[False]


@pytest.mark.parametrize(
  "settings, remat",
  [(FROZEN, False), (FROZEN | AT_LAYERS, False), (dict(distill=1.0), False), (AT_LAYERS, True)],
  ids=["frozen", "frozen at layers", "at the output", "at layers"],
)
def test_a_step_costs_what_its_program_does(settings, remat, monkeypatch):
  """Against a plain step, by differences: the plain form of attention computes masked pairs, too.

  Rematerialised, dense attention runs once. Embedders and the last modulation are not counted.
  """
  model = layered(remat)
  trains = [TrainConfig(steps=1, batch_size=2, **own) for own in ({}, settings)]
  plain, own = (products(model, train, monkeypatch) for train in trains)
  less, more = (step_cost(model, GRID, **train.counted) for train in trains)
  assert own[0] - plain[0] == pytest.approx(more.attention_flops - less.attention_flops)
  difference = more.linear_flops - less.linear_flops
  if settings == dict(distill=1.0):
    difference += EMBEDDERS
  assert own[1] - plain[1] == pytest.approx(difference, abs=1e3)


def test_layers_that_are_dense_for_now_cost_what_dense_ones_do():
  model = layered()
  dense = step_cost(model.with_method("dense"), GRID)
  assert step_cost(model, GRID, dense=3) == dense
  found = [step_cost(model, GRID, dense=count).attention_flops for count in range(4)]
  assert found[0] == found[1] < found[2] < found[3]  # the first layer always is
  forward = model_cost(model.with_method("dense"), GRID)
  alike = step_cost(model, GRID, dense=3, teacher="output"), step_cost(model, GRID, dense=1)
  assert alike[0] == dense  # it is its own teacher
  more = step_cost(model, GRID, dense=1, teacher="layers").total - alike[1].total
  assert more == pytest.approx(forward.attention_flops * 2 / 3)


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
