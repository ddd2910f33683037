"""Attention calls that the GPU benchmark times: named shapes with random or method-made tables."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.table import BlockMask, dense_mask, select

from benchmarks.arg_specs import AttentionSpec
from freqformer.grid.layout import TileLayout
from freqformer.tables.packed import coarse_rows, full_rows, packed_kv_len
from freqformer.tables.window import sliding_tile

# Tiles of the 3-D window, and kernel tiles in one of them.
WINDOW_EXTENT = (3, 3, 3)
WINDOW_REFINE = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
  """One attention call.

  Attributes:
    mask: the table, in NumPy; its tiles say how many rows the buffer has.
    heads: heads of this call; the spec's unless it is a part of them.
  """

  spec: AttentionSpec
  mask: BlockMask
  heads: int = 0

  def __post_init__(self):
    object.__setattr__(self, "heads", self.heads or self.spec.heads)

  @property
  def rows(self) -> int:
    """Rows of the buffer."""
    return self.mask.q_tiles * self.mask.block_q

  def inputs(self, count: int = 3) -> list[jax.Array]:
    """Returns `count` normal arrays `[batch, rows, heads, head_dim]`.

    They are never zeros, on which tensor cores run faster.
    """
    shape = (self.spec.batch, self.rows, self.heads, self.spec.head_dim)
    keys = jax.random.split(jax.random.key(0), count)
    return [jax.random.normal(key, shape, jnp.dtype(self.spec.dtype)) for key in keys]

  @functools.cached_property
  def pairs(self) -> int:
    """Scored valid pairs of all samples and heads, exact."""
    mask = self.mask
    calls = self.spec.batch * self.heads
    if mask.kv_indices is None and (mask.kv_counts == mask.kv_tiles).all():
      if mask.kv_len.ndim == 1:
        return int(mask.q_len().sum()) * int(mask.kv_len.sum()) * calls
    pairs = mask.pairs()
    return int(pairs.sum()) * calls // pairs.size

  @property
  def density(self) -> float:
    """Scored valid pairs / n^2, mean over samples and heads; n counts the video's tokens."""
    return self.pairs / (self.spec.batch * self.heads * float(self.spec.n) ** 2)


def on_device(mask: BlockMask) -> BlockMask:
  """Returns the table with its arrays on the device, so that a timed call does not copy it."""
  return jax.tree.map(jnp.asarray, mask)


