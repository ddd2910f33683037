"""FreqFormer: a router gives each head to a frequency band with its own operator.

Low frequencies are dense on compressed tokens, mid ones block-sparse, high ones in a sliding
window: the abstract of arXiv 2604.22808; every constant is our choice (docs/design.md). One packed
buffer `[coarse tokens | full tokens]` holds all heads. A head's branch is only which rows of the
table it gets: hard routing is one attention call with static shapes. When all branches must run
(soft training), each head appears once per branch in that call and the outputs are mixed.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.config import numbers, require, require_one_of
from freqformer.grid.basis import SpectralBasis, SpectralTables
from freqformer.grid.layout import TileLayout
from freqformer.grid.sizes import coarse_tokens
from freqformer.grid.tile_matrices import TileCells, tile_cells
from freqformer.kernels.around.lift import Expansion, lift
from freqformer.kernels.around.prepare import Cells, Prepared
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.cost import CallCost, uniform
from freqformer.kernels.block_sparse.table import BlockMask, select
from freqformer.kernels.linear.api import linear_attention
from freqformer.methods import measured
from freqformer.methods.base import Projected, copied, even_lists, mask_aux, mask_density
from freqformer.methods.head_profile import ProfileConfig
from freqformer.methods.parts.router import Routing
from freqformer.methods.parts.summary_tokens import SummaryTokens
from freqformer.methods.routed import RoutedMethod
from freqformer.tables.counting import with_coarse
from freqformer.tables.packed import coarse_rows, full_rows, packed_kv_len
from freqformer.tables.topk import block_topk, fixed_tiles
from freqformer.tables.window import BORDERS, DEALS, count_window, deal_out, sliding_tile

LOW = 0  # number of the low branch
FILTERS = ("none", "qkv", "v")
LOW_OPS = ("dense", "linear")


@dataclasses.dataclass(frozen=True)
class FreqFormer(RoutedMethod):
  """Fields of the method, in addition to `router` of `RoutedMethod`.

  Attributes:
    basis: the spectral basis and its cuts.
    allocation: "routed"; or head counts per band (low, mid, high); or "measured": each head gets
      the band that serves it best, training-free, after a dense warm-up (`methods/measured.py`).
    mid_tiles: key tiles per query tile in the mid band, fixed ones included.
    sink: first tiles that every mid list holds.
    anchors: evenly spread frames whose tile at the same place every mid list holds.
    window: of the high band, in tiles (t, y, x).
    border: of the window, "clamp" or "clip".
    deal: of a window that cannot be centred on a tile, as in `tables.window`: "centred" refuses it,
      "octant" gives each head one of its sides; "as_is" is what older checkpoints have.
    filter: which projections of mid and high heads are band-filtered: "none", "qkv" or "v".
    low_op: among coarse tokens, "dense" (softmax) or "linear" (softmax features): O(n) overall.
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
  deal: str = "centred"
  filter: str = "none"
  low_op: str = "dense"
  low_shared: bool = False
  summary: int = 0
  profile: ProfileConfig = ProfileConfig(slack=0.1)

  branches = ("low", "mid", "high")
  allocations = ("routed", "measured")
  branch_of_part = {"lift": "low"}

  def __post_init__(self):
    super().__post_init__()
    require_one_of(self, "filter", FILTERS)
    require_one_of(self, "border", BORDERS)
    require_one_of(self, "deal", DEALS)
    require_one_of(self, "low_op", LOW_OPS)
    require(self, "window", least=1)
    require(self, "sink anchors summary", least=0)
    if self.mid_tiles < 1 + self.sink + self.anchors:
      raise ValueError(
        f"{self.mid_tiles=} must hold the own tile, {self.sink=} and {self.anchors=}."
      )

  def build(self, dims, layout, rngs):
    if dims.over_heads and self.filter == "qkv":
      raise ValueError(
        f"{self.filter=} would mix the heads' bands in a norm over all heads, as this model has; "
        "take 'v' or 'none'."
      )
    modules = super().build(dims, layout, rngs)
    # One assignment: flax fixes on the first one whether an attribute holds parameters.
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
    window = sliding_tile(layout, self.window, self.border, self.deal)
    low = coarse_rows(kv_len, coarse_tiles, layout.block)
    if self.low_op == "linear":  # no softmax: its rows come from the other op
      low = dataclasses.replace(low, kv_counts=np.zeros_like(low.kv_counts))
    high = full_rows(window, kv_len, coarse_tiles, self.low_shared)
    if self.low_shared:
      bias = _multiplicities(spectral, coarse_tiles)
      low, high = (dataclasses.replace(mask, kv_bias=bias) for mask in (low, high))
    fixed = fixed_tiles(layout, self.sink, self.anchors)
    profile = measured.tables(layout, self.profile) if self.allocation == "measured" else None
    cells = tile_cells(spectral, coarse_tiles * layout.block, filtered=self.filter != "none")
    return FreqFormerTables(
      spectral, low, high, fixed, numbers(self.router), coarse_tiles, profile, cells
    )

  def phase(self, step, steps):
    return self.profile.phase(step, steps) if self.allocation == "measured" else ""

  def check_run(self, steps):
    if self.allocation == "measured":
      self.profile.check_run(steps)

  def head_order(self, layout, heads, devices):
    # Summary tokens have queries for each head of the layer.
    return None if self.summary else super().head_order(layout, heads, devices)

  def refuses_dense(self, phase):
    if self.summary or self.low_op == "linear" or self.filter != "none":
      return super().refuses_dense(phase)
    return self.profile.refuses_dense(phase)

  def init_state(self, batch, dims, layout):
    if self.allocation != "measured":
      return {}
    return {"choice": jnp.zeros((batch, dims.heads), jnp.int32)}

  def __call__(self, module, qkv, cond, tables, state):
    if self.allocation == "measured" and cond.phase != "run":
      return measured.call(self, module, qkv, cond, tables, state)
    measured_bands = state["choice"] if self.allocation == "measured" else None
    routing = self.route(module, qkv, cond, tables, measured_bands)
    h = qkv.q.shape[2]
    choice = routing.choice
    if routing.all_branches:  # head number = 3 * head + branch
      choice = np.tile(np.arange(3, dtype=np.int32), h)[None]
    cells = tables.around(qkv.angles)
    packed = self._packed(qkv, routing, choice, cells)
    mid = self._mid_table(qkv, cond, tables, packed)
    masks = (tables.low, mid, deal_out(tables.high, h, qkv.order))
    mask = select([_for_heads(mask, choice) for mask in masks], choice)
    out, _ = attention(packed.q, packed.k, packed.v, mask, implementation=qkv.implementation)
    out = self._lifted(out, packed, routing, qkv, tables)
    if self.summary:
      out = out + self._summarised(module, qkv, routing, tables)
    density = [mask_density(mask, qkv.layout.n, *routing.choice.shape) for mask in masks]
    aux = self.aux(routing, jnp.stack(density, -1), qkv, cond, tables)
    return out, state, aux | mask_aux(mask, cond.want_masks)

  def _packed(self, qkv: Projected, routing: Routing, choice, cells) -> Prepared:
    """Returns packed tokens of the heads of `choice`, and means of the layer's unfiltered heads."""
    filtered = "" if self.filter == "none" else self.filter
    copies = 3 if routing.all_branches else 1
    if filtered:
      # The filter's number (0: none, 1: mid, 2: high) is the branch's: low heads keep their tokens.
      heads = (qkv.q.shape[0], choice.shape[1])
      return qkv.prepare(
        cells, jnp.broadcast_to(choice, heads), copies=copies, filtered=filtered, pooled=True
      )
    found = qkv.prepare(cells, pooled=True)
    q, k, v = (copied(x, copies, 2) for x in found[:3])
    return found._replace(q=q, k=k, v=v)

  def _lifted(self, out, packed: Prepared, routing: Routing, qkv: Projected, tables):
    """Returns attention's packed output as tokens: branches mixed, coarse rows lifted."""
    b, h = routing.choice.shape
    if self.low_op == "linear":
      # No low list has a tile, so that the softmax leaves the coarse rows empty. All heads are
      # computed, so that shapes stay static; where all branches run, each one's low branch.
      coarse = slice(0, tables.spectral.n_coarse)
      linear, _ = linear_attention(
        *(_of_copies(x[:, coarse], h, 2)[:, :, :, LOW] for x in packed[:3]),
        implementation=qkv.other_ops_implementation,
      )
      shape = out.shape
      out = _of_copies(out, h, 2).at[:, coarse, :, LOW].set(linear).reshape(shape)
    weights = routing.weights.sum(-1)
    low = routing.choice == LOW
    if routing.all_branches:
      weights_of_branches = routing.weights.astype(out.dtype)
      out = jnp.einsum("bnhcd,bhc->bnhd", _of_copies(out, h, 2), weights_of_branches)
      weights = jnp.ones_like(weights)
      low = jnp.ones_like(low)
    implementation = qkv.other_ops_implementation
    return lift(out, weights, low, tables.expansion, implementation=implementation)

  def _mid_table(self, qkv: Projected, cond, tables, packed: Prepared) -> BlockMask:
    """Returns the table of top tiles by pooled q and k, unfiltered: a band has mean 0 in a tile."""
    h = qkv.q.shape[2]
    pools = (packed.q_pool, packed.k_pool)
    q, k = (cond.share(_of_copies(pool, h, 1)[:, :, 0]) for pool in pools)
    implementation = qkv.other_ops_implementation
    mask = block_topk(q, k, self.mid_tiles, tables.fixed, qkv.layout, implementation)
    mask = full_rows(mask, tables.high.kv_len, tables.coarse_tiles, self.low_shared)
    return dataclasses.replace(mask, kv_bias=tables.high.kv_bias)

  def _summarised(self, module, qkv: Projected, routing: Routing, tables):
    """Returns what the rows read of the other bands' summary tokens."""
    unmoved = jnp.zeros_like(qkv.layout.positions)
    return module.summary(
      qkv.rotate_q(qkv.q, unmoved),
      qkv.rotate_k(qkv.k, unmoved),
      qkv.v,
      jax.lax.stop_gradient(routing.weights),
      tables.spectral,
      qkv.layout,
    )

  # ---- counting

  def pairs(self, layout, heads, allocation=None, phase=None):
    """Counts each band's rows of the packed buffer for its share of the heads.

    Without an allocation the fixed one counts, or the router's prior (also for measured heads,
    before they are measured). A measuring step runs every band on every head as well.
    """
    low_share, mid_share, high_share = map(float, self.shares(heads, allocation))
    measured_heads = self.allocation == "measured"
    if measured_heads and phase == "warmup":
      return even_lists(layout, heads, layout.n**2)
    first = 0
    if allocation is None and not isinstance(self.allocation, str):
      first = heads - self.allocation[-1]  # heads in order: the last ones are the high ones
    low, mid, high = _count_bands(self, layout, heads, first)
    run = low.scaled(heads * low_share) + mid.scaled(heads * mid_share)
    run += high.scaled(heads * high_share)
    if measured_heads and phase not in (None, "run"):
      return run + (low + mid + high).scaled(heads)
    return run

  @property
  def usual_phase(self):
    return "run" if self.allocation == "measured" else ""


