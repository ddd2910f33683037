"""A 3-D window moved tile by tile, so that no block is mixed (STA, arXiv 2502.04507)."""

import functools

import numpy as np
from absl import logging

from freqformer.layout import TileLayout
from kernels.block_mask import BlockMask, pad_lists

BORDERS = ("clamp", "clip")


def sliding_tile(layout: TileLayout, window: tuple[int, int, int], border: str = "clamp") -> BlockMask:
  """Each query tile lists the tiles of a box around it.

  Args:
    layout: the tile grid.
    window: extent of the box in tiles per axis; larger than the grid means the whole axis.
    border: "clamp" shifts the box inwards, so that every query tile lists equally many (STA's choice);
      "clip" cuts it off, so that border tiles list fewer.

  Raises:
    ValueError: for an unknown border or a window below one tile.
  """
  if border not in BORDERS:
    raise ValueError(f"{border=} is unknown; choose one of {', '.join(BORDERS)}.")
  if len(window) != 3 or min(window) < 1:
    raise ValueError(f"{window=} must be three tile counts (t, y, x) of at least 1.")
  extent = tuple(min(w, g) for w, g in zip(window, layout.tile_grid, strict=True))
  if extent != tuple(window):
    _log_whole_axis(tuple(window), layout.tile_grid)
  axes = [_axis(w, g, border) for w, g in zip(extent, layout.tile_grid, strict=True)]
  (t, t_in), (y, y_in), (x, x_in) = axes
  grid_t, grid_y, grid_x = layout.tile_grid
  shape = (grid_t, grid_y, grid_x, *extent)
  at = lambda a, axis: a.reshape(
    [
      grid if i == axis else w if i == axis + 3 else 1
      for i, (grid, w) in enumerate(zip((*layout.tile_grid, 1, 1, 1), (1, 1, 1, *extent), strict=True))
    ]
  )
  ids = (at(t, 0) * grid_y + at(y, 1)) * grid_x + at(x, 2)
  inside = np.broadcast_to(at(t_in, 0) & at(y_in, 1) & at(x_in, 2), shape).reshape(layout.tiles, -1)
  ids = np.broadcast_to(ids, shape).reshape(layout.tiles, -1)
  front = np.argsort(~inside, axis=-1, stable=True)  # the listed ones first, still ascending
  ids = np.take_along_axis(ids, front, -1).astype(np.int32)[None, None]
  counts = inside.sum(-1).astype(np.int32)[None, None]
  return pad_lists(ids, counts, layout.arrays().kv_len, None, layout.block, layout.block)


def _axis(window: int, grid: int, border: str) -> tuple[np.ndarray, np.ndarray]:
  """Tile positions `[grid, window]` along one axis, and which of them exist."""
  start = np.arange(grid) - window // 2
  if border == "clamp":
    start = np.clip(start, 0, grid - window)
  position = start[:, None] + np.arange(window)
  return np.clip(position, 0, grid - 1), (position >= 0) & (position < grid)


@functools.cache
def _log_whole_axis(window, tile_grid):
  logging.info("window of %s tiles is larger than the tile grid %s: it covers those axes whole", window, tile_grid)
