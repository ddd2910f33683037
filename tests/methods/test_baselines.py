"""The published baselines: tables against slow restatements of the papers' formulas."""

import itertools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from freqformer.kernels.block_sparse.table import from_tiles

from freqformer.config import ConfigError
from freqformer.grid.layout import TileLayout
from freqformer.methods.block_topk import BlockTopK
from freqformer.methods.radial import Radial, radial, radial_floor
from freqformer.methods.sliding_tile import SlidingTile
from freqformer.methods.spatial_temporal import spatial_temporal
from freqformer.tables.where import tiles_where
from tests.methods.layers import RAGGED, layer_of, tokens, where

# ---- any rule --------------------------------------------------------------------------


def test_a_rule_becomes_its_table():
  layout = RAGGED
  rng = np.random.default_rng(0)
  want = rng.random((layout.tiles, layout.tiles)) < 0.4
  want[np.arange(layout.tiles), rng.permutation(layout.tiles)] = True

  def number(p):
    return np.ravel_multi_index(tuple(p), layout.tile_grid)

  mask = tiles_where(layout, lambda q, k: want[number(q), number(k)]).check()
  other = from_tiles(want, layout.tile_lengths, 32, 32)
  for field in ("kv_indices", "kv_counts", "kv_len"):
    np.testing.assert_array_equal(getattr(mask, field), getattr(other, field))
  with pytest.raises(ValueError, match="query tile 0 of grid .* lists no key tile"):
    tiles_where(layout, lambda q, k: q[0] > k[0])


# ---- sliding tile ----------------------------------------------------------------------


def test_sliding_tile_has_its_published_density():
  mask = SlidingTile().mask(TileLayout.fit((30, 48, 80), 384, tile=(6, 8, 8))).check()
  assert mask.density().item() == pytest.approx(0.09, abs=1e-12)
  assert (mask.block_q, mask.block_kv, mask.max_kv) == (128, 128, 81)


@pytest.mark.parametrize("block, parts", [(384, 3), (64, 1), (100, 1), (130, 2)])
def test_long_tiles_are_read_in_parts_that_see_the_same(block, parts):
  layout = TileLayout.fit((7, 13, 18), block, tile=(4, 5, 5) if block >= 100 else (4, 4, 4))
  whole, read = (SlidingTile((9, 9, 9), rows=rows).mask(layout) for rows in (block, 128))
  assert read.check().block_q == block // parts
  np.testing.assert_array_equal(whole.to_dense(), read.to_dense())


def test_window_units():
  layout = TileLayout.fit((16, 32, 32), 128, tile=(4, 4, 8))
  for deal, whole in (("centred", (3, 3, 3)), ("octant", (3, 3, 2)), ("as_is", (3, 3, 2))):
    tokens = SlidingTile((9, 12, 16), deal=deal).mask(layout)
    tiles = SlidingTile(whole, unit="tiles", deal=deal).mask(layout)
    np.testing.assert_array_equal(tokens.kv_indices, tiles.kv_indices)
    assert tokens.max_kv == math.prod(whole)


# ---- radial ----------------------------------------------------------------------------


def paper_mask(layout, decay, sink):
  """The formula of arXiv 2506.19852, tile by tile: bool `[tiles, tiles]`; times are in tokens."""
  frames, s = layout.tile_grid[0], math.prod(layout.tile_grid[1:])
  mask = np.zeros((frames, s, frames, s), bool)
  for i, k, j, l in itertools.product(range(frames), range(s), range(frames), range(s)):
    scale = 2 ** math.floor(math.log2(max(abs(i - j) * layout.tile[0], 1))) / decay
    near = scale <= s and abs(k - l) + 1 <= s / scale
    same = scale > s and k == l and abs(i - j) % math.ceil(scale / s) == 0
    mask[i, k, j, l] = near or same or j < sink
  return mask.reshape(frames * s, frames * s)


