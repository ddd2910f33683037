"""Attention across frames in whole tiles: neighbouring frames and a few anchor frames, each around the query's own place."""

import numpy as np

from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.table import BlockMask, check_listed, pad_lists


def temporal(layout: TileLayout, frames: int, around: tuple[int, int], anchors: int) -> BlockMask:
  """Each query tile lists, of every frame it sees, the tiles around its own place.

  A frame here is a layer of tiles: `layout.tile[0]` frames of tokens. Both windows are shifted inwards at the video's edges,
  so that a query tile always sees `frames x around` tiles, its own among them.

  Args:
    layout: the tile grid.
    frames: neighbouring frames, the own one included; more than there are means all.
    around: extent in tiles (y, x) of what is seen of a frame; more than there are means the whole axis.
    anchors: evenly spread frames that every query tile sees; 1 is the first frame alone.

  Raises:
    ValueError: for an extent below 1 or a negative number of anchors.
  """
  if frames < 1 or len(around) != 2 or min(around) < 1 or anchors < 0:
    raise ValueError(
      f"{frames=} and {around=} (y, x) must be tile counts of at least 1, {anchors=} at least 0."
    )
  count_t, count_y, count_x = layout.tile_grid
  y, x = _window(count_y, around[0]), _window(count_x, around[1])  # [tiles, extent]
  place = (y[:, None, :, None] * count_x + x[None, :, None, :]).reshape(count_y * count_x, -1)
  lists = [np.union1d(row, anchor_frames(count_t, anchors)) for row in _window(count_t, frames)]
  most = max(map(len, lists))
  check_listed(
    layout.tiles * most * place.shape[1], f"a temporal table of {most} frames on {layout.tile_grid}"
  )
  seen = np.stack(
    [np.pad(row, (0, most - len(row)), mode="edge") for row in lists]
  )  # [count_t, most]
  ids = (
    seen[:, None, :, None] * (count_y * count_x) + place[None, :, None, :]
  )  # frames outside: ascending
  counts = np.repeat([len(row) * place.shape[1] for row in lists], count_y * count_x)
  shape = (1, 1, layout.tiles)
  ids, counts = ids.reshape(*shape, -1).astype(np.int32), counts.reshape(shape).astype(np.int32)
  return pad_lists(ids, counts, layout.tile_lengths, None, layout.block, layout.block)


def anchor_frames(frames: int, anchors: int) -> np.ndarray:
  """Evenly spread frames of `frames`, the first always among them; none where `anchors` is 0."""
  return np.unique(np.linspace(0, frames - 1, min(anchors, frames)).round().astype(np.int64))


def _window(size: int, extent: int) -> np.ndarray:
  """int `[size, extent]`: the positions that each position sees along one axis."""
  extent = min(extent, size)
  start = np.clip(np.arange(size) - extent // 2, 0, size - extent)
  return start[:, None] + np.arange(extent)
