"""A 3-D window moved tile by tile, so that no block is mixed (STA, arXiv 2502.04507)."""

import collections
import dataclasses
import functools
import itertools
import math
import operator

import jax
import numpy as np
from absl import logging

from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.cost import CallCost
from freqformer.kernels.block_sparse.table import BlockMask, check_listed, pad_lists
from freqformer.tables.counting import axis_lengths, count_tiles

BORDERS = ("clamp", "clip")
DEALS = ("centred", "octant", "as_is")


def sliding_tile(
  layout: TileLayout, window: tuple[int, int, int], border: str = "clamp", deal: str = "centred"
) -> BlockMask:
  """Returns the table in which each query tile lists the tiles of a box around it.

  Args:
    window: extent of the box in tiles per axis; larger than the grid means the whole axis.
    border: "clamp" shifts the box inwards, so that every query tile lists equally many (STA's
      choice); "clip" cuts it off, so that border tiles list fewer.
    deal: what an even extent means that does not cover its axis, where a box cannot be centred.
      "centred" refuses it. "octant" makes a table per side: with w tiles, w / 2 before the query
      tile and w / 2 - 1 behind it, or the other way round; all sides together see w + 1. `deal_out`
      gives them to heads. "as_is" has more tiles before the query tile in every head: half of the
      neighbours at most are seen where w = 2. It is for checkpoints that were trained so.

  Returns:
    A table with one head, or with one per side: 2, 4 or 8 for 1, 2 or 3 such axes.

  Raises:
    ValueError: for an unknown border or deal, a window below one tile, an extent that "centred"
      refuses, or more tiles than a table may list.
  """
  extent = _extent(layout, window, border, deal)
  sides = _sides(layout, extent, border, deal)
  check_listed(
    layout.tiles * math.prod(extent) * len(sides),
    f"a window of {extent} tiles on {layout.tile_grid}",
  )
  lists = [_lists(layout, extent, border, side) for side in sides]
  counts = np.stack([counts for _, counts in lists], 1)
  ids = np.stack([ids for ids, _ in lists], 1)[..., : counts.max()]
  return pad_lists(ids, counts, layout.tile_lengths, None, layout.block, layout.block)


def deal_out(mask: BlockMask, heads: int, order: np.ndarray | None = None) -> BlockMask:
  """Returns a table of several sides for `heads` heads: head h gets side h modulo their number.

  A table of one side serves all heads as it is.

  Args:
    order: int `[heads]`, numbers of the heads, where they are not in order.

  Raises:
    ValueError: there are fewer heads than sides, so that some side would be seen by none.
  """
  sides = mask.kv_counts.shape[1]
  _check_heads(sides, heads)
  if sides == 1 or (sides == heads and order is None):
    return mask
  mask = mask.without_order()
  side = (np.arange(heads) if order is None else order) % sides
  parts = (mask.kv_indices, mask.kv_counts, mask.transposed, mask.launch)
  ids, counts, transposed, launch = jax.tree.map(lambda x: x[:, side], parts)
  return dataclasses.replace(
    mask, kv_indices=ids, kv_counts=counts, transposed=transposed, launch=launch
  )


@functools.lru_cache(maxsize=64)
def count_window(
  layout: TileLayout,
  window: tuple[int, int, int],
  border: str = "clamp",
  parts: int = 1,
  before: int = 0,
  *,
  deal: str = "centred",
  heads: int | None = None,
  first: int = 0,
) -> CallCost:
  """Counts a head of `sliding_tile(...).refine(parts)` at head dimension 1, without the table.

  Args:
    before: empty rows that come first.
    heads: to which the sides are dealt; None: one for each side.
    first: the count is the average over the heads `first` to `heads - 1`.

  Raises:
    ValueError: as `sliding_tile` and `deal_out` do.
  """
  extent = _extent(layout, window, border, deal)
  sides = _sides(layout, extent, border, deal)
  heads = len(sides) if heads is None else heads
  _check_heads(len(sides), heads)
  dealt = collections.Counter(head % len(sides) for head in range(first, heads))
  counts = [
    _count_side(layout, extent, border, sides[side], parts, before).scaled(k / (heads - first))
    for side, k in dealt.items()
  ]
  return functools.reduce(operator.add, counts)


