"""Tiles that devices exchange: each device sees what its query tiles list, and no more is sent."""

import numpy as np
import pytest
from freqformer.kernels.block_sparse.table import from_tiles

from freqformer.grid.layout import TileLayout
from freqformer.methods.radial import radial
from freqformer.tables.exchange import TileExchange
from freqformer.tables.window import sliding_tile

LAYOUT = TileLayout((8, 7, 9), (1, 2, 2), 4)


RNG = np.random.default_rng(0)
TABLES = {
  "window": sliding_tile(LAYOUT, (3, 3, 3), "clip"),
  "octants": sliding_tile(LAYOUT, (2, 2, 1), "clamp", "octant"),
  "radial": radial(LAYOUT, sink=1),
  # So few that no device needs all tiles of another.
  "random": from_tiles(RNG.random((1, 2, 64, 64)) < 0.01, RNG.integers(1, 5, 64), 4, 4),
}


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("name", TABLES)
def test_every_device_sees_what_its_tiles_list(name, devices):
  mask = TABLES[name]
  found = TileExchange.of(mask, devices)
  tiles = mask.kv_tiles
  each = tiles // devices
  expected = mask.to_tiles()[0]  # [h, tiles, tiles]
  for device in range(devices):
    buffer = list(range(device * each, (device + 1) * each))
    for shift, sends in zip(found.shifts, found.sends, strict=True):
      sender = (device + shift) % devices
      buffer += (sender * each + sends[sender]).tolist()
    own = type(mask)(
      found.own.kv_indices[device],
      found.own.kv_counts[device],
      found.own.kv_len[device],
      block_q=4,
      block_kv=4,
    ).check()
    np.testing.assert_array_equal(own.kv_len, mask.kv_len[buffer])
    seen = np.zeros_like(expected[:, :each])
    for head, row, place in zip(*np.nonzero(own.to_tiles()[0]), strict=True):
      seen[head, row, buffer[place]] = True
    np.testing.assert_array_equal(seen, expected[:, device * each : (device + 1) * each])


def test_a_window_takes_the_nearest_frames_only():
  found = TileExchange.of(sliding_tile(LAYOUT, (3, 7, 9), "clip"), 4)  # two frames on each device
  frame = LAYOUT.tiles // 8
  assert found.shifts == (1, 3)  # the device behind and the one before
  assert [sends.shape[-1] for sends in found.sends] == [frame, frame]
  assert found.received == 2 * frame
