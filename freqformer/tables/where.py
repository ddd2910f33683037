"""A static table from a rule over tile places, the way to write a new static pattern."""

from collections.abc import Callable

import numpy as np

from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.table import BlockMask, check_listed, pad_lists

# Pairs of tiles that a rule is asked about at once: 8,192 x 8,192 are never whole in memory.
_CHUNK_PAIRS = 1 << 21
# A rule over this many tiles is asked about 2^31 pairs, which takes tens of seconds.
_MOST_TILES = 46_340


def tiles_where(
  layout: TileLayout, rule: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> BlockMask:
  """Returns the table that lists a key tile wherever `rule` is true.

  Args:
    rule: `(query [3, m, 1], key [3, 1, tiles]) -> bool [m, tiles]`; places are tile coordinates
      (t, y, x), int32.

  Raises:
    ValueError: if a query tile lists nothing (output 0), or for more tiles than a table may list.
  """
  if layout.tiles > _MOST_TILES:
    raise ValueError(
      f"a rule over all pairs of {layout.tiles:,} tiles takes minutes; give fewer tokens or larger "
      "tiles"
    )
  places = np.stack(np.unravel_index(np.arange(layout.tiles), layout.tile_grid)).astype(np.int32)
  step = max(1, _CHUNK_PAIRS // layout.tiles)
  found = []
  counts = []
  longest = 0
  for start in range(0, layout.tiles, step):
    query = places[:, start : start + step, None]
    listed = np.broadcast_to(rule(query, places[:, None]), (query.shape[1], layout.tiles))
    found.append(np.nonzero(listed)[1].astype(np.int32))  # row by row, ascending
    counts.append(listed.sum(-1, dtype=np.int32))
    longest = max(longest, int(counts[-1].max()))
    check_listed(layout.tiles * longest, f"a rule's table on {layout.tile_grid}")
  counts = np.concatenate(counts)
  if not counts.all():
    raise ValueError(
      f"query tile {int(np.argmin(counts))} of grid {layout.tile_grid} lists no key tile; list its "
      "own at least."
    )
  ids = np.zeros((layout.tiles, longest), np.int32)
  ids[np.arange(longest) < counts[:, None]] = np.concatenate(found)
  return pad_lists(
    ids[None, None], counts[None, None], layout.tile_lengths, None, layout.block, layout.block
  )
