"""What methods say that they cost, against the traced layer: every field that changes the work, and the whole."""

import dataclasses
import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kernels.attention
from benchmarks import layer_traffic
from benchmarks.rows import RESULTS, read_rows
from freqformer import simulate
from freqformer.attention import AttentionDims, SpectralAttention
from freqformer.config import ConfigError
from freqformer.cost import attention_cost, method_call
from freqformer.layout import TileLayout
from freqformer.methods.base import Cond
from freqformer.methods.registry import method_class
from freqformer.methods.routed import RoutedMethod
from freqformer.planners.radial import count_radial, radial
from freqformer.planners.sliding_tile import BORDERS, count_window, sliding_tile
from freqformer.planners.spatial_temporal import count_pairs, spatial_temporal
from freqformer.router import RouterConfig, penalty
from freqformer.simulation.forward import make_method
from freqformer.spectral import SpectralBasis
from freqformer.transform_cost import TransformSizes
from kernels import offline
from kernels.cost import count
from kernels.program_cost import program_cost

# Full tiles without padding, 64 cells each, so that nothing is counted that a program pads.
LAYOUT = TileLayout((8, 16, 16), (4, 4, 8), 128)
BASIS = "basis=dict(low=(0.5, 1.0, 1.0), mid=(0.75, 1.0, 1.0))"
HEADS = 4


@pytest.fixture(autouse=True)
def no_pairs(monkeypatch):
  """Attention without products: its pairs are counted elsewhere (tests/test_program_cost.py), here what lies around them."""
  stand_in = lambda name, scale, q, k, v, mask: (q, jnp.zeros((q.shape[0], q.shape[2], q.shape[1])))
  monkeypatch.setattr(kernels.attention, "_attention", stand_in)


def traced(method, head_dim=32, phase="", layout=LAYOUT, dtype=jnp.float32, implementation="reference"):
  """The program of one layer."""
  width = HEADS * head_dim
  dims = AttentionDims(width, HEADS, width)
  build = lambda: SpectralAttention(dims, method, layout, nnx.Rngs(0), dtype=dtype, implementation=implementation)
  graphdef, params = nnx.split(nnx.eval_shape(build))

  def forward(params, x, arrays, tables, state):
    cond = Cond(jnp.full(1, 0.5), jnp.ones((1, width)), phase=phase)
    return nnx.merge(graphdef, params)(x, cond, arrays, tables, state)[:2]

  state = jax.eval_shape(lambda: method.init_state(1, dims.for_method, layout))
  x = jax.ShapeDtypeStruct((1, layout.n_buffer, width), dtype)
  return program_cost(forward, params, x, layout.arrays(), method.tables(layout), state)


def expected(method, head_dim=32, phase="") -> float:
  """The model's count of what is traced: without means, which are sums, and with dense rows, which are no kernel's."""
  args = (LAYOUT, HEADS, head_dim)
  cost = method.phase_cost(phase, *args) if phase else method.cost(*args)
  width = HEADS * head_dim
  found = cost.linear_flops + 8.0 * LAYOUT.n * width**2  # and q, k, v, out
  if phase == "profile":
    alone = dataclasses.replace(method, allocation=(HEADS, 0, 0), summary=0) if method.branches else None
    ran = [alone.phase_cost("run", *args, one) for one in np.eye(3)] if alone else []
    found += cost.attention_flops - method.cost(*args).attention_flops - sum(c.attention_flops for c in ran)
  layers = 4 if phase == "profile" and method.branches else 1
  means = 2.0 * LAYOUT.n * width * layers * (type(method).__name__ in ("FreqFormer", "BlockTopK", "SparseLinear"))
  return found - means