def random_ids(
  heads: int, tiles: tuple[int, int], keep: int, seed: int = 0, ordered: bool = True
) -> np.ndarray:
  """Draws distinct key tiles for every query tile, its own (at the same place) among them.

  Args:
    tiles: `(q_tiles, kv_tiles)`.
    keep: tiles per list, at most `kv_tiles`.
    ordered: True for ascending lists, as tables must be; False leaves each list in random order,
      whose cost is a row of its own.

  Returns:
    int32 `[1, heads, q_tiles, keep]`; lists differ from head to head.
  """
  q_tiles, kv_tiles = tiles

  @jax.jit
  def draw(key):
    score = jax.random.uniform(key, (q_tiles, kv_tiles))
    own = (jnp.arange(q_tiles) * kv_tiles // q_tiles)[:, None]
    score = jnp.where(jnp.arange(kv_tiles) == own, 2.0, score)
    ids = jax.lax.top_k(score, keep)[1]
    # One more shuffle: by score, a list would always begin with its own tile.
    shuffle = jax.random.fold_in(key, 1)
    ids = jax.random.permutation(shuffle, ids, axis=1, independent=True)
    return (jnp.sort(ids, axis=-1) if ordered else ids).astype(jnp.int32)

  # Head by head: all heads' scores at 1M tokens would be 3 GB.
  keys = jax.random.split(jax.random.key(seed), heads)
  return np.stack([np.asarray(draw(key)) for key in keys])[None]


def full_lists(ids: np.ndarray, kv_len: np.ndarray, block_q: int, block_kv: int) -> BlockMask:
  """Returns the table whose lists are all as long as `ids [1, heads, q_tiles, keep]` is wide."""
  counts = np.full(ids.shape[:3], ids.shape[-1], np.int32)
  return BlockMask(ids, counts, kv_len, None, block_q, block_kv)


def _random_table(spec: AttentionSpec, heads: int, keep: int, ordered: bool = True) -> BlockMask:
  """Returns random lists of `keep` tiles over the spec's own layout."""
  tiles = spec.layout.tiles
  ids = random_ids(heads, (tiles, tiles), keep, ordered=ordered)
  return full_lists(ids, spec.layout.arrays().kv_len, spec.block, spec.block)


def dense(spec: AttentionSpec) -> Problem:
  """Dense mode: no lists are read; padding rows are hidden where the grid is ragged."""
  layout = spec.layout
  mask = dense_mask(layout.n_buffer, layout.n_buffer, spec.block, spec.block)
  return Problem(spec, dataclasses.replace(mask, kv_len=layout.arrays().kv_len))


def random_lists(spec: AttentionSpec, density: float, ordered: bool = True) -> Problem:
  """Random lists of a given density."""
  keep = max(1, round(spec.layout.tiles * density))
  return Problem(spec, _random_table(spec, spec.heads, keep, ordered))


def rectangular(spec: AttentionSpec, block_q: int, block_kv: int, density: float) -> Problem:
  """Random lists where query and key tiles differ in size; the grid must fill its tiles."""
  q_tiles = spec.n // block_q
  kv_tiles = spec.n // block_kv
  ids = random_ids(spec.heads, (q_tiles, kv_tiles), max(1, round(kv_tiles * density)))
  kv_len = np.full(kv_tiles, block_kv, np.int32)
  return Problem(spec, full_lists(ids, kv_len, block_q, block_kv))


def window(spec: AttentionSpec, tile: tuple[int, int, int]) -> Problem:
  """A clamped 3-D window of whole tiles, which are refined to the kernel's."""
  layout = TileLayout.fit(spec.grid, spec.block * WINDOW_REFINE, tile)
  return Problem(spec, sliding_tile(layout, WINDOW_EXTENT).refine(WINDOW_REFINE))


@dataclasses.dataclass(frozen=True)
class Composition:
  """FreqFormer's heads dealt by hand: a quarter low, half mid, a quarter high.

  Attributes:
    mid_density: density of a mid head's random lists; 0: as many keys as the window has.
    ratio: compression of the low band per axis.
    window, deal: of the high band, in tiles; 2x4x4 tiles of 128 are 4,096 keys. Not centred, but
      the same lists in all heads: speed does not depend on which side they reach.
  """

  mid_density: float = 0.05
  ratio: tuple[int, int, int] = (4, 4, 4)
  window: tuple[int, int, int] = (2, 4, 4)
  deal: str = "as_is"

  def heads(self, spec: AttentionSpec) -> tuple[int, int, int]:
    """Heads per band (low, mid, high)."""
    low = max(1, spec.heads // 4)
    return low, spec.heads - 2 * low, low

  def mid_tiles(self, spec: AttentionSpec) -> int:
    """Tiles of a mid list."""
    tiles = spec.layout.tiles
    wanted = round(tiles * self.mid_density) if self.mid_density else math.prod(self.window)
    return max(1, min(tiles, wanted))

  def n_coarse(self, spec: AttentionSpec) -> int:
    """Coarse tokens."""
    return math.prod(-(-l // r) for l, r in zip(spec.grid, self.ratio, strict=True))


def fused(spec: AttentionSpec, of: Composition) -> Problem:
  """All bands in one call over the packed buffer `[coarse tokens | full tokens]`.

  There are no summary keys: they run outside the call.
  """
  layout = spec.layout
  coarse_tiles = -(-of.n_coarse(spec) // spec.block)
  kv_len = packed_kv_len(of.n_coarse(spec), layout.arrays().kv_len, spec.block)
  mid = _random_table(spec, spec.heads, of.mid_tiles(spec))
  masks = (
    coarse_rows(kv_len, coarse_tiles, spec.block),
    full_rows(mid, kv_len, coarse_tiles),
    full_rows(sliding_tile(layout, of.window, deal=of.deal), kv_len, coarse_tiles),
  )
  choice = np.repeat(np.arange(3, dtype=np.int32), of.heads(spec))[None]
  return Problem(spec, select(masks, choice))


def separate(spec: AttentionSpec, of: Composition) -> list[Problem]:
  """The same work as three calls, one per band, each with inputs of its own.

  Nothing is packed or sliced for them, and they have no empty rows.
  """
  low, mid, high = of.heads(spec)
  rows = -(-of.n_coarse(spec) // spec.block) * spec.block
  coarse = dense_mask(rows, rows, spec.block, spec.block)
  kv_len = packed_kv_len(of.n_coarse(spec), np.zeros(0, np.int32), spec.block)
  lists = _random_table(spec, mid, of.mid_tiles(spec))
  return [
    Problem(spec, dataclasses.replace(coarse, kv_len=kv_len), low),
    Problem(spec, lists, mid),
    Problem(spec, sliding_tile(spec.layout, of.window, deal=of.deal), high),
  ]
