"""Tile order: the permutation that gives every 3-D box of tokens its own rows of one buffer.

Each box of at most `block` tokens gets `block` rows, its tokens first, padding after: once, at
patchify, undone once, at the end. Everything between, attention kernels too, sees only the buffer.

  arrays = TileLayout.fit(grid=(21, 45, 80), block=128).arrays()  # 3x5x8; an argument of jit
  buffer = arrays.pack(tokens)  # [b, n, ...] -> [b, n_buffer, ...]
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Triple = tuple[int, int, int]
MOST_ROWS = int(np.iinfo(np.int32).max)  # rows of a buffer, because index arrays hold int32

# `fit` considers no box more elongated than this: 21x45x80 would be cut into 7x9x2, 600 tiles
# instead of the 630 of 3x5x8, but a tile's mean key or a window would stretch over 7 frames.
# choice: unmeasured.
_MAX_ELONGATION = 3.0


@dataclasses.dataclass(frozen=True)
class TileLayout:
  """A cut of a token grid into tiles. Static: hashable, no arrays.

  Tiles are in raster order of the tile grid. Inside a tile, tokens are in raster order of its box
  (shorter at the ragged end of an axis) and come first; the rest of the `block` rows is padding.

  Attributes:
    grid: tokens per axis (t, y, x).
    tile: tokens of a full tile per axis (t, y, x), clipped to the grid.
    block: rows of a tile in the buffer.

  Raises:
    ValueError: an extent is not a positive integer, or a tile has more tokens than `block`.
  """

  grid: Triple
  tile: Triple
  block: int

  def __post_init__(self):
    grid = _extents("grid", self.grid)
    tile = tuple(min(e, l) for e, l in zip(_extents("tile", self.tile), grid, strict=True))
    block = _positive("block", self.block)
    object.__setattr__(self, "grid", grid)
    object.__setattr__(self, "tile", tile)
    object.__setattr__(self, "block", block)
    if math.prod(tile) > block:
      raise ValueError(
        f"{tile=} has {math.prod(tile)} tokens, but a tile has only {block=} rows: choose smaller "
        "extents, a larger block, or let TileLayout.fit choose"
      )
    if self.n_buffer > MOST_ROWS:
      raise ValueError(
        f"{grid=} in tiles of {block} rows needs {self.n_buffer:,} rows, more than the "
        f"{MOST_ROWS:,} that an int32 index reaches: use a smaller grid"
      )

  @classmethod
  def fit(cls, grid: Sequence[int], block: int, tile: Sequence[int] | None = None) -> TileLayout:
    """Returns the layout with the fewest tiles (the least padding), ties by the smallest surface.

    Only boxes at most three times as long as wide are considered; an axis that one tile covers
    whole cannot be wider and does not count. Of extents that need equally many tiles, only the
    shortest is tried: 9 tokens are 5 + 4, not 8 + 1.

    Args:
      tile: extents to use instead of searching.
    """
    grid = _extents("grid", grid)
    block = _positive("block", block)
    if tile is not None:
      return cls(grid, tuple(tile), block)

    def cost(extents):
      a, b, c = extents
      tiles = math.prod(_ceil_div(l, e) for l, e in zip(grid, extents, strict=True))
      return tiles, a * b + b * c + c * a, extents

    return cls(grid, min(_compact_boxes(grid, block), key=cost), block)

  @property
  def n(self) -> int:
    """Tokens."""
    return math.prod(self.grid)

  @property
  def tile_grid(self) -> Triple:
    """Tiles per axis."""
    return tuple(_ceil_div(l, e) for l, e in zip(self.grid, self.tile, strict=True))

  @property
  def tiles(self) -> int:
    """Number of tiles."""
    return math.prod(self.tile_grid)

  @property
  def n_buffer(self) -> int:
    """Rows of the buffer."""
    return self.tiles * self.block

  @property
  def fill(self) -> float:
    """Share of the buffer's rows that hold a token."""
    return self.n / self.n_buffer

  @property
  def lengths(self) -> tuple[tuple[int, ...], ...]:
    """Tokens of each tile along each axis: the tile's extent, in the last one perhaps fewer."""
    return tuple(
      tuple(min(e, l - start) for start in range(0, l, e))
      for l, e in zip(self.grid, self.tile, strict=True)
    )

  @property
  def tile_lengths(self) -> np.ndarray:
    """Tokens of each tile, int32 `[tiles]`."""
    return math.prod(np.ix_(*(np.asarray(v, np.int32) for v in self.lengths))).reshape(-1)

  @property
  def even(self) -> bool:
    """True if every tile is full and has no padding."""
    full = all(l % e == 0 for l, e in zip(self.grid, self.tile, strict=True))
    return full and math.prod(self.tile) == self.block

  def arrays(self) -> LayoutTables:
    """Returns the index arrays, in NumPy, computed once per layout."""
    return _index_arrays(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LayoutTables:
  """Index arrays of a layout: NumPy until passed to jit (as an argument, never closed over).

  Attributes:
    gather: int32 `[n_buffer]`, each row's raster token; in padding rows their tile's first.
    scatter: int32 `[n]`, the buffer row of each raster token.
    kv_len: int32 `[tiles]`, tokens of each tile.
    positions: float32 `[n_buffer, 3]`, (t, y, x) of each row; padding rows 0.
    valid: bool `[n_buffer]`, False in padding rows.
  """

  gather: jax.Array | np.ndarray
  scatter: jax.Array | np.ndarray
  kv_len: jax.Array | np.ndarray
  positions: jax.Array | np.ndarray
  valid: jax.Array | np.ndarray
  layout: TileLayout = dataclasses.field(metadata={"static": True})

  @property
  def n(self) -> int:
    """Tokens."""
    return self.layout.n

  @property
  def tiles(self) -> int:
    """Number of tiles."""
    return self.layout.tiles

  @property
  def block(self) -> int:
    """Rows of a tile in the buffer."""
    return self.layout.block

  def pack(self, x: jax.Array) -> jax.Array:
    """Raster order to tile order: `[b, n, ...]` -> `[b, n_buffer, ...]`, padding rows zero."""
    check_rows("pack", x, self.layout.n, f"the tokens of grid={self.layout.grid}")
    if self.layout.even:  # no gather, whose gradient would be a scatter
      boxes = [
        s for pair in zip(self.layout.tile_grid, self.layout.tile, strict=True) for s in pair
      ]
      return _swap_boxes(x, boxes, (0, 2, 4, 1, 3, 5))
    valid = jnp.expand_dims(self.valid, range(1, x.ndim - 1))
    # A gather and a select: on every backend cheaper than a scatter into zeros.
    return jnp.where(valid, jnp.take(x, self.gather, axis=1, mode="clip"), jnp.zeros((), x.dtype))

  def unpack(self, x: jax.Array) -> jax.Array:
    """Tile order to raster order: `[b, n_buffer, ...]` -> `[b, n, ...]`; padding is not read."""
    check_rows("unpack", x, self.layout.n_buffer, f"the buffer rows of {self.layout}")
    if self.layout.even:
      return _swap_boxes(x, (*self.layout.tile_grid, *self.layout.tile), (0, 3, 1, 4, 2, 5))
    return jnp.take(x, self.scatter, axis=1, mode="clip", unique_indices=True)


def _swap_boxes(x: jax.Array, sizes: Sequence[int], order: tuple[int, ...]) -> jax.Array:
  """Reads the rows as six axes of tiles and places in them, permutes these, and joins them again.

  The first one stays where it is and goes with the batch: XLA's CPU backend takes 12 seconds to
  compile a transposition of eight axes, and none for seven.
  """
  b, n, *rest = x.shape
  x = x.reshape(b * sizes[0], *sizes[1:], *rest)
  x = x.transpose(*order, *range(6, x.ndim))
  return x.reshape(b, n, *rest)


def check_rows(name: str, x: jax.Array, rows: int, meaning: str):
  """Raises ValueError unless x is `[b, rows, ...]`."""
  if x.ndim < 2 or x.shape[1] != rows:
    raise ValueError(
      f"{name} got shape {x.shape}, but takes [b, {rows}, ...]: axis 1 holds {meaning}"
    )


@functools.lru_cache(maxsize=32)
def _index_arrays(layout: TileLayout) -> LayoutTables:
  axes = [np.asarray(lengths, np.int32) for lengths in layout.lengths]
  # Of each coordinate along an axis: its tile, its place in that tile, and the tile's length.
  tile_t, tile_y, tile_x = np.ix_(*(np.repeat(np.arange(len(v), dtype=np.int32), v) for v in axes))
  in_t, in_y, in_x = np.ix_(
    *(np.concatenate([np.arange(e, dtype=np.int32) for e in v]) for v in axes)
  )
  _, len_y, len_x = np.ix_(*(np.repeat(v, v) for v in axes))
  _, tiles_y, tiles_x = layout.tile_grid
  tile_id = (tile_t * tiles_y + tile_y) * tiles_x + tile_x
  row = (in_t * len_y + in_y) * len_x + in_x
  scatter = (tile_id * layout.block + row).reshape(-1)

  token = np.arange(layout.n, dtype=np.int32)
  gather = np.zeros(layout.n_buffer, np.int32)
  valid = np.zeros(layout.n_buffer, bool)
  positions = np.zeros((layout.n_buffer, 3), np.float32)
  gather[scatter] = token
  valid[scatter] = True
  positions[scatter] = np.stack(np.unravel_index(token, layout.grid), axis=-1)
  first = gather.reshape(layout.tiles, layout.block)[:, :1]  # row 0 of a tile always holds a token
  gather = np.where(valid, gather, np.repeat(first, layout.block, axis=1).reshape(-1))

  arrays = dict(
    gather=gather, scatter=scatter, kv_len=layout.tile_lengths, positions=positions, valid=valid
  )
  for array in arrays.values():
    array.setflags(write=False)  # shared by every caller through the cache
  return LayoutTables(**arrays, layout=layout)


def _compact_boxes(grid: Triple, block: int):
  """Yields boxes of at most `block` tokens and bounded elongation, (1, 1, 1) among them."""
  axes = [
    sorted({_ceil_div(l, _ceil_div(l, e)) for e in range(1, min(l, block) + 1)}) for l in grid
  ]
  for a in axes[0]:
    for b in axes[1]:
      if a * b > block:
        break
      for c in axes[2]:
        if a * b * c > block:
          break
        extents = (a, b, c)
        narrowest = min(
          (e for e, l in zip(extents, grid, strict=True) if e < l), default=max(extents)
        )
        if max(extents) <= _MAX_ELONGATION * narrowest:
          yield extents


def _ceil_div(a: int, b: int) -> int:
  return -(-a // b)


def _positive(name: str, value) -> int:
  """Returns `value` as an int; raises ValueError unless it is a positive integer."""
  try:
    result = operator.index(value)
  except TypeError:
    result = 0
  if result < 1:
    raise ValueError(f"{name}={value!r} is not allowed: give a positive integer number of tokens")
  return result


def _extents(name: str, value) -> Triple:
  """Returns `value` as three positive ints; raises ValueError if it is anything else."""
  if not isinstance(value, Sequence) or len(value) != 3:
    raise ValueError(f"{name}={value!r} is not allowed: give three token extents (t, y, x)")
  return tuple(_positive(name, v) for v in value)
