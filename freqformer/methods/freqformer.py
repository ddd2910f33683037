"""FreqFormer: low frequencies dense on compressed tokens, mid block-sparse, high in a sliding window; a router deals the heads.

Implements the abstract of arXiv 2604.22808; every constant below is ours (docs/design.md says what supports it).

One packed buffer `[coarse tokens | full tokens]` holds all heads. A head's branch is only which rows of the table it gets,
so hard routing is one attention call with static shapes, whatever the assignment. When all branches must run (soft
training), each head appears once per branch in that same call and the outputs are mixed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from freqformer.config import require
from freqformer.grid.basis import SpectralBasis, SpectralTables
from freqformer.grid.layout import TileLayout
from freqformer.grid.sizes import coarse_tokens
from freqformer.grid.tile_matrices import TileCells, tile_cells
from freqformer.kernels.around.lift import lift
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.cost import CallCost, uniform
from freqformer.kernels.block_sparse.table import BlockMask, select
from freqformer.kernels.linear.api import linear_attention
from freqformer.methods import measured
from freqformer.methods.base import even_lists, mask_aux, mask_density
from freqformer.methods.head_profile import ProfileConfig
from freqformer.methods.parts.summary_tokens import SummaryTokens
from freqformer.methods.routed import RoutedMethod
from freqformer.tables.counting import with_coarse
from freqformer.tables.packed import coarse_rows, full_rows, packed_kv_len
from freqformer.tables.topk import block_topk, fixed_tiles, pool_tiles
from freqformer.tables.window import BORDERS, count_window, sliding_tile

LOW, MID, HIGH = range(3)
FILTERS = ("none", "qkv", "v")
LOW_OPS = ("dense", "linear")
# Rows of a head are a x + b P_box x + c P_low x; its coarse rows (low band) do not use these.
_FILTER_COEFFICIENTS = np.array([[1, 0, 0], [0, 1, -1], [1, -1, 0]], np.float32)


@dataclasses.dataclass(frozen=True)
class FreqFormer(RoutedMethod):
  """Fields of the method, beside `router` of `RoutedMethod`.

  Attributes:
    basis: the spectral basis and its cuts.
    allocation: "routed"; or head counts per band (low, mid, high); or "measured": training-free, each head gets the band that
      serves it best at a step after a dense warm-up (`methods/measured.py`).
    mid_tiles: key tiles per query tile in the mid band, fixed ones included.
    sink: first tiles that every mid list holds.
    anchors: evenly spread frames whose tile at the same place every mid list holds.
    window: of the high band, in tiles (t, y, x).
    border: of the window, "clamp" or "clip".
    filter: which projections of mid and high heads are band-filtered: "none", "qkv" or "v".
    low_op: among coarse tokens, "dense" (softmax) or "linear" (`kernels/linear/api.py`, softmax feature map): O(n) overall.
    low_shared: mid and high rows also list the coarse tiles, in one joint softmax.
    summary: summary tokens per band and head; 0 is off.
    profile: for `allocation="measured"`.
  """

  basis: SpectralBasis = SpectralBasis("block_dct", (0.5, 0.5, 0.5), (0.75, 0.75, 0.75))
  mid_tiles: int = 4
  sink: int = 0
  anchors: int = 0
  window: tuple[int, int, int] = (3, 3, 3)
  border: str = "clamp"
  filter: str = "none"
  low_op: str = "dense"
  low_shared: bool = False
  summary: int = 0
  profile: ProfileConfig = ProfileConfig(slack=0.1)

  def __post_init__(self):
    super().__post_init__()
    if self.filter not in FILTERS or self.border not in BORDERS:
      raise ValueError(
        f"{self.filter=} must be one of {FILTERS} and {self.border=} one of {BORDERS}."
      )
    require(self, "window", least=1)
    if self.low_op not in LOW_OPS:
      raise ValueError(f"{self.low_op=} must be one of {LOW_OPS}.")
    if (
      self.mid_tiles < 1 + self.sink + self.anchors
      or min(self.sink, self.anchors, self.summary) < 0
    ):
      raise ValueError(
        f"{self.mid_tiles=} must hold the own tile and {self.sink=}, {self.anchors=} >= 0; {self.summary=} >= 0."
      )

  @property
  def branches(self):
    return ("low", "mid", "high")

  @property
  def allocations(self):
    return ("routed", "measured")

  def build(self, dims, layout, rngs):
    modules = super().build(dims, layout, rngs)
    modules.summary = (
      SummaryTokens(self.summary, dims.heads, dims.head_dim, rngs) if self.summary else None
    )
    return modules

  def energies(self, v, layout, tables):
    return tables.spectral.band_energy(v)

  def tables(self, layout):
    spectral = self.basis.fit(layout)
    coarse_tiles = -(-spectral.n_coarse // layout.block)
    kv_len = packed_kv_len(spectral.n_coarse, layout.arrays().kv_len, layout.block)
    window = sliding_tile(layout, self.window, self.border)
    low = coarse_rows(kv_len, coarse_tiles, layout.block)
    if self.low_op == "linear":  # no softmax: its rows come from the other op
      low = dataclasses.replace(low, kv_counts=np.zeros_like(low.kv_counts))
    high = full_rows(window, kv_len, coarse_tiles, self.low_shared)
    if self.low_shared:
      # A cell stands for s^2 tokens: log-multiplicity 2 log s, one number per tile (its cells' mean; equal except at edges).
      weights = np.pad(
        2 * np.log(spectral.cell_weight), (0, -spectral.n_coarse % layout.block), mode="edge"
      )
      bias = np.concatenate(
        [weights.reshape(coarse_tiles, -1).mean(-1), np.zeros(layout.tiles)]
      ).astype(np.float32)
      low, high = (dataclasses.replace(m, kv_bias=bias) for m in (low, high))
    fixed = fixed_tiles(layout, self.sink, self.anchors)
    profile = measured.tables(layout, self.profile) if self.allocation == "measured" else None
    cells = tile_cells(spectral, coarse_tiles * layout.block, filtered=self.filter != "none")
    return FreqFormerTables(spectral, low, high, fixed, coarse_tiles, profile, cells)

  def phase(self, step, steps):
    return self.profile.phase(step, steps) if self.allocation == "measured" else ""

  def check_run(self, steps):
    if self.allocation == "measured":
      self.profile.check_run(steps)

  def init_state(self, batch, dims, layout):
    return (
      {"choice": jnp.zeros((batch, dims.heads), jnp.int32)} if self.allocation == "measured" else {}
    )

  def __call__(self, module, qkv, cond, tables, state):
    if self.allocation == "measured" and cond.phase != "run":
      return measured.call(self, module, qkv, cond, tables, state)
    spectral, layout = tables.spectral, qkv.layout
    routing = self.route(
      module, qkv, cond, tables, state["choice"] if self.allocation == "measured" else None
    )
    b, _, h, _ = qkv.q.shape
    choice, repeat = routing.choice, lambda x: x
    if routing.all_branches:  # head index = branch * h + head
      choice, repeat = (
        np.repeat(np.arange(3, dtype=np.int32), h)[None],
        lambda x: jnp.tile(x, (1, 1, 3, 1)),
      )
    fused = qkv.prepare is not None and tables.cells is not None
    (q, k, v), pools = self._prepared(qkv, routing, choice, repeat, tables, fused)
    mid = self._mid_table(qkv, cond, tables, (q, k), pools)
    masks = (tables.low, mid, tables.high)
    if routing.all_branches:
      mid = dataclasses.replace(
        mid,
        kv_indices=jnp.tile(mid.kv_indices, (1, 3, 1, 1)),
        kv_counts=jnp.tile(mid.kv_counts, (1, 3, 1)),
      )
    mask = select((tables.low, mid, tables.high), choice)
    out, _ = attention(q, k, v, mask, implementation=qkv.implementation)
    if fused and self.low_op == "dense" and not routing.all_branches:
      out = lift(out, routing.weights.sum(-1), routing.choice == LOW, tables.cells.expansion)
    else:
      out = self._merged(out, (q, k, v), routing, qkv, tables)
    if self.summary:
      plain = jnp.zeros_like(layout.positions)
      out = out + module.summary(
        qkv.rotate_q(qkv.q, plain),
        qkv.rotate_k(qkv.k, plain),
        qkv.v,
        jax.lax.stop_gradient(routing.weights),
        spectral,
        layout,
      )
    return out, state, self._aux(routing, masks, qkv, cond) | mask_aux(mask, cond.want_masks)

  def _prepared(self, qkv, routing, choice, repeat, tables, fused):
    """q, k, v of the packed buffer, and the means of q and k per tile where the kernel made them, which is there if `fused`."""

    def pack(names):
      return self._packed(qkv, tables.spectral, choice, repeat, tables.coarse_tiles, names)

    filtered = "" if self.filter == "none" else self.filter
    left = filtered if fused and routing.all_branches else "" if fused else "qkv"  # to XLA
    if left == "qkv":
      return pack("qkv"), None
    cells = tables.cells.cells(tables.spectral.centres, qkv.q.shape[-1])
    *packed, q_pool, k_pool = qkv.prepare(
      cells, choice, filtered="" if left else filtered, pooled=True
    )
    q, k, v = map(repeat, packed)
    return (q, k, pack("v")[0] if left else v), (q_pool, k_pool)

  def _merged(self, out, packed, routing, qkv, tables):
    """Attention's packed output as tokens: branches mixed where all ran, coarse rows lifted and added."""
    (b, h), spectral = routing.choice.shape, tables.spectral
    if routing.all_branches:
      out = jnp.einsum(
        "bnchd,bhc->bnhd",
        out.reshape(b, -1, 3, h, out.shape[-1]),
        routing.weights.astype(out.dtype),
      )
    else:
      out = out * routing.weights.sum(-1)[:, None, :, None].astype(out.dtype)
    start, coarse = tables.coarse_tiles * spectral.layout.block, out[:, : spectral.n_coarse]
    if (
      self.low_op == "linear"
    ):  # for every head, so that shapes stay static; where all branches run, low is the first
      linear, _ = linear_attention(
        *(x[:, : spectral.n_coarse, :h] for x in packed), implementation=qkv.beside
      )
      coarse = coarse + linear * routing.weights[:, None, :, LOW, None].astype(linear.dtype)
    return out[:, start:] + spectral.lift(coarse)

  def _mid_table(self, qkv, cond, tables, packed, pools=None) -> BlockMask:
    """Top tiles by pooled *unfiltered*, normed, rotated q and k: a band-filtered tensor has zero mean in a tile.

    `pools`: these means, where the packing kernel made them. Else, unless q and k are filtered, the packed buffer holds them.
    The barrier has them pooled from there: otherwise XLA would norm and rotate into a buffer of its own, for pooling and
    packing to read (docs/log.md).
    """
    layout, h = qkv.layout, qkv.q.shape[2]
    if pools is None:
      if self.filter == "qkv":
        q, k = qkv.rotated()
      else:
        start = tables.coarse_tiles * layout.layout.block
        q, k = (x[:, start:, :h] for x in jax.lax.optimization_barrier(packed))
      pools = [pool_tiles(jax.lax.stop_gradient(x), layout) for x in (q, k)]
    q, k = pools
    mask = block_topk(
      cond.share(q), cond.share(k), self.mid_tiles, tables.fixed, layout.kv_len, layout.layout.block
    )
    mask = dataclasses.replace(mask, kv_indices=checkpoint_name(mask.kv_indices, "tables"))
    mask = full_rows(mask, tables.high.kv_len, tables.coarse_tiles, self.low_shared)
    return dataclasses.replace(mask, kv_bias=tables.high.kv_bias)

  @jax.named_scope("pack")
  def _packed(self, qkv, spectral: SpectralTables, choice, repeat, coarse_tiles, names="qkv"):
    """Of the packed buffer what is named: compress or filter first, then QK-norm and rotary at each token's own place."""
    block = qkv.layout.layout.block
    filler = coarse_tiles * block - spectral.n_coarse
    rotate = {"q": qkv.rotate_q, "k": qkv.rotate_k, "v": lambda x, positions: x}
    coefficients = jnp.asarray(_FILTER_COEFFICIENTS)[choice]  # [b or 1, h', 3]
    packed = []
    for name in names:
      x = getattr(qkv, name)
      coarse = rotate[name](spectral.compress(x), spectral.centres)
      coarse = jnp.pad(repeat(coarse), ((0, 0), (0, filler), (0, 0), (0, 0)))
      if self.filter == "qkv" or self.filter == name:
        box, low = (repeat(p(x)) for p in (spectral.project_box, spectral.project_low))
        a, b, c = (coefficients[:, None, :, None, i].astype(x.dtype) for i in range(3))
        full = rotate[name](a * repeat(x) + b * box + c * low, qkv.layout.positions)
      else:
        full = repeat(rotate[name](x, qkv.layout.positions))
      packed.append(jnp.concatenate([coarse, full], 1))
    return packed

  def _aux(self, routing, masks, qkv, cond):
    (b, h), n = routing.choice.shape, qkv.layout.layout.n
    return self.aux(routing, jnp.stack([mask_density(m, n, b, h) for m in masks], -1), qkv, cond)

  # ---- counting ------------------------------------------------------------------------------------

  def pairs(self, layout, heads, allocation=None, phase=None):
    """Counts each band's rows of the packed buffer for its share of the heads.

    Without an allocation the fixed one counts, or the router's prior (also for measured heads,
    before they are measured). A measuring step runs every band on every head as well.
    """
    low_share, mid_share, high_share = map(float, self.shares(heads, allocation))
    measured_heads = self.allocation == "measured"
    if measured_heads and phase == "warmup":
      return even_lists(layout, heads, layout.n**2)
    low, mid, high = _count_bands(self, layout)
    run = low.scaled(heads * low_share) + mid.scaled(heads * mid_share)
    run += high.scaled(heads * high_share)
    if measured_heads and phase not in (None, "run"):
      return run + (low + mid + high).scaled(heads)
    return run

  @property
  def usual_phase(self):
    return "run" if self.allocation == "measured" else ""

  @property
  def branch_of_part(self):
    return {"lift": "low"}


