"""Measured errors of FreqFormer's operators stay below their bounds, on random tensors and in a trained model."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from freqformer import approximation, approximation_probe
from freqformer.dit import VideoDiT, make_tables
from freqformer.layout import TileLayout
from freqformer.methods.freqformer import FreqFormer
from freqformer.model_config import model_config
from freqformer.training import TrainConfig, init_state, make_train_step
from tests.method_training import SHAPE, batch_of
from tests.tiny_config import get_config

# One worker: what the file prepares or compiles is then made once.
pytestmark = [pytest.mark.xdist_group("approximation"), pytest.mark.usefixtures("quick_compiles")]

METHOD = FreqFormer(allocation=(1, 1, 1), mid_tiles=2, window=(1, 2, 2))


def check(rows):
  """Every bound holds, the split over bands is exact, and something was wrong at all (or the test compares zeros)."""
  for r in rows:
    assert sum(r["bands"]) == pytest.approx(r["total"] ** 2, rel=1e-4, abs=1e-9), r
    if r["exact"]:
      assert r["error"] == pytest.approx(r["bound"], rel=1e-3, abs=1e-4), r
    elif r["bound"] is not None:
      assert r["holds"] and r["closest"] <= 1 + 1e-6, r
  for kind in {r["kind"] for r in rows}:
    assert max(r["error"] for r in rows if r["kind"] == kind) > 1e-7, kind


@pytest.mark.parametrize("grid, block", [((4, 4, 8), 16), ((3, 5, 7), 8)], ids=str)
@pytest.mark.parametrize("smooth", [0.0, 0.9, 0.9999])
def test_random_tensors(grid, block, smooth):
  arrays = TileLayout.fit(grid, block).arrays()
  tensors = approximation_probe.random_tensors(arrays, METHOD, heads=3, d=8, seed=len(grid) + block, smooth=smooth)
  rows = approximation.measure(tensors, arrays.layout, METHOD, f"smooth {smooth}")
  check(rows)
  assert {r["head"] for r in rows} == {0, 1, 2} and len(rows) == 3 * 7


def test_the_bound_of_cell_means_is_tight_where_cells_are_alike():
  """Nearly constant tensors: delta is small, the bound is far below the trivial one, and still holds."""
  arrays = TileLayout.fit((4, 4, 8), 16).arrays()
  tensors = approximation_probe.random_tensors(arrays, METHOD, 3, 8, 0, smooth=0.999999)
  rows = [r for r in approximation.measure(tensors, arrays.layout, METHOD, "alike") if r["kind"] == "low: cell means"]
  assert all(r["holds"] and r["delta"] < 0.1 for r in rows)


def test_a_broken_operator_breaks_its_bound():
  """The bound can fail: values that do not belong to the cells' means exceed it."""
  arrays = TileLayout.fit((4, 4, 8), 16).arrays()
  tensors = approximation_probe.random_tensors(arrays, METHOD, 3, 8, 0, smooth=0.999999)
  q, k, v = tensors["coarse"]["cell means"]
  tensors["coarse"]["cell means"] = (q, k, v + 1)
  rows = [r for r in approximation.measure(tensors, arrays.layout, METHOD, "x") if r["kind"] == "low: cell means"]
  assert not any(r["holds"] for r in rows)


def test_dropped_mass_of_a_known_row():
  """Two keys with equal scores, one dropped: e = 1/2, y' - y = (v0 - v1) / 2, the bound is max|v|: reached for v1 = -v0."""
  layout = TileLayout.fit((1, 1, 2), 1)
  zeros = np.zeros((2, 2))
  v = np.array([[1.0, 0.0], [-1.0, 0.0]])
  operators = approximation.Operators.of(approximation.CELL_MEANS, layout)
  head = approximation.Head(zeros, zeros, v, np.ones(2, bool), zeros[:1], zeros[:1], zeros[:1], operators)
  found = approximation.dropped(head, np.eye(2, dtype=bool))
  assert found["error"] == pytest.approx(1) and found["bound"] == pytest.approx(1) and found["holds"]


@pytest.fixture(scope="module")
def trained():
  """`tests.tiny_config`'s model after 40 steps."""
  config = get_config().model.to_dict()
  model, train = model_config(config), TrainConfig(steps=40, batch_size=4, lr=3e-3, warmup=3, ema=0.9)
  graphdef, params = nnx.split(VideoDiT(model, SHAPE, 2, nnx.Rngs(0)))
  state, step, tables = init_state(params, train, 0), make_train_step(graphdef, train, 2), make_tables(model, SHAPE)
  for i in range(40):
    state, _ = step(state, batch_of(i), tables)
  return model, graphdef, jax.device_get(state.params)


@pytest.mark.parametrize("time", [0.9, 0.1])
def test_a_trained_model(trained, time):
  model, _, params = trained
  latents = batch_of(99)["latent"][0]
  rows = approximation_probe.measure_model(model, params, SHAPE, 2, latents, time)
  assert {(r["layer"], r["head"]) for r in rows} == {(a, b) for a in range(2) for b in range(2)}
  check(rows)
  text = approximation.table(rows)
  assert "low: cell means" in text and "none" in text


def test_the_probe_changes_nothing(trained):
  model, graphdef, params = trained
  methods = tuple((n, approximation_probe.Probe(m)) for n, m in model.attention.methods if n == "freqformer")
  probed = dataclasses.replace(model, attention=dataclasses.replace(model.attention, methods=methods))
  other, _ = nnx.split(nnx.eval_shape(lambda: VideoDiT(probed, SHAPE, 2, nnx.Rngs(0))))
  x, time, label = batch_of(5)["latent"][:1], np.full(1, 0.5, np.float32), np.zeros(1, np.int32)
  run = lambda g: jax.jit(lambda p: (m := nnx.merge(g, p))(x, time, label, m.tables(SHAPE))[0])(params)
  outs = [run(g) for g in (graphdef, other)]
  np.testing.assert_array_equal(*outs)
