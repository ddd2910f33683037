"""A 3-D window moved tile by tile, so that no block is mixed (STA, arXiv 2502.04507)."""

import functools
import math

import numpy as np
from absl import logging

from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.cost import CallCost
from freqformer.kernels.block_sparse.table import BlockMask, check_listed, pad_lists
from freqformer.tables.counting import axis_lengths, count_tiles

BORDERS = ("clamp", "clip")


def sliding_tile(
  layout: TileLayout, window: tuple[int, int, int], border: str = "clamp"
) -> BlockMask:
  """Returns the table in which each query tile lists the tiles of a box around it.

  Args:
    window: extent of the box in tiles per axis; larger than the grid means the whole axis.
    border: "clamp" shifts the box inwards, so that every query tile lists equally many (STA's
      choice); "clip" cuts it off, so that border tiles list fewer.

  Raises:
    ValueError: for an unknown border, a window below one tile, or more tiles than a table may list.
  """
  extent = _extent(layout, window, border)
  check_listed(
    layout.tiles * math.prod(extent), f"a window of {extent} tiles on {layout.tile_grid}"
  )
  # A clipped window may be wider than the grid: cut to it, an even one would lean to one side.
  ids = np.zeros((1,) * 6, np.int32)
  inside = np.ones((1,) * 6, bool)
  for axis, (w, grid) in enumerate(zip(extent, layout.tile_grid, strict=True)):
    # A query's place along this axis is dimension `axis`, a key's place in the window `axis + 3`.
    others = [i for i in range(6) if i not in (axis, axis + 3)]
    position, exists = (np.expand_dims(a, others) for a in _axis(w, grid, border))
    ids = ids * grid + position
    inside = inside & exists
  ids = ids.astype(np.int32).reshape(layout.tiles, -1)
  inside = inside.reshape(layout.tiles, -1)
  if not inside.all():  # the listed ones first, still ascending
    ids = np.take_along_axis(ids, np.argsort(~inside, axis=-1, stable=True), -1)
  counts = inside.sum(-1).astype(np.int32)[None, None]
  ids = ids[None, None, :, : counts.max()]
  return pad_lists(ids, counts, layout.tile_lengths, None, layout.block, layout.block)


def count_window(
  layout: TileLayout,
  window: tuple[int, int, int],
  border: str = "clamp",
  parts: int = 1,
  before: int = 0,
) -> CallCost:
  """Counts of `sliding_tile(...).refine(parts)` at head dimension 1, `before` empty rows first."""
  extent = _extent(layout, window, border)
  ranges = []  # per axis: the first position that each one sees, and the one behind the last
  for w, grid in zip(extent, layout.tile_grid, strict=True):
    position, inside = _axis(w, grid, border)
    ranges.append(
      (np.where(inside, position, grid).min(1), np.where(inside, position, -1).max(1) + 1)
    )
  sums = [np.concatenate([[0], np.cumsum(lengths)]) for lengths in axis_lengths(layout)]
  counts = math.prod(np.ix_(*(stop - start for start, stop in ranges)))
  keys = math.prod(
    np.ix_(*(s[stop] - s[start] for s, (start, stop) in zip(sums, ranges, strict=True)))
  )
  (t0, t1), (y0, y1), (x0, x1) = ranges

  def mark(seen, t, y, first, stop):
    seen[t0[t] : t1[t], y0[y] : y1[y], x0[first] : x1[stop - 1]] = (
      True  # windows of neighbours meet
    )

  return count_tiles(layout, counts, keys, mark, parts=parts, before=before)


def _extent(layout, window, border) -> tuple[int, int, int]:
  """Returns the window, cut to what covers the grid from everywhere; raises ValueError if wrong."""
  if border not in BORDERS:
    raise ValueError(f"{border=} is unknown; choose one of {', '.join(BORDERS)}.")
  if len(window) != 3 or min(window) < 1:
    raise ValueError(f"{window=} must be three tile counts (t, y, x) of at least 1.")
  if any(w > g for w, g in zip(window, layout.tile_grid, strict=True)):
    _log_whole_axis(tuple(window), layout.tile_grid)
  whole = (g if border == "clamp" else 2 * g - 1 for g in layout.tile_grid)
  return tuple(map(min, window, whole))


def _axis(window: int, grid: int, border: str) -> tuple[np.ndarray, np.ndarray]:
  """Tile positions `[grid, window]` along one axis, and which of them exist."""
  start = np.arange(grid) - window // 2
  if border == "clamp":
    start = np.clip(start, 0, grid - window)
  position = start[:, None] + np.arange(window)
  return np.clip(position, 0, grid - 1), (position >= 0) & (position < grid)


@functools.cache
def _log_whole_axis(window, tile_grid):
  logging.info(
    "window of %s tiles is larger than the tile grid %s: it covers those axes whole",
    window,
    tile_grid,
  )
