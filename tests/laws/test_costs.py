"""Counts of methods: against the formulas of earlier versions, sums by hand, and what runs."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.compiled import layer_traffic
from freqformer.cost import branch_costs, layer_cost, model_cost, training_flops
from freqformer.grid.layout import TileLayout
from freqformer.grid.sizes import most_cells
from freqformer.grid.transforms import rows_below
from freqformer.methods.base import Cond
from freqformer.methods.block_topk import BlockTopK
from freqformer.methods.freqformer import LOW, FreqFormer
from freqformer.methods.sparse_linear import SparseLinear
from freqformer.methods.sparseflow import LINEAR, SparseFlow
from freqformer.model.attention import AttentionDims, SpectralAttention
from freqformer.simulation.forward import make_method
from freqformer.simulation.traffic import around_attention
from freqformer.train.experiment import experiment
from tests import golden
from tests.earlier_configs import earlier_config
from tools import offline
from tools.program_cost import program_cost

HEADS = 4


def parse(text):
  """`name(fields@phase` as the method and the phase (None: a usual step)."""
  text, _, phase = text.partition("@")
  return make_method(text + ")" * (text.count("(") - text.count(")"))), phase or None


# ---- the formulas of earlier versions ------------------------------------------------------------

COUNTS = json.loads(golden.path("counts").read_text())
WIDE = (12, 128)  # heads and channels of a head of the layers in the table
# FLOPs per element of `[n, D]` that the formulas had for sums over tokens: one for each mean (of q
# and k; of v too for the gate), three for the variances of v. They are no products.
SUMS = {FreqFormer: 2, BlockTopK: 3, SparseLinear: 2, SparseFlow: 3}


def padding(method, layout, shares) -> float:
  """FLOPs of products with what holds nothing, which the formulas left out and the trace counts.

  These are the rows behind a tile's tokens, the cells that a ragged tile lacks, and the 7 columns
  of zeros behind linear attention's d values and their denominator. The heads have `shares`.
  """
  heads, d = WIDE
  column = 2 * heads * d  # of one output column, per row
  n, rows = layout.n, layout.n_buffer
  if isinstance(method, BlockTopK):  # the gate
    return column * d * (rows - n)
  if isinstance(method, SparseLinear):  # its projection, states and their reading, sums of states
    linear = 2 * column * ((d + 8) * rows - (d + 1) * n)
    return column * d * (rows - n) + linear + column * 7 * layout.tiles**2
  if isinstance(method, SparseFlow):  # frames have no padding rows
    return 2 * column * 7 * n * shares[LINEAR]
  if isinstance(method, FreqFormer):  # compression of q, k and v, and the lift of low heads
    cells = [
      sum(length * rows_below(length, cut) for length in lengths)
      for lengths, cut in zip(layout.lengths, method.basis.low, strict=True)
    ]
    padded = rows * most_cells(method.basis, layout) - math.prod(cells)
    return column * (3 + shares[LOW]) * padded
  return 0.0


@pytest.mark.parametrize("row", COUNTS["layers"], ids=lambda r: f"{r['method']} {r['grid']}")
def test_layers_cost_what_they_did(row):
  """Useful work is the formulas' exactly: padding and sums are all that the trace has otherwise."""
  method = make_method(row["method"])
  layout = TileLayout.fit(tuple(row["grid"]), 128)
  sizes = (layout, *WIDE)
  sums = SUMS.get(type(method), 0) * layout.n * math.prod(WIDE)
  alone = np.eye(len(method.branches))
  expected = method.shares(WIDE[0]) if method.branches else ()
  for key, shares in (("run", expected), ("training", alone.sum(0))):
    cost = layer_cost(method, *sizes, training=key == "training")
    assert cost.attention_flops == pytest.approx(row[key][0], rel=1e-6)
    around = row[key][1] - sums + padding(method, layout, shares)
    assert cost.linear_flops == pytest.approx(around, rel=1e-6)
  traffic = around_attention(method, *sizes)
  assert (traffic.bytes, traffic.launches) == pytest.approx(row["run"][2:], rel=1e-6)
  if "branches" in row:
    dense = 4 * WIDE[0] * WIDE[1] * layout.n**2
    more = np.array([padding(method, layout, shares) for shares in alone]) - sums
    want = np.array(row["branches"]) + more / dense
    np.testing.assert_allclose(branch_costs(method, *sizes), want, rtol=1e-6)


