"""The two patterns of Sparse VideoGen (arXiv 2502.01776): a few whole frames, or a few places in every frame."""

import numpy as np

from freqformer.layout import TileLayout
from freqformer.planners.where import tiles_where
from kernels.block_mask import BlockMask


def spatial_temporal(layout: TileLayout, frames: int = 1, places: int = 1, sink: int = 1) -> tuple[BlockMask, BlockMask]:
  """The tables (spatial, temporal), in tiles instead of the paper's tokens.

  Args:
    frames: spatial heads see every tile up to so many frames of tiles away.
    places: temporal heads see, in every frame of tiles, the tiles up to so many rows and columns away.
    sink: first frames of tiles that both see whole.
  """
  spatial = lambda q, k: (np.abs(q[0] - k[0]) <= frames) | (k[0] < sink)
  temporal = lambda q, k: (np.maximum(np.abs(q[1] - k[1]), np.abs(q[2] - k[2])) <= places) | (k[0] < sink)
  return tiles_where(layout, spatial), tiles_where(layout, temporal)
