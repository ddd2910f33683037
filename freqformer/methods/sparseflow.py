"""SparseFlow: block-sparse attention across frames, linear attention within frames, routed heads.

Implements the abstract of SparseFlow-Attention (Zenodo 19712508): neighbouring and anchor frames, a
temporal budget that depends on the timestep (sparser early in denoising), linear spatial attention,
a head-wise router, soft in training and hard in evaluation. A head on the linear path has count 0
in the whole table, so it pays for no softmax; linear attention writes only its own heads' output.
Where heads are routed, XLA computes it for all (static shapes), the Hopper kernels do not.
"""

# choice: every constant below, and the schedule's form (docs/methods.md).

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.config import numbers, require, require_one_of
from freqformer.grid.layout import LayoutTables, TileLayout
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.cost import count
from freqformer.kernels.block_sparse.table import BlockMask, check_listed, pad_lists
from freqformer.kernels.linear.api import FEATURE_MAPS, Segments, linear_attention
from freqformer.methods.base import mask_aux, mask_density
from freqformer.methods.parts.router import RouterConfig
from freqformer.methods.routed import RoutedMethod
from freqformer.tables.topk import anchor_frames, pool_tiles

SPARSE, LINEAR = range(2)
LINEAR_PART = "linear_heads"  # the named scope of linear attention
DIRECTIONS = ("sparse_early", "dense_early")
SHAPES = ("linear", "cosine", "step")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Number of neighbouring frames that a query sees at time t (1 is noise).

  Attributes:
    frames: layers of tiles at the sparse and at the dense end; every extent between is a level.
    direction: "sparse_early" (the abstract's: few frames at high t) or "dense_early".
    shape: over t, "linear", "cosine" (slow at both ends) or "step" (one jump at t = 1/2).
  """

  frames: tuple[int, int] = (1, 5)
  direction: str = "sparse_early"
  shape: str = "linear"

  def __post_init__(self):
    if not 1 <= self.frames[0] <= self.frames[1]:
      raise ValueError(
        f"schedule {self.frames=} must be (fewest, most) layers of tiles with 1 <= fewest <= most."
      )
    require_one_of(self, "direction", DIRECTIONS)
    require_one_of(self, "shape", SHAPES)

  def extents(self, layers: int) -> tuple[int, ...]:
    """Frames seen per level, ascending, on a grid with this many layers of tiles."""
    return tuple(range(min(self.frames[0], layers), min(self.frames[1], layers) + 1))

  def level(self, time, levels: int) -> jax.Array:
    """Returns the int32 level of each time, 0 the sparsest."""
    u = jnp.clip(1 - time if self.direction == "sparse_early" else time, 0, 1)
    if self.shape == "cosine":
      u = (1 - jnp.cos(jnp.pi * u)) / 2
    elif self.shape == "step":
      u = 1.0 * (u >= 0.5)
    return jnp.round(u * (levels - 1)).astype(jnp.int32)

  def shares(self, levels: int) -> np.ndarray:
    """Share of t in [0, 1] that each level gets, `[levels]`."""
    time = (np.arange(4096, dtype=np.float32) + 0.5) / 4096
    with jax.ensure_compile_time_eval():  # a number of the config, also while a layer is traced
      level = np.asarray(self.level(time, levels))
    return np.bincount(level, minlength=levels) / len(time)


@dataclasses.dataclass(frozen=True)
class SparseFlow(RoutedMethod):
  """Fields of the method in addition to those of `RoutedMethod`; head counts are (sparse, linear).

  Attributes:
    schedule: temporal extent over the timestep.
    around: tiles (y, x) that a query sees of each frame, around its own place.
    anchors: evenly spread frames that every query sees, the first among them.
    feature_map: of the linear path, a name of `kernels.linear.api.FEATURE_MAPS`.
  """

  schedule: Schedule = Schedule()
  around: tuple[int, int] = (3, 3)
  anchors: int = 1
  feature_map: str = "elu"
  router: RouterConfig = RouterConfig(prior=(0.6, 0.4), prior_slope=0.0)

  branches = ("sparse", "linear")
  branch_of_part = {LINEAR_PART: "linear"}

  def __post_init__(self):
    super().__post_init__()
    require(self, "around", least=1)
    require(self, "anchors", least=0)
    require_one_of(self, "feature_map", FEATURE_MAPS)

  def energies(self, v, layout, tables):
    return variance_shares(v, layout)

  def tables(self, layout):
    levels = _levels(self.schedule, self.around, self.anchors, layout)
    return SparseFlowTables(levels, frame_segments(layout), numbers(self.router))

  def __call__(self, module, qkv, cond, tables, state):
    routing = self.route(module, qkv, cond, tables)
    mask = self.mask_at(tables, cond.share(cond.time))
    b, _, h, _ = qkv.q.shape
    q, k = qkv.rotated()
    ran = mask if routing.all_branches else _only(mask, routing.choice == SPARSE)
    out, _ = attention(q, k, qkv.v, ran, implementation=qkv.implementation)
    linear = functools.partial(
      linear_attention,
      q,
      k,
      qkv.v,
      tables.frames,
      feature_map=self.feature_map,
      implementation=qkv.other_ops_implementation,
    )
    linear = jax.named_scope(LINEAR_PART)(linear)
    if routing.all_branches:
      weights = routing.weights.astype(q.dtype)[:, None, :, :, None]
      out = weights[..., SPARSE, :] * out + weights[..., LINEAR, :] * linear()[0]
    else:
      # Either op leaves the other's heads alone.
      if self.routed:
        heads = routing.choice == LINEAR
      else:  # known to tracing
        heads = qkv.in_order(np.repeat([False, True], self.allocation)[None])
      out, _ = linear(heads=heads, into=out)
      if self.routed and cond.train:  # in evaluation all weights are 1
        out = out * routing.weights.sum(-1)[:, None, :, None].astype(out.dtype)
    sparse_density = mask_density(mask, qkv.layout.n, b, h)
    density = jnp.stack([sparse_density, jnp.zeros_like(sparse_density)], -1)
    aux = self.aux(routing, density, qkv, cond, tables)
    return out, state, aux | mask_aux(ran, cond.want_masks)

  def mask_at(self, tables: "SparseFlowTables", time) -> BlockMask:
    """Returns a sparse head's table `[b, 1, tiles, max_kv]` at times `[b]`; one trace for all."""
    level = self.schedule.level(time, tables.levels.kv_counts.shape[0])

    def take(x):
      return jnp.take(jnp.asarray(x), level, axis=0, mode="clip")

    return dataclasses.replace(
      tables.levels,
      kv_indices=take(tables.levels.kv_indices),
      kv_counts=take(tables.levels.kv_counts),
    )

  def pairs(self, layout, heads, allocation=None, phase=None):
    """Counts the levels' tables by their shares of uniform t; linear heads list nothing."""
    sparse = float(self.shares(heads, allocation)[SPARSE])
    levels = _levels(self.schedule, self.around, self.anchors, layout)
    found = []
    for i, share in enumerate(self.schedule.shares(len(levels.kv_counts))):
      one = dataclasses.replace(
        levels, kv_indices=levels.kv_indices[i : i + 1], kv_counts=levels.kv_counts[i : i + 1]
      )
      found.append(count(one, head_dim=1).scaled(heads * sparse * share))
    return functools.reduce(operator.add, found)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseFlowTables:
  """Static tables of one grid.

  Attributes:
    levels: tables of all levels, stacked along the batch axis.
    frames: the frames' rows.
    router: `numbers` of the router.
  """

  levels: BlockMask
  frames: Segments
  router: dict


# ---- tables -------------------------------------------------------------


def temporal(layout: TileLayout, frames: int, around: tuple[int, int], anchors: int) -> BlockMask:
  """Lists for each query tile, of every frame it sees, the tiles around its own place.

  A frame here is a layer of tiles: `layout.tile[0]` frames of tokens. Both windows are shifted
  inwards at the video's edges, so that a query tile always sees `frames x around` tiles, its own
  among them. More frames or tiles than there are mean all.

  Args:
    frames: neighbouring frames, the own one included.
    around: extent in tiles (y, x) of what is seen of a frame.
    anchors: evenly spread frames that every query tile sees; 1 is the first frame alone.
  """
  count_t, count_y, count_x = layout.tile_grid
  y = _window(count_y, around[0])  # [tiles, extent]
  x = _window(count_x, around[1])
  place = (y[:, None, :, None] * count_x + x[None, :, None, :]).reshape(count_y * count_x, -1)
  lists = [np.union1d(row, anchor_frames(count_t, anchors)) for row in _window(count_t, frames)]
  most = max(map(len, lists))
  check_listed(
    layout.tiles * most * place.shape[1], f"a temporal table of {most} frames on {layout.tile_grid}"
  )
  seen = np.stack([np.pad(v, (0, most - len(v)), mode="edge") for v in lists])  # [count_t, most]
  # Frames are the outer dimension of the lists, so that ids ascend.
  ids = seen[:, None, :, None] * (count_y * count_x) + place[None, :, None, :]
  ids = ids.reshape(1, 1, layout.tiles, -1).astype(np.int32)
  counts = np.repeat([len(v) * place.shape[1] for v in lists], count_y * count_x)
  counts = counts.reshape(1, 1, layout.tiles).astype(np.int32)
  return pad_lists(ids, counts, layout.tile_lengths, None, layout.block, layout.block)


def _window(size: int, extent: int) -> np.ndarray:
  """Positions that each position sees along one axis, int `[size, extent]`."""
  extent = min(extent, size)
  start = np.clip(np.arange(size) - extent // 2, 0, size - extent)
  return start[:, None] + np.arange(extent)


@functools.lru_cache(maxsize=16)
def _levels(schedule: Schedule, around, anchors: int, layout: TileLayout) -> BlockMask:
  """Returns the temporal table of every level, stacked along its batch axis."""
  masks = [
    temporal(layout, extent, around, anchors) for extent in schedule.extents(layout.tile_grid[0])
  ]
  longest = max(m.max_kv for m in masks)
  check_listed(
    len(masks) * layout.tiles * longest, f"a schedule of {len(masks)} levels on {layout.tile_grid}"
  )

  def widen(ids):
    return np.pad(ids, ((0, 0),) * 3 + ((0, longest - ids.shape[-1]),), mode="edge")

  return dataclasses.replace(
    masks[0],
    kv_indices=np.concatenate([widen(m.kv_indices) for m in masks]),
    kv_counts=np.concatenate([m.kv_counts for m in masks]),
  )


@functools.lru_cache(maxsize=16)
def frame_segments(layout: TileLayout) -> Segments:
  """Returns the rows of every frame."""
  arrays = layout.arrays()
  return Segments.of_ids(np.where(arrays.valid, arrays.positions[:, 0], -1).astype(np.int32))


def _only(mask: BlockMask, heads) -> BlockMask:
  """Keeps the table of the heads that are True in bool `[b, h]`; the others list nothing."""
  counts = jnp.where(heads[..., None], mask.kv_counts, 0)
  ids = jnp.broadcast_to(mask.kv_indices, (*counts.shape, mask.max_kv))
  return dataclasses.replace(mask, kv_indices=ids, kv_counts=counts)


def variance_shares(x: jax.Array, arrays: LayoutTables) -> jax.Array:
  """Splits the variance of `[b, n_buffer, h, d]` into three parts that sum to it, `[b, h, 3]`.

  Within tiles, over time at one place, between places (law of total variance over tiles): texture,
  motion and structure of a head's values.
  """
  t, y, x_tiles = arrays.layout.tile_grid

  def fold(a):
    return a.reshape(*a.shape[: a.ndim - 2], t, y * x_tiles, a.shape[-1])

  weight = fold(jnp.asarray(arrays.kv_len, jnp.float32)[:, None]) / arrays.n  # [t, places, 1]
  pooled = fold(pool_tiles(x, arrays))  # [b, h, t, places, d]

  def square(a):
    return (a**2 * weight).sum((-3, -2, -1))

  place = (pooled * weight).sum(2, keepdims=True) / weight.sum(0)
  mean = (pooled * weight).sum((2, 3), keepdims=True)
  valid = jnp.asarray(arrays.valid)[:, None, None]
  energy = (jnp.where(valid, x, 0).astype(jnp.float32) ** 2).sum((1, 3)) / arrays.n
  within = jnp.maximum(energy - square(pooled), 0)
  return jnp.stack([within, square(pooled - place), square(place - mean)], -1)
