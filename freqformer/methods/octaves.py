"""Octaves: FreqFormer as a pyramid of bands, every level with its own queries, keys and values.

Level 0 is the token grid; each further one is the level before, compressed by two along every axis.
A head attends on every level, in a window of tiles, on the coarsest level densely: keys per query
grow with the logarithm of the grid (docs/evidence.md says why that is enough). A router weighs the
levels by the timestep, per head. All levels of all heads are one attention call.

  q, k, v -> compress level by level -> norm, rotary in cells of the level -> attention
          -> weigh -> interpolate and add, from coarse to fine

Evaluation leaves out a level whose weight is below `threshold`, if that is not 0: its lists are
empty. A weight does not tell how large the level's output is: measure before you set it
(docs/evidence.md, H25), or let the end of training leave out the same (`threshold_from`). `until`
leaves out fine levels at high noise from the first step of training on, so that work falls with
noise; theory says from which t on they are not needed (`python -m freqformer.theory`).
Prior art: Focal Transformer (arXiv 2107.00641), Fast Multipole Attention (arXiv 2310.11960).
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from freqformer.config import ConfigError, numbers, require, require_one_of, with_numbers
from freqformer.grid.basis import KINDS
from freqformer.grid.layout import TileLayout
from freqformer.grid.pyramid import LIFTS, Step, cell_widths, level_layouts, steps
from freqformer.grid.rotary import angle_tables, level_theta
from freqformer.kernels.around.prepare import Prepared, norm_and_turn
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.cost import CallCost, uniform
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.methods.base import Method, Projected, mask_aux, mask_density
from freqformer.methods.parts.router import (
  ONE_BRANCH,
  RouterConfig,
  SpectralRouter,
  check_budget,
  entropy,
  probabilities,
)
from freqformer.tables.packed import side_by_side
from freqformer.tables.topk import block_topk
from freqformer.tables.window import BORDERS, DEALS, count_window, deal_out, sliding_tile

FACTORS = (2, 4, 8)
# choice: neither temperature nor noise, because nothing is hard. The slope is about what the Wiener
# kernel's mass per level has over t (docs/evidence.md): from uniform weights the fine levels are
# left before they have learned what they are for.
_ROUTER = RouterConfig(
  statistics=False, prior=(), prior_slope=8.0, temperature=(1.0, 1.0), noise=0.0, penalty=0.0
)


@dataclasses.dataclass(frozen=True)
class Octaves(Method):
  """Fields of the method.

  Attributes:
    levels: of the pyramid, the token grid included; 1 is dense attention.
    factor: cells of a level that the next one makes one, along every axis; a power of 2.
    basis: kind of the `SpectralBasis` that compresses.
    lift: "linear" interpolates between cells' centres, "basis" inverts the basis.
    window: of every level but the coarsest, in tiles of that level (t, y, x).
    border: of the window, "clip" or "clamp".
    deal: of an even window, as in `tables.window`: "centred" refuses it, "octant" gives each head
      one of its sides.
    mid_tiles: further key tiles of level 0, the best by pooled scores, in the window's softmax.
    threshold: weight below which evaluation leaves a level out, per layer, head and sample; 0
      leaves out none.
    threshold_from: share of training's steps after which training leaves out what evaluation would;
      1 is never.
    until: t above which a level is left out, in training and evaluation, one per level, the finest
      first; the coarsest one's is 1. Empty: every level at every t.
    until_share: of training's samples that keep to `until`; the others run every level, so that
      evaluation may do either with the same weights.
    router: of the levels' weights; an empty prior is uniform. `budget` holds for the pairs that
      evaluation runs, over n^2.
  """

  levels: int = 3
  factor: int = 2
  basis: str = "block_haar"
  lift: str = "linear"
  window: tuple[int, int, int] = (3, 3, 3)
  border: str = "clip"
  deal: str = "centred"
  mid_tiles: int = 0
  threshold: float = 0.0
  threshold_from: float = 1.0
  until: tuple[float, ...] = ()
  until_share: float = 1.0
  router: RouterConfig = _ROUTER

  routed = True
  within_attention = ("q_gain", "k_gain")

  def __post_init__(self):
    require(self, "levels window", least=1)
    require(self, "mid_tiles threshold threshold_from", least=0)
    require(self, "threshold", below=1)
    require(self, "threshold_from", most=1)
    require(self, "until until_share", above=0, most=1)
    require_one_of(self, "basis", KINDS)
    require_one_of(self, "lift", LIFTS)
    require_one_of(self, "border", BORDERS)
    require_one_of(self, "deal", DEALS)
    require_one_of(self, "factor", FACTORS)
    if self.mid_tiles and self.deal != "centred":
      raise ValueError(f"{self.mid_tiles=} go with one window for all heads: take deal='centred'.")
    if self.router.prior and len(self.router.prior) != self.levels:
      raise ValueError(
        f"router prior {self.router.prior} must be empty or have a share for each of "
        f"{self.levels=}."
      )
    if self.until and (len(self.until) != self.levels or self.until[-1] != 1):
      raise ValueError(
        f"until={self.until} must be empty or have a t for each of {self.levels=}, the finest "
        "first, with 1 for the coarsest, which runs at every t."
      )
    if self.until_share < 1 and not self.until:
      raise ValueError(
        f"until_share={self.until_share} is of samples that keep to until, which is empty: set "
        "until, or until_share=1."
      )
    if self.router.mode in ONE_BRANCH:
      raise ValueError(
        f"router mode {self.router.mode!r} draws one branch; levels take "
        '"soft", "gates" or "straight_through".'
      )
    if self.threshold_from < 1 and not self.threshold:
      raise ValueError(
        f"threshold_from={self.threshold_from} leaves out nothing with threshold={self.threshold}: "
        "set a threshold above 0, or threshold_from=1."
      )

  @property
  def branches(self):
    return tuple(f"x{self.factor**level}" for level in range(self.levels))

  @property
  def trains_all_branches(self):
    return self.until_share < 1  # in some samples: counted in all, an upper bound

  def check_training(self, layout, heads):
    check_budget(self.router, min(call.pairs for call in self._count_levels(layout, heads)), layout)

  def build(self, dims, layout, rngs):
    self._count_levels(layout, dims.heads)  # refuses levels and windows that cannot be
    return OctavesModules(self, dims, rngs)

  def tables(self, layout):
    layouts = self._layouts(layout)
    windows = [sliding_tile(level, self.window, self.border, self.deal) for level in layouts[:-1]]
    masks = [*windows, sliding_tile(layouts[-1], layouts[-1].tile_grid)][::-1]
    sides = max(mask.kv_counts.shape[1] for mask in masks)
    masks = [deal_out(mask, sides) for mask in masks]
    tiles = [level.tiles for level in layouts[::-1]]
    pairs = [call.pairs for call in self._count_levels(layout, sides)]
    return OctavesTables(
      steps=steps(layout, self.levels, self.basis, self.lift, self.factor),
      mask=side_by_side(masks),
      coarse=masks[:-1],
      window=masks[-1],
      level_of_tile=np.repeat(np.arange(self.levels)[::-1], tiles).astype(np.int32),
      density=(np.array(pairs) / layout.n**2).astype(np.float32),
      threshold=np.float32(self.threshold),
      threshold_from=np.float32(self.threshold_from),
      until=np.array(self.until or (1.0,) * self.levels, np.float32),
      until_share=np.float32(self.until_share),
      router=numbers(self.router),
      widths=cell_widths(layouts),
      edges=tuple((np.cumsum([0, *tiles]) * layout.block).tolist()),
    )

  def __call__(self, module, qkv, cond, tables, state):
    packed = qkv.prepare(ahead=self._coarse(module, qkv, tables), pooled=self.mid_tiles > 0)
    mask = self._mask(packed, qkv, cond, tables)
    mix = self._mix(module, cond, packed.v, qkv, tables)
    if mix.runs is not None:
      mask = _without(mask, mix.runs, tables.level_of_tile)
    out, _ = attention(*packed[:3], mask, implementation=qkv.implementation)
    return self._lifted(out, mix.weights, tables), state, self._aux(mix, mask, qkv, cond, tables)

  def _mask(self, packed: Prepared, qkv: Projected, cond, tables) -> BlockMask:
    """Returns the table of all levels, mid tiles included."""
    if not self.mid_tiles:
      return deal_out(tables.mask, qkv.q.shape[2])
    own = block_topk(
      cond.share(packed.q_pool),
      cond.share(packed.k_pool),
      tables.window.max_kv + self.mid_tiles,
      tables.window.indices()[0, 0],
      qkv.layout,
      qkv.other_ops_implementation,
    )
    return side_by_side([*tables.coarse, own])

  def _coarse(self, module, qkv: Projected, tables) -> tuple | None:
    """Returns q, k and v of the coarse levels, the coarsest first: normed after compression."""
    if self.levels == 1:
      return None
    raw = qkv.product  # [b, n, 3, h, d]: merged, 3 and h could not be split over devices by heads
    d = raw.shape[-1]
    found = []
    for level, step in enumerate(tables.steps):
      raw = step.compress(raw)
      if level == 0:  # compression keeps constants: the bias may come after it
        raw += qkv.bias.astype(raw.dtype)
      q, k, v = jnp.unstack(raw, axis=2)
      theta = level_theta(qkv.theta, tables.widths[level + 1], d, qkv.shares)
      angles = angle_tables(step.coarse.positions, d, theta, qkv.shares)
      q_gain, k_gain = qkv.gains
      q_gain = q_gain * module.q_gain[...][level, :, None]
      k_gain = k_gain * module.k_gain[...][level, :, None]
      q = norm_and_turn(q, q_gain, angles, qkv.over_heads)
      k = norm_and_turn(k, k_gain, angles, qkv.over_heads)
      found.append((q, k, v))
    return tuple(jnp.concatenate(parts, 1) for parts in zip(*found[::-1], strict=True))

  @jax.named_scope("router")
  def _mix(self, module, cond, values, qkv, tables) -> "Mix":
    """Returns the levels' weights. Of content the router sees each level's energy, if anything."""
    stats = None
    if self.router.statistics:
      valid = [*(step.coarse.valid for step in tables.steps[::-1]), qkv.layout.valid]
      stats = _energies(jax.lax.stop_gradient(values), valid, tables.edges)
    logits = cond.share(module.router.logits(cond.embedding, cond.time, stats))
    may_run = jnp.broadcast_to(self._may_run(cond, tables), logits.shape)
    if self.until:  # weights of the levels that may run sum to one
      logits = jnp.where(may_run, logits, -jnp.inf)
    router = with_numbers(self.router, tables.router)
    probs = checkpoint_name(probabilities(logits, router, cond.progress), "routing")
    hot = jax.nn.one_hot(probs.argmax(-1), self.levels)
    limited = may_run if self.until else None
    if self.router.mode == "straight_through" and not cond.soft_evaluation:
      kept = hot > 0
      if cond.train:
        return Mix(probs, hot + probs - jax.lax.stop_gradient(probs), kept, limited)
      return Mix(probs, hot, kept, kept)
    kept = may_run & ((probs >= tables.threshold) | (hot > 0))
    leaves_out = self.threshold and (not cond.train or self.threshold_from < 1)
    if cond.soft_evaluation or not leaves_out:
      return Mix(probs, probs, kept, limited)
    runs = kept
    if cond.train:
      runs = kept | (may_run & (cond.progress < tables.threshold_from))
    weights = jnp.where(runs, probs, 0)
    if self.router.mode != "gates":  # a gate has its own share of the output
      weights /= weights.sum(-1, keepdims=True)
    return Mix(probs, weights, kept, runs)

  def _may_run(self, cond, tables) -> jax.Array:
    """Returns the levels that `until` lets run in this call, bool `[b, 1, levels]`."""
    found = cond.time[:, None, None] <= tables.until
    if self.until_share == 1 or not (cond.train or cond.soft_evaluation):
      return found
    # A sample's draw is the further digits of its t: layers have keys of their own, and must agree.
    drawn = (cond.time * 4096) % 1 < tables.until_share
    every = ~drawn | cond.soft_evaluation
    return found | every[:, None, None]

  def _lifted(self, out, weights, tables) -> jax.Array:
    """Returns the levels' weighted sum at every token, `[b, n_buffer, h, d]`."""
    weights = weights.astype(out.dtype)[:, None, :, :, None]
    total = None
    for level in reversed(range(self.levels)):
      place = self.levels - 1 - level
      rows = out[:, tables.edges[place] : tables.edges[place + 1]] * weights[..., level, :]
      total = rows if total is None else tables.steps[level].lift(total) + rows
    return total

  def _aux(self, mix: "Mix", mask, qkv, cond, tables) -> dict:
    """Returns the layer's aux; `kept` `[b, h, levels]` are the levels that evaluation runs."""
    b, h, _ = mix.probs.shape
    density = mask_density(mask, qkv.layout.n, b, h)
    # The gradient is that of the weights: a level's weight falls until it is left out.
    kept = mix.kept + mix.probs - jax.lax.stop_gradient(mix.probs)
    expected = (kept * tables.density).sum(-1)
    router = tables.router
    over = jnp.maximum(0, expected.mean() / router["budget"] - 1)
    return {
      "density": density,
      "cost": density.mean(),
      "loss": router["penalty"] * over if cond.train else jnp.float32(0),
      "probs": mix.probs,
      "choice": mix.probs.argmax(-1).astype(jnp.int32),
      "kept": mix.kept,
      "expected_density": expected,
      "entropy": entropy(mix.probs),
      **mask_aux(mask, cond.want_masks),
    }

  # ---- counting

  def shares(self, heads: int, allocation=None) -> np.ndarray:
    """Returns the share of heads that run each level, `[levels]`.

    Unless it is given, it is the part of all t at which the level runs: the mean over even t.

    Raises:
      ConfigError: unless there is one share in [0, 1] per level.
    """
    if allocation is None:
      return np.array(self.until or (1.0,) * self.levels)
    shares = np.asarray(allocation, np.float64)
    if shares.shape != (self.levels,) or not ((shares >= 0) & (shares <= 1)).all():
      raise ConfigError(f"{allocation=} must be {self.levels} shares of heads, each in [0, 1].")
    return shares

  def pairs(self, layout, heads, allocation=None, phase=None):
    """Counts the levels that run: `allocation` is the share of heads that run each level."""
    shares = self.shares(heads, allocation)
    calls = self._count_levels(layout, heads)
    total = sum(
      (call.scaled(heads * share) for call, share in zip(calls[1:], shares[1:], strict=True)),
      calls[0].scaled(heads * shares[0]),
    )
    tiles = sum(level.tiles for level in self._layouts(layout))
    return dataclasses.replace(total, rows=float(heads * tiles))

  def _layouts(self, layout: TileLayout) -> tuple[TileLayout, ...]:
    """Returns the layout of every level, the finest first."""
    return level_layouts(layout, self.levels, self.basis, self.factor)

  def _count_levels(self, layout: TileLayout, heads: int) -> list[CallCost]:
    """Counts a head of each level alone, the finest first, at head dimension 1."""
    layouts = self._layouts(layout)
    calls = []
    before = 0  # tiles of coarser levels
    for number, level in reversed(list(enumerate(layouts))):
      coarsest = number == self.levels - 1
      window = level.tile_grid if coarsest else self.window
      border = "clamp" if coarsest else self.border
      call = count_window(level, window, border, before=before, deal=self.deal, heads=heads)
      if self.mid_tiles and number == 0:
        listed = min(math.prod(map(min, window, level.tile_grid)) + self.mid_tiles, level.tiles)
        call = uniform(level.tiles, listed, level.tiles, 1, block=level.block, fill=level.fill)
        call = dataclasses.replace(call, pairs=level.n * listed * level.n / level.tiles)
      calls.append(call)
      before += level.tiles
    return calls[::-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mix:
  """Weights of the levels, `[b, h, levels]` each, the finest level first.

  Attributes:
    probs: of the softmax.
    weights: factors of the levels' outputs.
    kept: whether evaluation runs a level.
    runs: whether this call does; None if it runs all of them.
  """

  probs: jax.Array
  weights: jax.Array
  kept: jax.Array
  runs: jax.Array | None = None


class OctavesModules(nnx.Module):
  """The method's parameters.

  Attributes:
    q_gain, k_gain: `[levels - 1, heads]`, gains of the coarse levels on top of the layer's norms.
  """

  def __init__(self, method: Octaves, dims, rngs):
    levels = method.levels
    self.q_gain = nnx.Param(jnp.ones((levels - 1, dims.heads)))
    self.k_gain = nnx.Param(jnp.ones((levels - 1, dims.heads)))
    self.router = SpectralRouter(
      method.router, dims.heads, dims.cond_dim, levels, rngs, np.linspace(-0.5, 0.5, levels)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OctavesTables:
  """Static tables of one grid. Buffers hold the levels from coarse to fine.

  Attributes:
    steps: between levels, the finest first.
    mask: of the whole buffer.
    coarse: tables of the coarse levels alone, the coarsest first.
    window: table of level 0 alone.
    level_of_tile: int32 `[tiles]`, of the whole buffer.
    density: float32 `[levels]`, pairs of each level over n^2, the finest first.
    threshold, threshold_from: those of the method.
    until, until_share: those of the method; `[levels]` and a scalar, float32.
    router: `numbers` of the router.
    widths: static; tokens of a cell per level and axis.
    edges: static; first row of each level in the buffer and the row behind the last, coarse first.
  """

  steps: tuple[Step, ...]
  mask: BlockMask
  coarse: list[BlockMask]
  window: BlockMask
  level_of_tile: np.ndarray
  density: np.ndarray
  threshold: np.ndarray
  threshold_from: np.ndarray
  until: np.ndarray
  until_share: np.ndarray
  router: dict
  widths: tuple = dataclasses.field(metadata={"static": True})
  edges: tuple = dataclasses.field(metadata={"static": True})


def _without(mask: BlockMask, kept, level_of_tile) -> BlockMask:
  """Returns the table with empty lists where a head does not keep a tile's level."""
  b, h, _ = kept.shape
  counts = jnp.where(kept[..., level_of_tile], mask.kv_counts, 0)
  ids = jnp.broadcast_to(mask.indices(), (b, h, *mask.indices().shape[2:]))
  return BlockMask(ids, counts, mask.kv_len, None, mask.block_q, mask.block_kv)


def _energies(values, valid, edges) -> jax.Array:
  """Returns log fractions of energy by level, float32 `[b, h, levels]`, the finest first.

  Args:
    values: `[b, n, h, d]`, of all levels.
    valid: bool, of each level's rows, the coarsest first.
    edges: as in `OctavesTables`.
  """
  each = []
  for here, (start, stop) in zip(valid, itertools.pairwise(edges), strict=True):
    rows = jnp.where(jnp.asarray(here)[:, None, None], values[:, start:stop], 0)
    each.append(jnp.square(rows.astype(jnp.float32)).sum((1, 3)))
  energy = jnp.stack(each[::-1], -1) + 1e-6
  return jnp.log(energy / energy.sum(-1, keepdims=True))
