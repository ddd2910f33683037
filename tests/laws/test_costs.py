"""What methods say that they cost, against the traced layer: every field that changes the work, and the whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from freqformer.kernels.block_sparse import api as attention_api

from benchmarks.compiled import layer_traffic
from benchmarks.rows import RESULTS, read_rows
from freqformer.grid.layout import TileLayout
from freqformer.methods.base import Cond
from freqformer.model.attention import AttentionDims, SpectralAttention
from freqformer.simulation.forward import make_method
from tools import offline
from tools.program_cost import program_cost

# Full tiles without padding, 64 cells each, so that nothing is counted that a program pads.
LAYOUT = TileLayout((8, 16, 16), (4, 4, 8), 128)
BASIS = "basis=dict(low=(0.5, 1.0, 1.0), mid=(0.75, 1.0, 1.0))"
HEADS = 4


@pytest.fixture(autouse=True)
def no_pairs(monkeypatch):
  """Attention without products: its pairs are counted elsewhere (tests/tools/test_program_cost.py), here what lies around them."""

  def stand_in(name, scale, q, k, v, mask):
    return (q, jnp.zeros((q.shape[0], q.shape[2], q.shape[1])))

  monkeypatch.setattr(attention_api, "_attention", stand_in)


def traced(
  method, head_dim=32, phase="", layout=LAYOUT, dtype=jnp.float32, implementation="reference"
):
  """The program of one layer."""
  width = HEADS * head_dim
  dims = AttentionDims(width, HEADS, width)

  def build():
    return SpectralAttention(
      dims, method, layout, nnx.Rngs(0), dtype=dtype, implementation=implementation
    )

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
    alone = (
      dataclasses.replace(method, allocation=(HEADS, 0, 0), summary=0) if method.branches else None
    )
    ran = [alone.phase_cost("run", *args, one) for one in np.eye(3)] if alone else []
    found += (
      cost.attention_flops
      - method.cost(*args).attention_flops
      - sum(c.attention_flops for c in ran)
    )
  layers = 4 if phase == "profile" and method.branches else 1
  means = (
    2.0
    * LAYOUT.n
    * width
    * layers
    * (type(method).__name__ in ("FreqFormer", "BlockTopK", "SparseLinear"))
  )
  return found - means


FIXED = f"freqformer(allocation=(1, 2, 1), {BASIS}"
ROUTED = f"freqformer({BASIS}"
ALONG_AXES = "freqformer(allocation=(1, 2, 1), basis=dict(kind=dct, low=(0.5, 0.5, 0.5), mid=(0.75, 0.75, 0.75))"
# From what, to what (`name(fields`, at a phase), and the tolerance of the difference.
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
  (
    FIXED,
    "freqformer(allocation=(1, 2, 1), basis=dict(low=(0.25, 0.5, 0.5), mid=(0.5, 0.75, 1.0))",
    1e-6,
  ),
  ("dense", ALONG_AXES, 1e-6),
  (ALONG_AXES, ALONG_AXES + ", filter=qkv", 1e-6),
  (ALONG_AXES, ALONG_AXES + ", summary=4", 1e-6),
  (
    FIXED,
    "freqformer(allocation=(1, 2, 1), basis=dict(kind=haar, low=(0.5, 0.5, 0.5), mid=(1.0, 1.0, 1.0))",
    1e-6,
  ),
  ("dense", "freqformer(allocation=measured, summary=2)@profile", 1e-6),
  (
    "freqformer(allocation=measured, profile=dict(rows=8))@profile",
    "freqformer(allocation=measured)@profile",
    1e-6,
  ),
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
  assert ran_on == pytest.approx(
    told_on, rel=max(tolerance, 1e-6) / 4 if "sparseflow(router" not in on else 0.1
  )


# ---- kernels -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper():
  with jax.sharding.use_abstract_mesh(offline.mesh().abstract_mesh):
    yield


def test_kernels_do_what_is_counted(hopper):
  """Full tiles of 64 cells, so that only the second term of each matrix is more than the model counts: twice its FLOPs."""

  def heads(allocation, filtered="none"):
    return make_method(f"freqformer({BASIS}, allocation={allocation}, filter={filtered})")

  def run(method):
    return traced(method, 64, dtype=jnp.bfloat16, implementation=None).kernels

  low, mid = heads((4, 0, 0)), [heads((0, 4, 0), filtered) for filtered in ("none", "v", "qkv")]

  def around(method):
    return method.cost(LAYOUT, HEADS, 64).linear_flops

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
  """Of the rows of benchmarks/compiled/layer_traffic.py, differences: to 15 % of the bytes, a quarter (or 12) of the launches."""
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


# ---- pairs ---------------------------------------------------------------------------------------------------------------

EVEN = TileLayout((4, 8, 16), (2, 4, 4), 32)
PAIRS = [
  "sliding_tile(window=(1, 2, 3), unit=tiles",
  "sliding_tile(window=(3, 5, 9), border=clip, rows=16",
  "radial(decay=0.5, sink=0",
  "radial(decay=2.0, sink=2",
  "block_topk(density=0.4, sink=2",
  "block_topk(density=0.4, coarse=none",
  "sparse_linear(critical=0.3, negligible=0.2",
  "spatial_temporal(frames=1, places=0, sink=0)@run",
  "spatial_temporal(frames=0, places=1, sink=2)@run",
  "sparseflow(allocation=(1, 3), around=(1, 2), anchors=0, schedule=dict(frames=(1, 1))",
  "sparseflow(allocation=(3, 1), around=(2, 3), anchors=2, schedule=dict(frames=(2, 2), direction=dense_early, shape=step)",
  "freqformer(allocation=(1, 1, 2), mid_tiles=5, sink=1, anchors=2, window=(1, 2, 2)",
  "freqformer(allocation=(2, 1, 1), low_shared=True, border=clip, window=(1, 1, 3)",
  "freqformer(allocation=(2, 1, 1), low_op=linear, basis=dict(low=(0.5, 1.0, 0.5), mid=(1.0, 1.0, 1.0))",
]


@pytest.mark.parametrize("text", PAIRS)
def test_pairs_are_those_that_run(text):
  """Whatever the fields: density of a layer that runs, on tiles of equal length."""
  method, phase = parse(text)
  layer = SpectralAttention(AttentionDims(32, HEADS, 32), method, EVEN, nnx.Rngs(0))
  state = method.init_state(1, layer.dims.for_method, EVEN)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, EVEN.n_buffer, 32)), jnp.float32)
  cond = Cond(jnp.full(1, 0.5), jnp.ones((1, 32)), phase=phase)
  run = nnx.jit(
    lambda layer, x: layer(x, cond, EVEN.arrays(), method.tables(EVEN), state)[2]["density"]
  )
  allocation = (1, 0) if phase else None  # every head's first pattern, before any is measured
  flops = method.cost(EVEN, HEADS, 8, allocation).attention_flops
  assert flops == pytest.approx(4 * 8 * EVEN.n**2 * float(run(layer, x).sum()), rel=1e-5)
