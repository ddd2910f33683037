"""No seams: in every shipped config some head sees each of a token's nearest neighbours."""

import itertools
import pathlib

import numpy as np
import pytest

from freqformer.command.files import read_config
from freqformer.grid.layout import TileLayout
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.octaves import Octaves
from freqformer.methods.sliding_tile import SlidingTile
from freqformer.methods.spatial_temporal import SpatialTemporal
from freqformer.tables.window import deal_out, sliding_tile
from freqformer.train.experiment import experiment

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NEAREST = (1, 2, 2)  # steps along (t, y, x): 3 x 5 x 5 tokens
# Methods whose tables do not depend on the data. Radial's do not either, but it thins what is near
# in raster order by design, and no decay below dense has all neighbours in tiles of several rows.
STATIC = ("freqformer", "octaves", "sliding_tile", "spatial_temporal")


def neighbours_seen(listed: np.ndarray, layout: TileLayout) -> np.ndarray:
  """Returns for each token the share of its nearest neighbours that it sees, `[t, y, x]`.

  A neighbour is a token of the grid at most `NEAREST` steps away along each axis, itself included.

  Args:
    listed: bool `[tiles, tiles]`, True where some head's query tile lists a key tile.
    layout: of the tokens.
  """
  tiles = np.empty(layout.grid, int)
  starts = [np.cumsum([0, *lengths]) for lengths in layout.lengths]
  for number, place in enumerate(np.ndindex(layout.tile_grid)):
    tiles[tuple(slice(s[i], s[i + 1]) for s, i in zip(starts, place, strict=True))] = number
  seen = np.zeros(layout.grid)
  exist = np.zeros(layout.grid)
  for offset in itertools.product(*(range(-reach, reach + 1) for reach in NEAREST)):
    steps = list(zip(offset, layout.grid, strict=True))
    here = tuple(slice(max(0, -step), size - max(0, step)) for step, size in steps)
    there = tuple(slice(max(0, step), size - max(0, -step)) for step, size in steps)
    exist[here] += 1
    seen[here] += listed[tiles[here], tiles[there]]
  return seen / exist


def listed_by_some_head(method, layout: TileLayout, heads: int) -> np.ndarray:
  """Returns bool `[tiles, tiles]`, of FreqFormer's high band alone."""
  tables = method.tables(layout)
  if isinstance(method, SpatialTemporal):
    return np.any([mask.to_tiles()[0, 0] for mask in tables["masks"]], 0)
  if isinstance(method, FreqFormer):
    coarse = tables.coarse_tiles
    return deal_out(tables.high, heads).to_tiles()[0, :, coarse:, coarse:].any(0)
  if isinstance(method, Octaves):  # the finest level
    return deal_out(tables.window, heads).to_tiles()[0].any(0)
  assert isinstance(method, SlidingTile)
  parts = layout.block // tables.block_q  # in which a tile is read
  return deal_out(tables, heads).to_tiles()[0, :, ::parts, ::parts].any(0)


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize(
  "config", ["comparison", "demo", "fields", "folder", "methods", "pans", "ucf101"]
)
def test_every_token_sees_its_nearest_neighbours(config, name):
  exp = experiment(read_config(CONFIGS / f"{config}.py"))
  method = exp.model.attention.named(name)
  layout = exp.model.layout(exp.latent_shape)
  seen = neighbours_seen(listed_by_some_head(method, layout, exp.model.heads), layout)
  assert seen.min() == 1.0


@pytest.mark.parametrize(
  "window, deal, mean, least",
  [
    ((1, 2, 2), "as_is", 0.827, 0.24),  # nothing of the other half of the clip
    ((2, 2, 2), "as_is", 0.95**2, 0.6**2),  # along y and x: 0.6 where the last column is unseen
    ((2, 2, 2), "octant", 1.0, 1.0),
  ],
)
def test_what_lopsided_windows_miss(window, deal, mean, least):
  """On 2 x 3 x 3 tiles, shifted inwards at the border."""
  layout = TileLayout((8, 12, 12), (4, 4, 4), 64)
  tables = sliding_tile(layout, window, deal=deal).to_tiles()[0]
  seen = neighbours_seen(tables.any(0), layout)
  assert seen.mean() == pytest.approx(mean, abs=5e-4)
  assert seen.min() == pytest.approx(least, abs=5e-4)
  assert (seen[3] < 1).all() == (window[0] == 1)  # the last frame before the seam in time