FIXED = f"freqformer(allocation=(1, 2, 1), {BASIS}"
ROUTED = f"freqformer({BASIS}"
ALONG_AXES = "freqformer(allocation=(1, 2, 1), basis=dict(kind=dct, low=(0.5, 0.5, 0.5), mid=(0.75, 0.75, 0.75))"
# What to take away, what to add; `name(fields` at a phase. Defaults: 1 %.
FIELDS = (
  ("dense", FIXED, 1e-6),
  (FIXED, FIXED + ", filter=v", 1e-6),
  (FIXED, FIXED + ", filter=qkv", 1e-6),
  (FIXED, FIXED + ", summary=1", 1e-6),
  (FIXED + ", summary=1", FIXED + ", summary=16", 1e-6),
  (FIXED, FIXED + ", low_op=linear", 0.08),
  (FIXED, ROUTED, 1e-6),
  (ROUTED + ", router=dict(statistics=False)", ROUTED, 1e-6),
  (ROUTED, ROUTED + ", router=dict(hidden=512)", 1e-6),
  (FIXED, "freqformer(allocation=(1, 2, 1), basis=dict(low=(0.25, 0.5, 0.5), mid=(0.5, 0.75, 1.0))", 1e-6),
  ("dense", ALONG_AXES, 1e-6),
  (ALONG_AXES, ALONG_AXES + ", filter=qkv", 1e-6),
  (ALONG_AXES, ALONG_AXES + ", summary=4", 1e-6),
  (FIXED, "freqformer(allocation=(1, 2, 1), basis=dict(kind=haar, low=(0.5, 0.5, 0.5), mid=(1.0, 1.0, 1.0))", 1e-6),
  ("dense", "freqformer(allocation=measured, summary=2)@profile", 1e-6),
  ("freqformer(allocation=measured, profile=dict(rows=8))@profile", "freqformer(allocation=measured)@profile", 1e-6),
  ("dense", "sparseflow(allocation=(1, 3)", 0.08),
  ("sparseflow(allocation=(1, 3)", "sparseflow(allocation=(3, 1)", 0.08),
  ("sparseflow(router=dict(hidden=8)", "sparseflow(router=dict(hidden=512)", 1e-6),
  ("dense", "block_topk(coarse=none", 1e-6),
  ("block_topk(coarse=none", "block_topk", 0.02),
  ("dense", "sparse_linear", 0.08),
  ("dense", "spatial_temporal@run", 1e-6),
  ("dense", "spatial_temporal@profile", 1e-6),
  ("spatial_temporal(profile=dict(rows=8))@profile", "spatial_temporal@profile", 1e-6),
  ("dense", "adaspa@reuse", 1e-6),
  ("dense", "adaspa@search", 1e-6),
  ("dense", "sliding_tile", 1e-6),
  ("dense", "radial", 1e-6),
)


def parse(text):
  text, _, phase = text.partition("@")
  return make_method(text + ")" * (text.count("(") - text.count(")"))), phase


@functools.cache
def both(text) -> tuple[float, float]:
  """Products of the traced layer, and the model's."""
  method, phase = parse(text)
  return traced(method, 96, phase).product_flops, expected(method, 96, phase)


@pytest.mark.parametrize("off, on, tolerance", FIELDS)
def test_a_field_s_products_are_the_model_s(off, on, tolerance):
  """Differences. Linear attention has 8 columns where the model has one for the denominator: 7 of 97 too many; the gate's
  bias is no product."""
  (ran_off, told_off), (ran_on, told_on) = both(off), both(on)
  assert ran_on - ran_off == pytest.approx(told_on - told_off, rel=tolerance, abs=1)
  assert ran_on == pytest.approx(told_on, rel=max(tolerance, 1e-6) / 4 if "sparseflow(router" not in on else 0.1)


# ---- kernels -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper():
  with jax.sharding.use_abstract_mesh(offline.mesh().abstract_mesh):
    yield


def test_kernels_do_what_is_counted(hopper):
  """Full tiles of 64 cells, so that only the second term of each matrix is more than the model counts: twice its FLOPs."""
  heads = lambda allocation, filtered="none": make_method(f"freqformer({BASIS}, allocation={allocation}, filter={filtered})")
  run = lambda method: traced(method, 64, dtype=jnp.bfloat16, implementation=None).kernels
  low, mid = heads((4, 0, 0)), [heads((0, 4, 0), filtered) for filtered in ("none", "v", "qkv")]
  around = lambda method: method.cost(LAYOUT, HEADS, 64).linear_flops
  selection = (2.0 * LAYOUT.n + 2.0 * LAYOUT.tiles**2) * HEADS * 64
  found = run(low)
  assert sum(found[name].flops for name in ("prepare", "lift")) == 2 * (around(low) - selection)
  flops = [run(method)["prepare"].flops for method in mid]
  assert flops[0] == 2 * (around(mid[0]) - selection)
  assert np.diff(flops).tolist() == (2 * np.diff([around(method) for method in mid])).tolist()