def _count_bands(
  method: FreqFormer, layout: TileLayout, heads: int, first: int
) -> tuple[CallCost, CallCost, CallCost]:
  """Counts a head of each band at head dimension 1; mid lists have full, random tiles.

  The high band's is the average over the heads `first` to `heads - 1`, or over all if there are
  none.
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
  high = count_window(
    layout,
    method.window,
    method.border,
    before=coarse,
    deal=method.deal,
    heads=heads,
    first=first if first < heads else 0,
  )
  if method.low_shared:
    high = with_coarse(high, layout, n_coarse, coarse)
  return low, mid, high


def _multiplicities(spectral: SpectralTables, coarse_tiles: int) -> np.ndarray:
  """Returns the key tiles' bias, float32 `[tiles]`: the mean over cells of 2 log s (s^2 tokens)."""
  layout = spectral.layout
  weights = 2 * np.log(spectral.cell_weight)
  weights = np.pad(weights, (0, -spectral.n_coarse % layout.block), mode="edge")
  coarse = weights.reshape(coarse_tiles, -1).mean(-1)
  return np.concatenate([coarse, np.zeros(layout.tiles)]).astype(np.float32)


def _of_copies(x: jax.Array, heads: int, axis: int) -> jax.Array:
  """Returns x with its axis of `heads` times k heads, made by `copied`, as two."""
  return x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])


