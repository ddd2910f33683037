"""Counts of a static pattern without its table: memory is linear in tiles, whatever the lists would hold."""

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
  """What `kernels.block_sparse.cost.count` finds in the table of one head, at head dimension 1.

  Args:
    layout: the tile grid.
    counts, keys: int `[t, y, x]`: how many tiles a query tile lists, and how many tokens these hold.
    mark: `(seen, t, y, x0, x1)` sets in bool `[t, y, x]` what the query tiles (t, y, x0..x1-1) list, all together.
    parts: the table is refined by so much (`BlockMask.refine`).
    before: rows of the table that come first and list nothing.
  """
  tiles, (_, rows_y, rows_x) = layout.tiles, layout.tile_grid
  seen, ever, waves = np.zeros(layout.tile_grid, bool), np.zeros(layout.tile_grid, bool), 0
  for start in range(-(before % CONCURRENT), tiles * parts, CONCURRENT):
    first, stop = max(start, 0) // parts, -(-min(start + CONCURRENT, tiles * parts) // parts)
    seen[...] = False
    while first < stop:  # a row of query tiles, or what of it is in this group
      row, x = divmod(first, rows_x)
      end = min(rows_x, x + stop - first)
      mark(seen, *divmod(row, rows_y), x, end)
      first += end - x
    waves += int(seen.sum())
    ever |= seen
  block, loads = layout.block // parts, float(counts.sum()) * parts**2
  return CallCost(
    pairs=float((keys.reshape(-1).astype(np.int64) * layout.tile_lengths).sum()),
    computed_pairs=loads * block**2,
    rows=float(before + tiles * parts),
    items=float((counts > 0).sum()) * parts,
    loads=loads,
    distinct=float(ever.sum()) * parts,
    wave_loads=float(waves) * parts,
    longest=float(counts.max()) * parts,
    head_dim=1,
    block_q=block,
    block_kv=block,
  )


def axis_lengths(layout: TileLayout) -> list[np.ndarray]:
  """Per axis the tokens of each tile along it, int64."""
  return [np.asarray(lengths, np.int64) for lengths in layout.lengths]