def test_linear_kernels_do_what_is_counted(hopper):
  """But for the denominator: one column in 64."""
  method = make_method("sparseflow(allocation=(0, 4))")
  found = traced(method, 64, dtype=jnp.bfloat16, implementation=None).kernels
  ran = found["linear_states"].flops + found["linear_read"].flops
  assert ran == pytest.approx(method.cost(LAYOUT, HEADS, 64).linear_flops, rel=0.02)


BANDS, ALONG = layer_traffic.FIXED, layer_traffic.AXES
TRAFFIC = [
  *((f"{BANDS})", f"{BANDS}, {field})") for field in ("low_op=linear", "summary=4", "summary=16")),
  *((f"{ALONG})", f"{ALONG}, {field})") for field in ("filter=v", "filter=qkv", "summary=4")),
  (f"{BANDS})", f"{ALONG})"),
  (f"{BANDS})", "freqformer"),
  (f"{ALONG})", "freqformer(basis=dict(kind=dct))"),
  ("freqformer(allocation=measured)@run", "freqformer(allocation=measured)@profile"),
  ("dense", "block_topk(coarse=none)"),
  ("block_topk(coarse=none)", "block_topk"),
  ("dense", "sparse_linear"),
  ("spatial_temporal@run", "spatial_temporal@profile"),
  ("spatial_temporal(profile=dict(rows=32))@profile", "spatial_temporal@profile"),
  ("dense", "adaspa@search"),
]


@pytest.mark.parametrize("off, on", TRAFFIC)
def test_bytes_and_launches_are_the_compiled_layer_s(off, on):
  """Of the rows of benchmarks/layer_traffic.py, differences: to 15 % of the bytes, a quarter (or 12) of the launches."""
  found = {row["name"]: row for row in read_rows(RESULTS / "layer_traffic.json")}
  costs = []
  for text in (off, on):
    method, phase = parse(text)
    args = (layer_traffic.LAYOUT, layer_traffic.HEADS, layer_traffic.HEAD_DIM)
    costs.append(method.phase_cost(phase, *args) if phase else method.cost(*args))
  moved, launched = (found[on][key] - found[off][key] for key in ("bytes", "launches"))
  assert costs[1].linear_bytes - costs[0].linear_bytes == pytest.approx(moved, rel=0.15)
  extra = found[on]["attention_launches"] - found[off]["attention_launches"]
  assert costs[1].launches - costs[0].launches == pytest.approx(launched + extra, rel=0.25, abs=12)


# ---- counts without tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_counts_are_those_of_the_tables(seed):
  """Of random ragged grids: windows, radial bands, spatial and temporal heads, and FreqFormer's packed buffer."""
  rng = np.random.default_rng(seed)
  layout = TileLayout.fit(tuple(int(e) for e in rng.integers(1, 15, 3)), int(rng.choice([4, 6, 8, 12])))
  window, border = tuple(int(w) for w in rng.integers(1, 7, 3)), BORDERS[seed % 2]
  parts, sink = 1 + seed % 2, int(rng.integers(1, 4))
  assert count_window(layout, window, border, parts) == count(sliding_tile(layout, window, border).refine(parts), 1)
  decay = float(rng.choice([0.3, 1.0, 2.5]))
  assert count_radial(layout, decay, sink) == count(radial(layout, decay, sink), 1)
  reach = (int(rng.integers(0, 3)), int(rng.integers(0, 3)), sink)
  assert count_pairs(layout, *reach) == tuple(int(mask.pairs().sum()) for mask in spatial_temporal(layout, *reach))
  method = make_method(f"freqformer(window={window}, border={border}, low_shared={seed % 3 == 0})")
  tables = method.tables(layout)
  for allocation, table in (((1, 0, 0), tables.low), ((0, 0, 1), tables.high)):
    assert dataclasses.replace(method.call_cost(layout, 1, 8, allocation), longest=0) == dataclasses.replace(
      count(table, 8), longest=0
    )


@pytest.mark.parametrize("kind", ["block_dct", "dct", "haar"])
def test_transform_sizes_are_the_fitted_basis_s(kind):
  layout = TileLayout.fit((5, 6, 9), 32)
  basis = SpectralBasis(kind, (0.5, 0.25, 0.5), (0.5, 1.0, 1.0))
  assert TransformSizes.of(basis, layout).n_coarse == basis.fit(layout).n_coarse


