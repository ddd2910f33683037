"""The table in which every tile lists every tile."""

import numpy as np

from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.table import BlockMask


def dense(layout: TileLayout) -> BlockMask:
  """The dense table of a layout: no lists (`kv_indices` is None); `kv_len` hides padding rows."""
  counts = np.full((1, 1, layout.tiles), layout.tiles, np.int32)
  return BlockMask(None, counts, layout.tile_lengths, None, layout.block, layout.block)