def _for_heads(mask: BlockMask, choice) -> BlockMask:
  """Returns a branch's table for the heads of `choice`, which may be all heads per branch."""
  heads = mask.kv_counts.shape[1]
  copies = choice.shape[1] // heads
  if heads == 1 or copies == 1:
    return mask
  return dataclasses.replace(
    mask, kv_indices=copied(mask.kv_indices, copies, 1), kv_counts=copied(mask.kv_counts, copies, 1)
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class WholeAxes:
  """Compression and lift of a transform that leaves the tile (dct, haar), for `prepare` and `lift`.

  It is no matrix per tile, as `Cells` and the kernels need; tables apply it along whole axes.

  Attributes:
    cos, sin: float32 `[n_coarse, d / 2]`, rotary at the cells' centres; None to lift.
    front: static; rows of the packed buffer before the tokens.
  """

  spectral: SpectralTables
  cos: jax.Array | None
  sin: jax.Array | None
  front: int = dataclasses.field(metadata={"static": True})

  per_tile = None  # coarse tokens are of no tile
  can_filter = True  # every basis has its projections

  @property
  def tiles(self) -> int:
    """Tiles of tokens."""
    return self.spectral.layout.tiles

  def compress(self, x: jax.Array) -> jax.Array:
    """Returns coarse tokens `[b, n_coarse, h, d]` of `[b, n_buffer, h, d]`."""
    return self.spectral.compress(x)

  def filter(self, x: jax.Array, bands: jax.Array) -> jax.Array:
    """Returns each head's tokens in the mid (1) or high (2) band."""
    bands = bands[:, None, :, None]
    box = self.spectral.project_box(x)
    return jnp.where(bands == 1, box - self.spectral.project_low(x), x - box)

  def lift(self, packed: jax.Array, low: jax.Array) -> jax.Array:
    """Returns the tokens `[b, n_buffer, h, d]` of low heads' coarse tokens."""
    coarse = packed[:, : self.spectral.n_coarse]
    return self.spectral.lift(jnp.where(low[:, None, :, None], coarse, 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FreqFormerTables:
  """Static tables of one grid, in packed tile ids.

  Attributes:
    spectral: for statistics and summary tokens, and for transforms that leave the tile.
    low, high: the low band's table of coarse rows, the high band's of full rows.
    fixed: int32 `[tiles, f]`, key tiles that every mid list holds.
    router: `numbers` of the router.
    coarse_tiles: static; tiles of coarse tokens.
    profile: for measured heads, or None.
    by_tile: the matrices by tile; None where the transform leaves the tile.
  """

  spectral: SpectralTables
  low: BlockMask
  high: BlockMask
  fixed: np.ndarray
  router: dict
  coarse_tiles: int = dataclasses.field(metadata={"static": True})
  profile: dict | None = None
  by_tile: TileCells | None = None

  def around(self, angles: Callable) -> Cells | WholeAxes:
    """Returns how tokens are compressed, for `prepare`; `angles` is `Projected.angles`."""
    with jax.named_scope("prepare"):
      rotary = angles(self.spectral.centres)
    if self.by_tile is not None:
      return self.by_tile.cells(rotary)
    return WholeAxes(self.spectral, *rotary, self.front)

  @property
  def expansion(self) -> Expansion | WholeAxes:
    """Returns the way in which coarse tokens are lifted, for `lift`."""
    if self.by_tile is not None:
      return self.by_tile.expansion
    return WholeAxes(self.spectral, None, None, self.front)

  @property
  def front(self) -> int:
    """Rows of the packed buffer before the tokens."""
    return self.coarse_tiles * self.spectral.layout.block