@pytest.mark.parametrize("name, block", [("radial", 32), ("freqformer", 32), ("spatial_temporal", 32), ("sliding_tile", 64)])
def test_a_million_tokens_are_counted_in_little_memory(name, block):
  """A prime number of tokens in a row, and in small tiles: nothing of tiles x tiles, no list, no array of tokens."""
  method = method_class(name)()
  for grid in ((1, 1, 1_048_573), (64, 128, 128)):
    layout = TileLayout.fit(grid, block)
    tracemalloc.start()
    cost = method.cost(layout, 40, 128)
    method_call(method, layout, 40, 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < cost.attention_flops <= attention_cost(40 * layout.n**2, 128).attention_flops and peak < 64e6


# ---- allocations and the router's penalty --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "allocation, said",
  [
    ((0, 0, 0), "none negative and not all 0"),
    ((-1, 1, 12), "none negative"),
    ((float("nan"), 6, 6), "none negative"),
    ((6, 6), "3 head counts"),
    ((1.5, 4.5, 6), "whole numbers"),
  ],
)
def test_an_allocation_that_is_none_is_refused(allocation, said):
  with pytest.raises(ConfigError, match=said):
    method_class("freqformer")(allocation=allocation)


def test_an_allocation_is_that_of_the_layer():
  """Counted and built, whatever counts it: the same sentence."""
  method = method_class("freqformer")(allocation=(13, 13, 13))
  for call in (lambda: method.cost(LAYOUT, 12, 32), lambda: method.call_cost(LAYOUT, 12, 32)):
    with pytest.raises(ConfigError, match="hands out 39 heads, the layer has 12"):
      call()
  for name in ("freqformer", "sparseflow", "spatial_temporal"):
    with pytest.raises(ConfigError, match="none negative"):
      method_class(name)().cost(LAYOUT, 12, 32, (-1, 2, 3)[: 2 + (name == "freqformer")])
  with pytest.raises(ConfigError, match="hands out 39 heads, the layer has 12"):
    simulate.run(["--method=freqformer(allocation=(13, 13, 13))", "--model=wan2.1-1.3b", "--tokens=4096"])


@pytest.mark.parametrize("name", ["freqformer", "sparseflow"])
def test_the_penalty_weighs_what_is_counted(name):
  """The layer's loss is `penalty` of its probabilities and of `cost` with all heads in one branch, over dense."""
  router = RouterConfig(prior=(0.3, 0.3, 0.4) if name == "freqformer" else (0.5, 0.5), budget=1e-3, penalty=0.7)
  method: RoutedMethod = method_class(name)(router=router)
  layout, dims = TileLayout.fit((4, 8, 16), 32), AttentionDims(32, 4, 32)
  costs = [method.cost(layout, 4, 8, alone).total / (4 * 32 * layout.n**2) for alone in np.eye(len(method.branches))]
  assert method.branch_costs(layout, 4, 8) == pytest.approx(costs)
  layer = SpectralAttention(dims, method, layout, nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, layout.n_buffer, 32)), jnp.float32)
  cond = Cond(jnp.full(1, 0.5), jnp.ones((1, 32)), train=True, rng=jax.random.key(0))
  run = nnx.jit(lambda layer, x: layer(x, cond, layout.arrays(), method.tables(layout), {})[2])
  aux = run(layer, x)
  want = penalty(router, aux["probs"], np.asarray(costs))
  assert float(aux["loss"]) == pytest.approx(float(want), rel=1e-5) and float(want) > 0


def test_every_branch_of_every_head_in_training():
  """Pairs of all branches, what lies around them once."""
  method = method_class("sparseflow")()
  both_ways, alone = method.training_cost(LAYOUT, 4, 32), [method.cost(LAYOUT, 4, 32, one) for one in np.eye(2)]
  assert both_ways.attention_flops == sum(c.attention_flops for c in alone)
  assert both_ways.linear_flops == max(c.linear_flops for c in alone) > min(c.linear_flops for c in alone)
  sampled = method_class("sparseflow")(router=dataclasses.replace(method.router, mode="sampled"))
  assert sampled.training_cost(LAYOUT, 4, 32) == sampled.cost(LAYOUT, 4, 32)
