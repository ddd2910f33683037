"""Radial attention (arXiv 2506.19852): what a query sees shrinks with the distance in time, n log n pairs in all.

For tokens k of frame i and l of frame j, s tokens a frame, `r = floor(log2 max(|i - j|, 1))` numbers the temporal band
(2 ceil(log2 max(frames, 2)) - 1 bands in all), and l is seen where

  |k - l| + 1 <= s / 2^r          a spatial width that halves with every band, or
  k = l and (i - j) mod ceil(2^r / s) = 0      once that width is below one token: the same place, every so many frames.

All tokens of the first frame are seen from everywhere. Ours: the rule is applied to tiles, with k, l the raster numbers of
tiles within a frame of tiles, s tiles in it, and the distance in time in tokens; with tiles of one token it is the paper's.
"""

import numpy as np

from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.cost import CallCost
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.tables.counting import axis_lengths, count_tiles
from freqformer.tables.where import frame_tiles, tiles_where


def radial_widths(layout: TileLayout, decay: float = 1.0) -> np.ndarray:
  """Spatial width in tiles at each distance in tile frames, int64 `[tile frames]`; 0: nothing is seen there.

  Args:
    decay: multiplies the width s / 2^r.
  """
  distance = np.arange(layout.tile_grid[0])
  band = np.floor(np.log2(np.maximum(distance * layout.tile[0], 1)))
  width, s = decay * frame_tiles(layout) / 2**band, frame_tiles(layout)
  stride = np.ceil(1 / np.minimum(width, 1)).astype(np.int64)
  return np.where(width >= 1, np.minimum(np.floor(width), s), distance % stride == 0).astype(
    np.int64
  )


def radial(layout: TileLayout, decay: float = 1.0, sink: int = 1) -> BlockMask:
  """The table; `sink`: first frames of tiles that every query sees."""
  widths, columns = radial_widths(layout, decay), layout.tile_grid[2]

  def rule(query, key):
    apart = np.abs((query[1] - key[1]) * columns + query[2] - key[2])
    return (apart < widths[np.abs(query[0] - key[0])]) | (key[0] < sink)

  return tiles_where(layout, rule)


def count_radial(layout: TileLayout, decay: float = 1.0, sink: int = 1) -> CallCost:
  """Counts of `radial` at head dimension 1, frame by frame: a query tile sees one run of places in each."""
  frames, _, columns = layout.tile_grid
  s, at = frame_tiles(layout), np.arange(frames)
  widths = radial_widths(layout, decay)[np.abs(at[:, None] - at)]  # [query frame, key frame]
  widths[:, :sink] = s
  t, y, x = axis_lengths(layout)
  sums, places = np.concatenate([[0], np.cumsum(np.outer(y, x))]), np.arange(s)
  counts, keys = np.zeros((2, frames, s), np.int64)
  for width in np.unique(widths[widths > 0]):
    low, high = np.maximum(places - width + 1, 0), np.minimum(places + width, s)
    counts += np.outer((widths == width).sum(1), high - low)
    keys += np.outer((widths == width) @ t, sums[high] - sums[low])

  def mark(seen, frame, row, first, stop):
    seen, row = seen.reshape(frames, s), row * columns
    for other, width in enumerate(widths[frame]):
      if width:
        seen[other, max(row + first - width + 1, 0) : row + stop - 1 + width] = True

  return count_tiles(layout, counts.reshape(layout.tile_grid), keys.reshape(layout.tile_grid), mark)


def radial_density(layout: TileLayout, decay: float = 1.0, sink: int = 1) -> float:
  """The share of tile pairs listed, in closed form; the table's density where all tiles are equally long.

  A width w <= s holds `s + 2 sum_{m < w} (s - m) = s (2 w - 1) - w (w - 1)` of the s^2 pairs of tiles of two frames.
  """
  frames, s = layout.tile_grid[0], frame_tiles(layout)
  widths, first = radial_widths(layout, decay), min(sink, frames)
  pairs = np.where(widths > 0, s * (2 * widths - 1) - widths * (widths - 1), 0)
  key = np.arange(first, frames)[:, None]
  apart = np.abs(np.arange(frames) - key)
  return float(frames * first * s**2 + pairs[apart].sum()) / (frames * s) ** 2
