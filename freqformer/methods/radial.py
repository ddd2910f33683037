"""Radial attention (arXiv 2506.19852): a static table; reach shrinks with the distance in time.

For tokens k of frame i and l of frame j, s tokens a frame, band `r = floor(log2 max(|i - j|, 1))`,
l is seen if `|k - l| + 1 <= s / 2^r`, a spatial width that halves with every band, or, once that
is below one token, if k = l and (i - j) mod ceil(2^r / s) = 0: the same place, every so many
frames. n log n pairs. All tokens of the first frame are seen from everywhere.
"""

# choice: the rule is applied to tiles: k, l number the tiles within a frame of tiles, s counts
# them, and distances in time are in tokens. With tiles of one token it is the paper's rule.

import dataclasses
import functools
import math

import numpy as np
from absl import logging

from freqformer.config import require
from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.cost import CallCost
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.methods.static import StaticMethod
from freqformer.tables.counting import axis_lengths, count_tiles
from freqformer.tables.where import tiles_where


@dataclasses.dataclass(frozen=True)
class Radial(StaticMethod):
  """Fields of the method.

  Attributes:
    decay: multiplies every spatial width; 1 is the paper's formula, more is denser. Below
      `radial_floor`, of which the log tells, it changes nothing.
    sink: first frames of tiles that every query sees; the paper's is the first frame.
  """

  decay: float = 1.0
  sink: int = 1

  def __post_init__(self):
    require(self, "decay", above=0)
    require(self, "sink", least=0)

  def mask(self, layout):
    _say_floor(layout, self.decay, self.sink)
    return radial(layout, self.decay, self.sink)

  def counted(self, layout):
    _say_floor(layout, self.decay, self.sink)
    return count_radial(layout, self.decay, self.sink)


def radial_widths(layout: TileLayout, decay: float = 1.0) -> np.ndarray:
  """Returns widths in tiles, `decay` s / 2^r, by distance in tile frames; 0 sees nothing."""
  s = math.prod(layout.tile_grid[1:])
  distance = np.arange(layout.tile_grid[0])
  band = np.floor(np.log2(np.maximum(distance * layout.tile[0], 1)))
  width = decay * s / 2**band
  stride = np.ceil(1 / np.minimum(width, 1)).astype(np.int64)
  wide = np.minimum(np.floor(width), s)
  return np.where(width >= 1, wide, distance % stride == 0).astype(np.int64)


def radial_floor(layout: TileLayout, sink: int = 1) -> float:
  """Returns the least `decay` whose mask is not that of all smaller ones; 0 if all masks are equal.

  With less, a tile sees itself and the sink alone: no neighbour in its own frame, and its own place
  in no other frame.
  """
  frames = layout.tile_grid[0]
  if sink >= frames:  # everything is seen
    return 0.0
  s = math.prod(layout.tile_grid[1:])
  distance = np.arange(1, frames)
  band = np.floor(np.log2(distance * layout.tile[0]))
  first_seen = 2**band / (s * distance)  # the stride of its band is the distance itself
  return float(min([2 / s] * (s > 1) + first_seen.tolist(), default=0.0))


@functools.lru_cache(maxsize=64)
def _say_floor(layout: TileLayout, decay: float, sink: int):
  """Logs, once, that a decay is below the floor."""
  floor = radial_floor(layout, sink)
  if decay < floor:
    density = count_radial(layout, decay, sink).pairs / layout.n**2
    logging.warning(
      "radial: decay=%g changes nothing on tiles %s: below %.3g every tile sees itself and the "
      "first %d frames of tiles alone, a density of %.3f; lower sink, or take smaller tiles, for "
      "less",
      decay,
      "x".join(map(str, layout.tile_grid)),
      floor,
      sink,
      density,
    )


def radial(layout: TileLayout, decay: float = 1.0, sink: int = 1) -> BlockMask:
  """Builds the table; `sink` is the number of first frames of tiles that every query sees."""
  widths = radial_widths(layout, decay)
  columns = layout.tile_grid[2]

  def rule(query, key):
    apart = np.abs((query[1] - key[1]) * columns + query[2] - key[2])
    return (apart < widths[np.abs(query[0] - key[0])]) | (key[0] < sink)

  return tiles_where(layout, rule)


def count_radial(layout: TileLayout, decay: float = 1.0, sink: int = 1) -> CallCost:
  """Counts of `radial` at head dimension 1: a query tile sees one run of places in each frame."""
  frames, rows, columns = layout.tile_grid
  s = rows * columns
  at = np.arange(frames)
  widths = radial_widths(layout, decay)[np.abs(at[:, None] - at)]  # [query frame, key frame]
  widths[:, :sink] = s
  t, y, x = axis_lengths(layout)
  sums = np.concatenate([[0], np.cumsum(np.outer(y, x))])
  places = np.arange(s)
  counts, keys = np.zeros((2, frames, s), np.int64)
  for width in np.unique(widths[widths > 0]):
    low, high = np.maximum(places - width + 1, 0), np.minimum(places + width, s)
    counts += np.outer((widths == width).sum(1), high - low)
    keys += np.outer((widths == width) @ t, sums[high] - sums[low])

  def mark(seen, frame, row, first, stop):
    seen = seen.reshape(frames, s)
    row *= columns
    for other, width in enumerate(widths[frame]):
      if width:
        seen[other, max(row + first - width + 1, 0) : row + stop - 1 + width] = True

  return count_tiles(layout, counts.reshape(layout.tile_grid), keys.reshape(layout.tile_grid), mark)