@pytest.mark.parametrize("row", COUNTS["models"], ids=lambda r: f"{r['config']} {r['method']}")
def test_models_cost_what_they_did(row):
  exp = experiment(earlier_config(row["config"]))
  model = exp.model.with_method(row["method"]) if row["method"] else exp.model
  cost = model_cost(model, exp.latent_shape)
  assert (cost.attention_flops, cost.linear_flops) == pytest.approx(row["forward"][:2], rel=0.01)
  training = training_flops(model_cost(model, exp.latent_shape, training=True))
  assert training == pytest.approx(row["training_flops"], rel=0.01)


# ---- sums by hand --------------------------------------------------------------------------------

# Full tiles without padding: 16 of 4 x 4 x 8 = 128 tokens, of which BASIS keeps 64 cells, 96 rows
# of the box.
LAYOUT = TileLayout((8, 16, 16), (4, 4, 8), 128)
BASIS = "basis=dict(low=(0.5, 1.0, 1.0), mid=(0.75, 1.0, 1.0))"
FIXED = f"freqformer(allocation=(1, 2, 1), {BASIS}"
ROUTED = f"freqformer({BASIS}"
N = LAYOUT.n
T = LAYOUT.tiles
D = 96  # channels of a head
WIDTH = HEADS * D
CELLS = 64  # of a tile
BOX = 96
SCORES = 2 * T**2 * WIDTH
COMPRESSION = 3 * 2 * N * CELLS * WIDTH
PROJECTIONS = 4 * N * (CELLS + BOX) * WIDTH  # P_low and P_box of one array
FILTERS = 2 * 2 * N * 128 * WIDTH  # a square matrix per tile for each of two bands
# (from, to, what it adds to the FLOPs around attention and to those of attention's scores)
ADDED = (
  ("dense", FIXED, COMPRESSION + 2 * N * CELLS * D + SCORES),  # one head of four is lifted
  (FIXED, FIXED + ", filter=v", FILTERS),
  (FIXED, FIXED + ", filter=qkv", 3 * FILTERS),
  (FIXED, FIXED + ", summary=1", 2 * PROJECTIONS + 30 * N * WIDTH),
  (FIXED + ", summary=1", FIXED + ", summary=16", 15 * 30 * N * WIDTH),
  (FIXED, FIXED + ", low_op=linear", 4 * T * CELLS * WIDTH * (D + 8)),
  (ROUTED + ", router=dict(statistics=False)", ROUTED, 2 * N * BOX * WIDTH + 2 * HEADS * 64 * 3),
  (
    ROUTED + ", router=dict(hidden=1)",
    ROUTED + ", router=dict(hidden=2)",
    2 * WIDTH + 2 * HEADS * 6,
  ),
  # Each level makes an eighth of cells of the one before, 16 of each of its tiles, and a logit.
  ("octaves(levels=1", "octaves(levels=2", 3 * 2 * N * 16 * WIDTH + 2 * HEADS * 64),
  ("octaves(levels=2", "octaves(levels=3", 3 * 2 * N // 8 * 16 * WIDTH + 2 * HEADS * 64),
  ("adaspa@reuse", "adaspa@search", 2 * N**2 * WIDTH),
  ("spatial_temporal@run", "spatial_temporal@profile", 0),
)


@pytest.mark.parametrize("off, on, added", ADDED, ids=lambda x: x if isinstance(x, str) else "")
def test_products_around_attention(off, on, added):
  costs = []
  for text in (off, on):
    method, phase = parse(text)
    costs.append(layer_cost(method, LAYOUT, HEADS, D, phase=phase))
  assert costs[1].linear_flops - costs[0].linear_flops == pytest.approx(added, rel=1e-6, abs=1)


@pytest.mark.parametrize(
  "text, patterns", [("spatial_temporal", 3), ("freqformer(allocation=measured", 1)]
)
def test_rows_of_dense_attention_count_as_attention(text, patterns):
  """Measuring heads sums values of 64 rows for dense attention and for each pattern."""
  method, _ = parse(text)
  cost = layer_cost(method, LAYOUT, HEADS, D, phase="profile")
  called = 4 * D * method.pairs(LAYOUT, HEADS, phase="profile").pairs
  rows = 2 * (1 + patterns) * 64 * N * WIDTH
  assert cost.attention_flops - called == pytest.approx(rows)


def test_products_in_a_loop_of_unknown_length_are_refused(monkeypatch):
  method = make_method("block_topk(density=0.25)")

  def program(*_):
    def run(x):
      return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)

    return jax.make_jaxpr(run)(jnp.ones((2, 2)))

  monkeypatch.setattr(type(method), "program", program)
  with pytest.raises(ValueError, match="loop of unknown length"):
    layer_cost(method, LAYOUT, HEADS, D)


