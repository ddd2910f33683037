"""The two patterns of Sparse VideoGen (arXiv 2502.01776): a few whole frames, or a few places in every frame."""

import numpy as np

from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.tables.counting import axis_lengths
from freqformer.tables.where import tiles_where


def spatial_temporal(
  layout: TileLayout, frames: int = 1, places: int = 1, sink: int = 1
) -> tuple[BlockMask, BlockMask]:
  """The tables (spatial, temporal), in tiles instead of the paper's tokens.

  Args:
    frames: spatial heads see every tile up to so many frames of tiles away.
    places: temporal heads see, in every frame of tiles, the tiles up to so many rows and columns away.
    sink: first frames of tiles that both see whole.
  """

  def spatial(q, k):
    return (np.abs(q[0] - k[0]) <= frames) | (k[0] < sink)

  def temporal(q, k):
    return (np.maximum(np.abs(q[1] - k[1]), np.abs(q[2] - k[2])) <= places) | (k[0] < sink)

  return tiles_where(layout, spatial), tiles_where(layout, temporal)


def count_pairs(
  layout: TileLayout, frames: int = 1, places: int = 1, sink: int = 1
) -> tuple[int, int]:
  """Scored pairs of the two tables of one head: products of what the tiles along each axis see of each other."""
  t, y, x = axis_lengths(layout)
  plane = int(y.sum() * x.sum())  # tokens of a frame
  spatial = _seen(t, frames, sink) * plane**2
  temporal = (
    int(t.sum() * t[sink:].sum()) * _seen(y, places) * _seen(x, places)
    + layout.n * int(t[:sink].sum()) * plane
  )
  return spatial, temporal


def _seen(lengths: np.ndarray, reach: int, sink: int = 0) -> int:
  """Pairs of tokens along an axis whose tiles lie up to `reach` apart, or the second's among the first `sink`."""
  at, tiles = np.arange(len(lengths)), len(lengths)
  sums = np.concatenate([[0], np.cumsum(lengths)])
  low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, tiles)
  first = min(sink, tiles)
  again = np.maximum(
    sums[np.minimum(high, first)] - sums[np.minimum(low, first)], 0
  )  # of the first, those near as well
  return int(lengths @ (sums[high] - sums[low] - again)) + int(sums[-1] * sums[first])