@pytest.mark.parametrize(
  "grid, tile, decay, sink",
  [
    *((grid, (1, 1, 1), 1.0, 1) for grid in ((9, 1, 2), (17, 1, 1), (20, 2, 3), (1, 2, 2))),
    ((16, 8, 12), (2, 4, 4), 1.0, 1),
    ((16, 8, 12), (2, 4, 4), 0.3, 0),
    ((24, 4, 8), (4, 4, 4), 2.5, 2),
    ((24, 4, 8), (4, 4, 4), 1e-3, 1),
    ((24, 4, 8), (4, 4, 4), 1.0, 99),
  ],
)
def test_radial_is_the_papers_mask_of_tokens_or_tiles(grid, tile, decay, sink):
  layout = TileLayout(grid, tile, math.prod(tile))
  found = Radial(decay, sink).mask(layout).check().to_tiles()[0, 0]
  np.testing.assert_array_equal(found, paper_mask(layout, decay, sink))


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize(
  "grid, tile",
  [
    ((1, 1, 1), (1, 1, 1)),
    ((1, 4, 6), (1, 2, 2)),
    ((5, 1, 1), (1, 1, 1)),
    ((9, 2, 3), (2, 2, 2)),
    ((16, 8, 12), (2, 4, 4)),
    ((24, 4, 8), (4, 4, 4)),
  ],
)
def test_below_its_floor_radial_is_one_mask(grid, tile, sink, caplog):
  """Just below the floor as far below; just above not; the log tells of the former."""
  layout = TileLayout(grid, tile, math.prod(tile))
  floor = radial_floor(layout, sink)
  least = radial(layout, 1e-9, sink).to_tiles()
  if not floor:
    np.testing.assert_array_equal(radial(layout, 9.0, sink).to_tiles(), least)
    Radial(1e-9, sink).mask(layout)
    assert "changes nothing" not in caplog.text
    return
  above = Radial(1.001 * floor, sink)
  assert (above.mask(layout).to_tiles() != least).any()
  above.counted(layout)
  assert "changes nothing" not in caplog.text
  below = Radial(0.999 * floor, sink)
  np.testing.assert_array_equal(below.mask(layout).to_tiles(), least)
  below.counted(layout)
  assert caplog.text.count("changes nothing") == 1  # not once per layer and call
  assert f"below {floor:.3g} every tile" in caplog.text


def test_radial_saves_what_its_paper_says():
  """9x less attention at 500 frames of 720p, which are 128 latent frames of 45 x 80 tokens."""
  mask = Radial().mask(TileLayout((128, 45, 80), (1, 8, 16), 128))
  assert 1 / mask.density(128 * 45 * 80).item() == pytest.approx(9, rel=0.02)


# ---- spatial, temporal -----------------------------------------------------------------


def test_spatial_and_temporal_tables():
  layout = TileLayout((10, 12, 20), (2, 4, 4), 32)
  masks = spatial_temporal(layout, frames=1, places=1, sink=1)
  spatial, temporal = (np.asarray(m.check().to_tiles())[0, 0] for m in masks)
  for i, (t, y, x) in enumerate(itertools.product(*map(range, layout.tile_grid))):
    for j, (u, v, w) in enumerate(itertools.product(*map(range, layout.tile_grid))):
      assert spatial[i, j] == (abs(t - u) <= 1 or u == 0)
      assert temporal[i, j] == (max(abs(y - v), abs(x - w)) <= 1 or u == 0)


# ---- block top-k -----------------------------------------------------------------------


def test_the_gate_of_block_topk_leaves_zero():
  method = BlockTopK(density=0.3)
  layer = layer_of(method)

  def loss(layer):
    tables = method.tables(RAGGED)
    out, _, _ = layer(tokens(), where(train=True), RAGGED.arrays(), tables, {})
    return (out**2).sum()

  for leaf in jax.tree.leaves(nnx.jit(nnx.grad(loss))(layer).method):
    assert np.any(leaf)


# ---- refusals --------------------------------------------------------------------------


def test_refusals():
  layout = TileLayout.fit((4, 8, 8), 32, tile=(2, 4, 4))
  with pytest.raises(
    ConfigError, match="density 0.05 of 8 tiles rounds to 0, fewer than the 1 fixed"
  ):
    BlockTopK(density=0.05).budget(layout)
  with pytest.raises(ValueError, match="unit='feet' must be one of"):
    SlidingTile(unit="feet")
  with pytest.raises(ValueError, match="decay=0 must be above 0"):
    Radial(decay=0)