def _count_bands(method: FreqFormer, layout: TileLayout) -> tuple[CallCost, CallCost, CallCost]:
  """Counts one head of each band at head dimension 1: low and high exactly, mid with full tiles.

  Unions of mid lists, which depend on the data, are those of random lists.
  """
  block = layout.block
  n_coarse = coarse_tokens(method.basis, layout)
  coarse = -(-n_coarse // block)
  dense = 0 if method.low_op == "linear" else coarse
  low = uniform(dense, dense, dense, 1, block=block)
  low = dataclasses.replace(
    low, pairs=float(n_coarse) ** 2 * (dense > 0), rows=coarse + layout.tiles
  )
  listed = min(method.mid_tiles, layout.tiles)
  every = layout.tiles + coarse
  mid = uniform(
    layout.tiles, listed + method.low_shared * coarse, every, 1, block=block, fill=layout.fill
  )
  shared = method.low_shared * float(layout.n) * n_coarse
  mid = dataclasses.replace(mid, pairs=layout.n * listed * layout.n / layout.tiles + shared)
  high = count_window(layout, method.window, method.border, before=coarse)
  if method.low_shared:
    high = with_coarse(high, layout, n_coarse, coarse)
  return low, mid, high


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FreqFormerTables:
  """Static tables of one grid, in packed tile ids."""

  spectral: SpectralTables
  low: BlockMask
  high: BlockMask
  fixed: np.ndarray
  coarse_tiles: int = dataclasses.field(metadata={"static": True})
  profile: dict | None = None  # for measured heads
  cells: TileCells | None = (
    None  # for the kernels around attention; None where the transform leaves the tile
  )