def _count_side(layout, extent, border, side, parts, before) -> CallCost:
  """Counts the table of one side."""
  ranges = []  # per axis: the first position that each one sees, and the one behind the last
  for w, grid, later in zip(extent, layout.tile_grid, side, strict=True):
    position, inside = _axis(w, grid, border, later)
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


def _lists(layout, extent, border, side) -> tuple[np.ndarray, np.ndarray]:
  """Returns the lists of one side, int32 `[1, tiles, longest]`, and their lengths `[1, tiles]`."""
  ids = np.zeros((1,) * 6, np.int32)
  inside = np.ones((1,) * 6, bool)
  for axis, (w, grid) in enumerate(zip(extent, layout.tile_grid, strict=True)):
    # A query's place along this axis is dimension `axis`, a key's place in the window `axis + 3`.
    others = [i for i in range(6) if i not in (axis, axis + 3)]
    places = _axis(w, grid, border, side[axis])
    position, exists = (np.expand_dims(a, others) for a in places)
    ids = ids * grid + position
    inside = inside & exists
  ids = ids.astype(np.int32).reshape(layout.tiles, -1)
  inside = inside.reshape(layout.tiles, -1)
  if not inside.all():  # the listed ones first, still ascending
    ids = np.take_along_axis(ids, np.argsort(~inside, axis=-1, stable=True), -1)
  return ids[None], inside.sum(-1).astype(np.int32)[None]


def _extent(layout, window, border, deal) -> tuple[int, int, int]:
  """Returns the window, cut to what sees the whole axis from everywhere.

  Raises:
    ValueError: for a wrong border, deal or window.
  """
  if border not in BORDERS:
    raise ValueError(f"{border=} is unknown; choose one of {', '.join(BORDERS)}.")
  if len(window) != 3 or min(window) < 1:
    raise ValueError(f"{window=} must be three tile counts (t, y, x) of at least 1.")
  if deal not in DEALS:
    raise ValueError(f"{deal=} is unknown; choose one of {', '.join(DEALS)}.")
  if any(w > grid for w, grid in zip(window, layout.tile_grid, strict=True)):
    _log_whole_axis(tuple(window), layout.tile_grid)
  whole = layout.tile_grid
  if border == "clip" and deal != "as_is":
    # Cut to the grid, a window that is wider would not see all of it from the border.
    whole = tuple(2 * grid - 1 for grid in whole)
  return tuple(map(min, window, whole))


def _sides(layout, extent, border, deal) -> list[tuple[int, int, int]]:
  """Returns the sides of the window's tables: per axis 1 where more tiles come behind the query's.

  Raises:
    ValueError: the deal is "centred" and the window cannot be.
  """
  whole = layout.tile_grid if border == "clamp" else (math.inf,) * 3
  uneven = [w % 2 == 0 and w < most for w, most in zip(extent, whole, strict=True)]
  if deal == "centred" and any(uneven):
    axes = " and ".join(name for name, is_uneven in zip("tyx", uneven, strict=True) if is_uneven)
    raise ValueError(
      f"a window of {extent} tiles on {layout.tile_grid} cannot be centred along {axes}: tiles "
      "would see farther to one side. Give odd extents, whole axes, or deal='octant', which gives "
      "the sides to heads in turn; deal='as_is' goes on with a run from before this rule."
    )
  if deal != "octant":
    return [(0, 0, 0)]
  return list(itertools.product(*((0, 1) if is_uneven else (0,) for is_uneven in uneven)))


def _check_heads(sides: int, heads: int):
  """Raises ValueError if there are fewer heads than sides."""
  if heads < sides:
    raise ValueError(
      f"a window with {sides} sides needs as many heads, the layer has {heads}; give an odd extent "
      "or a whole axis instead of an even one."
    )


def _axis(window: int, grid: int, border: str, later: int) -> tuple[np.ndarray, np.ndarray]:
  """Tile positions `[grid, window]` along one axis, and which of them exist.

  `later` is by how many tiles the window starts later than `window // 2` before its query.
  """
  start = np.arange(grid) - window // 2 + later
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
