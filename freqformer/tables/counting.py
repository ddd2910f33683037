"""Counts of a static pattern without its table, in memory that is linear in tiles."""

import dataclasses
from collections.abc import Callable

import numpy as np

from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.cost import CONCURRENT, CallCost

Mark = Callable[[np.ndarray, int, int, int, int], None]


def count_tiles(
  layout: TileLayout,
  counts: np.ndarray,
  keys: np.ndarray,
  mark: Mark,
  *,
  parts: int = 1,
  before: int = 0,
) -> CallCost:
  """Counts what `kernels.block_sparse.cost.count` finds in one head's table, at head dimension 1.

  Args:
    counts, keys: int `[t, y, x]`, tiles that a query tile lists, and tokens of these.
    mark: `(seen, t, y, x0, x1)` sets in bool `[t, y, x]` what the query tiles (t, y, x0..x1-1)
      list, all together.
    parts: the table is refined by so much (`BlockMask.refine`).
    before: rows of the table that come first and list nothing.
  """
  rows = layout.tiles * parts
  _, rows_y, rows_x = layout.tile_grid
  seen = np.zeros(layout.tile_grid, bool)
  ever = np.zeros(layout.tile_grid, bool)
  waves = 0
  for start in range(-(before % CONCURRENT), rows, CONCURRENT):
    tile = max(start, 0) // parts
    stop = -(-min(start + CONCURRENT, rows) // parts)
    seen[...] = False
    while tile < stop:  # the part of a row of query tiles that lies in this group
      row, x = divmod(tile, rows_x)
      end = min(rows_x, x + stop - tile)
      mark(seen, *divmod(row, rows_y), x, end)
      tile += end - x
    waves += int(seen.sum())
    ever |= seen
  block = layout.block // parts
  loads = float(counts.sum()) * parts**2
  return CallCost(
    pairs=float((keys.reshape(-1).astype(np.int64) * layout.tile_lengths).sum()),
    computed_pairs=loads * block**2,
    rows=float(before + rows),
    items=float((counts > 0).sum()) * parts,
    loads=loads,
    distinct=float(ever.sum()) * parts,
    wave_loads=float(waves) * parts,
    longest=float(counts.max()) * parts,
    head_dim=1,
    block_q=block,
    block_kv=block,
  )


def with_coarse(full: CallCost, layout: TileLayout, n_coarse: int, coarse: int) -> CallCost:
  """Adds all coarse tiles of a packed buffer to every list of its full rows.

  Args:
    full, layout: counts of the full rows, which come after the coarse ones, and their layout.
    n_coarse, coarse: coarse tokens, and tiles that hold them.
  """
  groups = len(range(-(coarse % CONCURRENT), layout.tiles, CONCURRENT))
  loads = float(layout.tiles) * coarse
  return dataclasses.replace(
    full,
    pairs=full.pairs + float(layout.n) * n_coarse,
    computed_pairs=full.computed_pairs + loads * layout.block**2,
    loads=full.loads + loads,
    distinct=full.distinct + coarse,
    wave_loads=full.wave_loads + groups * coarse,
    longest=full.longest + coarse,
  )


def axis_lengths(layout: TileLayout) -> list[np.ndarray]:
  """Returns per axis the tokens of each tile along it, int64."""
  return [np.asarray(lengths, np.int64) for lengths in layout.lengths]
