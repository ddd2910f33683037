"""Every tile sees every tile."""

import numpy as np

from freqformer.layout import TileLayout
from kernels.block_mask import BlockMask


def dense(layout: TileLayout) -> BlockMask:
  """The dense table of a layout: no lists (`kv_indices` is None), padding rows hidden by `kv_len`."""
  counts = np.full((1, 1, layout.tiles), layout.tiles, np.int32)
  return BlockMask(None, counts, layout.tile_lengths, None, layout.block, layout.block)