# ---- kernels -------------------------------------------------------------------------------------


def kernels(method, head_dim):
  """Launches of one layer on an H100, by name."""
  forward, args = layer_traffic.program(method, LAYOUT, HEADS, head_dim)
  with jax.sharding.use_abstract_mesh(offline.mesh().abstract_mesh):
    return program_cost(forward, *args).kernels


@pytest.mark.parametrize("allocation", [(4, 0, 0), (0, 4, 0), (1, 2, 1)])
def test_kernels_around_attention_do_what_is_counted(allocation):
  """Full tiles of 64 cells: only the second term of each matrix is more than is counted."""
  method, _ = parse(f"freqformer({BASIS}, allocation={allocation}")
  found = kernels(method, 64)
  counted = layer_cost(method, LAYOUT, HEADS, 64).linear_flops - 2 * T**2 * HEADS * 64
  lifted = 2 * N * CELLS * 64 * allocation[0]
  assert found["prepare"].flops == 2 * (counted - lifted)
  assert found["lift"].flops >= 2 * lifted  # the estimate does not know how many heads are low


def test_linear_kernels_do_what_is_counted():
  """The kernels have one column for the denominator, the plain form 8 with padding."""
  method, _ = parse("sparseflow(allocation=(0, 4)")
  found = kernels(method, 64)
  ran = found["linear_states"].flops + found["linear_read"].flops
  counted = layer_cost(method, LAYOUT, HEADS, 64).linear_flops
  assert ran == pytest.approx(counted * 64 / 72, rel=0.02)


# ---- pairs ---------------------------------------------------------------------------------------

EVEN = TileLayout((4, 8, 16), (2, 4, 4), 32)
PAIRS = [
  "sliding_tile(window=(1, 2, 3), unit=tiles, deal=octant",
  "sliding_tile(window=(1, 2, 2), unit=tiles, deal=as_is, border=clip",
  "sliding_tile(window=(3, 5, 9), border=clip, rows=16",
  "radial(decay=0.5, sink=0",
  "radial(decay=2.0, sink=2",
  "block_topk(density=0.4, sink=2",
  "block_topk(density=0.4, coarse=none",
  "sparse_linear(critical=0.3, negligible=0.2",
  "spatial_temporal(frames=1, places=0, sink=0)@run",
  "spatial_temporal(frames=0, places=1, sink=2)@run",
  "sparseflow(allocation=(1, 3), around=(1, 2), anchors=0, schedule=dict(frames=(1, 1))",
  "sparseflow(allocation=(3, 1), around=(2, 3), anchors=2, "
  "schedule=dict(frames=(2, 2), direction=dense_early, shape=step)",
  "freqformer(allocation=(1, 1, 2), mid_tiles=5, sink=1, anchors=2, window=(1, 2, 2), deal=octant",
  "freqformer(allocation=(2, 1, 1), low_shared=True, border=clip, window=(1, 1, 3)",
  "freqformer(allocation=(2, 1, 1), low_op=linear, "
  "basis=dict(low=(0.5, 1.0, 0.5), mid=(1.0, 1.0, 1.0))",
  "octaves(window=(1, 2, 3), deal=octant, border=clip, threshold=0.0",
  "octaves(levels=2, window=(1, 3, 1), mid_tiles=2, border=clamp, threshold=0.0",
  "octaves(levels=2, factor=4, basis=haar, window=(1, 1, 1), threshold=0.0",
]


@pytest.mark.parametrize("text", PAIRS)
def test_pairs_are_those_that_run(text):
  """Densities of a layer that runs, on tiles of equal length, whatever the fields."""
  method, phase = parse(text)
  layer = SpectralAttention(AttentionDims(32, HEADS, 32), method, EVEN, nnx.Rngs(0))
  state = method.init_state(1, layer.dims.for_method, EVEN)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, EVEN.n_buffer, 32)), jnp.float32)
  cond = Cond(jnp.full(1, 0.5), jnp.ones((1, 32)), phase=phase or "")
  run = nnx.jit(
    lambda layer, x: layer(x, cond, EVEN.arrays(), method.tables(EVEN), state)[2]["density"]
  )
  allocation = (1, 0) if phase else None  # every head's first pattern, before any is measured
  pairs = method.pairs(EVEN, HEADS, allocation).pairs
  assert pairs == pytest.approx(EVEN.n**2 * float(run(layer, x).sum()), rel=1e-5)
