"""Errors of FreqFormer's operators stay below their bounds, on random tensors and in a model."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.pages import complexity
from freqformer.analysis import bounds, probe, summary
from freqformer.grid.layout import TileLayout
from freqformer.methods.freqformer import FreqFormer
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT
from freqformer.simulation import plots
from tests.tiny_config import get_config

# One worker: what the file prepares or compiles is then made once.
pytestmark = pytest.mark.xdist_group("bounds")

SHAPE = (4, 4, 6, 4)
LATENTS = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
METHOD = FreqFormer(allocation=(1, 1, 1), mid_tiles=2, window=(1, 2, 2), deal="octant")


def check(rows):
  """Every bound holds, the split over bands is exact, and every kind has an error above 0."""
  for r in rows:
    assert sum(r["bands"]) == pytest.approx(r["total"] ** 2, rel=1e-4, abs=1e-9), r
    if r["bound"] is not None:
      assert r["holds"] and r["error"] <= r["bound"] + 1e-4, r
      assert r["exact"] or r["error"] / r["bound"] <= r["closest"]["ratio"] + 1e-6 <= 1 + 2e-6, r
  for kind in {r["kind"] for r in rows}:
    assert max(r["error"] for r in rows if r["kind"] == kind) > 1e-7, kind


@pytest.mark.parametrize("grid, block, smooth", [((4, 4, 8), 16, 0.0), ((3, 5, 7), 8, 0.9999)])
def test_random_tensors(grid, block, smooth):
  arrays = TileLayout.fit(grid, block).arrays()
  tensors = probe.random_tensors(
    arrays, METHOD, heads=3, d=8, seed=len(grid) + block, smooth=smooth
  )
  rows = bounds.measure(tensors, arrays.layout, METHOD, f"smooth {smooth}")
  check(rows)
  assert {r["head"] for r in rows} == {0, 1, 2} and len(rows) == 3 * 7


def test_the_bound_of_cell_means_is_tight_and_can_fail():
  """With nearly constant tensors delta is small, the bound far below the trivial one. Values that
  are not the means of the cells exceed it."""
  arrays = TileLayout.fit((4, 4, 8), 16).arrays()
  tensors = probe.random_tensors(arrays, METHOD, 3, 8, 0, smooth=0.999999)

  def cell_means():
    rows = bounds.measure(tensors, arrays.layout, METHOD, "alike")
    return [r for r in rows if r["kind"] == "low: cell means"]

  assert all(r["holds"] and r["delta"] < 0.1 for r in cell_means())
  q, k, v = tensors["coarse"]["cell means"]
  tensors["coarse"]["cell means"] = (q, k, v + 1)
  assert not any(r["holds"] for r in cell_means())


def plain_head(v) -> bounds.Head:
  """Equal scores everywhere and the given values, one token per row of `[n, d]`."""
  n = len(v)
  operators = bounds.Operators.of(bounds.CELL_MEANS, TileLayout.fit((1, 1, n), 1))
  zeros, coarse = np.zeros_like(v), np.zeros((n // 2, v.shape[1]))
  return bounds.Head(zeros, zeros, v, np.ones(n, bool), coarse, coarse, coarse, operators)


def test_an_error_stands_beside_the_bound_of_its_own_row():
  """Row 0 leaves out key 0: error 0.4833 of 0.5. Row 1 keeps keys 1 and 2: 0.55 of 1. Row 2 keeps
  key 3 only: 0.35 of 1.5. Row 3 leaves nothing out: 0 of 0, which breaks no bound."""
  listed = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], bool)
  found = bounds.dropped(plain_head(np.array([[1.0], [-1.0], [-1.0], [-0.8]])), listed)
  assert (found["error"], found["bound"]) == (pytest.approx(0.55), pytest.approx(1))
  closest = {"row": 0, "error": 0.45 + 0.1 / 3, "bound": 0.5, "ratio": 0.9 + 0.2 / 3}
  assert found["closest"] == pytest.approx(closest, rel=1e-8) and found["holds"]


def test_a_filter_of_bands_that_are_not_orthogonal_is_not_exact():
  head = plain_head(np.array([[1.0, 0.3], [-0.5, 0.2], [0.1, -0.7], [-0.8, 0.4]]))
  head = dataclasses.replace(head, q=head.v, k=9 * head.v)
  assert all(bounds.filtered(head, i)["holds"] for i in range(3))
  slanted = dataclasses.replace(head.operators, low=0.9 * head.operators.low)
  head = dataclasses.replace(head, operators=slanted)
  assert not all(bounds.filtered(head, i)["holds"] for i in range(3))


def row(head, kind, pair, closest, holds=True, **more):
  """A row as `measure` gives it; pair and closest: (error, bound)."""
  if closest is not None:
    error, bound = closest
    closest = {"row": 0, "error": error, "bound": bound, "ratio": error / bound}
  return {
    "case": "t = 0",
    "layer": 0,
    "head": head,
    "kind": kind,
    "error": pair[0],
    "bound": pair[1],
    "closest": closest,
    "holds": holds,
    "total": 1.0,
    "bands": [1.0, 0.0, 0.0],
    "exact": False,
    "steps": 5,
  } | more


# The largest error, the largest bound, the largest error / bound: three heads.
ROWS = [
  row(0, "window", (2.0, 20.0), (1.0, 5.0)),
  row(1, "window", (1.0, 40.0), (0.5, 10.0)),
  row(2, "window", (1.5, 2.0), (0.9, 1.0)),
  row(0, "cells", (3.0, 4.0), (3.0, 2.0), holds=False, delta=7.0),
  row(1, "cells", (1.0, 4.0), (1.0, 4.0), delta=6.0),
  row(0, "filter", (5.0, 5.0), (5.0, 5.0), exact=True),
  row(1, "filter", (4.0, 4.4), (4.0, 4.4), holds=False, exact=True),
  row(0, "other", (1.0, None), None, holds=None),
]


def test_the_summary_shows_pairs_and_counts_what_was_kept():
  window, cells, filters, other = summary.summary(ROWS)
  assert (window["error"], window["bound"], window["kept"]) == (2.0, 20.0, 3)
  assert window["closest"] == {"row": 0, "error": 0.9, "bound": 1.0, "ratio": 0.9}
  assert (cells["kept"], cells["heads"], cells["closest"]["ratio"]) == (1, 2, 1.5)
  assert (filters["kept"], filters["closest"]["error"]) == (1, 4.0), (
    "the head farthest from exact is shown"
  )
  assert (other["kept"], other["bound"], other["closest"]) == (None, None, None)
  ratios = [summary.ratio_text(r) for r in (window, cells, filters, other)]
  assert ratios == ["0.900", "1.500", "1 - 9e-02", "none"]
  assert all(ratio in summary.table(ROWS) for ratio in ratios)


def test_the_page_and_the_figure_show_the_same_ratios():
  page = complexity.approximation_tables(ROWS)
  assert "| 2 (0.900) | 3 (1.500) | 1 (none) |" in page
  assert "| 100/0/0 | 100/0/0 | 100/0/0 |" in page
  assert "4 of 5 pairs of head and operator" in page and "1 of 2 filters" in page
  bounded = [r for r in ROWS if r["bound"] is not None and not r["exact"]]
  (axis,) = plots.errors_figure(bounded).axes
  drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
  assert drawn["window (measured)"] == [0.2, 0.05, 0.9] and drawn["cells (measured)"] == [1.5, 0.25]
  assert all(
    line.get_color() == plots.MEASURED for line in axis.lines if "measured" in line.get_label()
  )


def test_measured_points_are_filled_and_black_simulated_ones_hollow_and_not():
  calls = [{"name": "a", "measured_seconds": 2.0, "seconds": 1.0, "fitted": False}]
  calls += [
    {"name": "b", "measured_seconds": 1.0, "seconds": 1.0, "fitted": True, "derived": "2 x another"}
  ]
  (axis,) = plots.validation_figure(calls).axes
  look = {line.get_label().split(",")[0]: line for line in axis.lines}
  assert set(look) == {"measured", "derived from measurements", "simulated"}
  assert [list(line.get_xdata()) for line in axis.lines] == [[1], [1], [1.0], [0.5]], (
    "measured, derived, fitted, not fitted"
  )
  assert look["measured"].get_markerfacecolor() == plots.MEASURED != look["simulated"].get_color()
  assert (
    look["simulated"].get_markerfacecolor()
    == look["derived from measurements"].get_markerfacecolor()
    == "none"
  )


@pytest.fixture(scope="module")
def model():
  """`tests.tiny_config`'s model with random parameters: config, graphdef, parameters."""
  config = model_config(get_config().model.to_dict())
  graphdef, params = nnx.split(nnx.eval_shape(lambda: VideoDiT(config, SHAPE, 2, nnx.Rngs(0))))
  rng = np.random.default_rng(0)
  return config, graphdef, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape), params)


def test_a_model(model):
  config, _, params = model
  rows = probe.measure_model(config, params, SHAPE, 2, LATENTS, 0.5)
  assert {(r["layer"], r["head"]) for r in rows} == {(a, b) for a in range(2) for b in range(2)}
  check(rows)
  text = summary.table(rows)
  assert "low: cell means" in text and "none" in text


def test_the_probe_changes_nothing(model):
  config, graphdef, params = model
  methods = tuple((n, probe.Probe(m)) for n, m in config.attention.methods if n == "freqformer")
  probed = dataclasses.replace(
    config, attention=dataclasses.replace(config.attention, methods=methods)
  )
  other, _ = nnx.split(nnx.eval_shape(lambda: VideoDiT(probed, SHAPE, 2, nnx.Rngs(0))))
  x = LATENTS[None]
  time = np.full(1, 0.5, np.float32)
  label = np.zeros(1, np.int32)

  def run(g):
    return jax.jit(lambda p: (m := nnx.merge(g, p))(x, time, label, m.tables(SHAPE))[0])(params)

  outs = [run(g) for g in (graphdef, other)]
  np.testing.assert_array_equal(*outs)
