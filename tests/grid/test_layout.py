"""Tile order against a brute-force walk over the tiles."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqformer.grid.layout import TileLayout

LAYOUTS = [
  TileLayout((1, 1, 1), (2, 4, 4), 32),
  TileLayout((1, 4, 4), (2, 4, 4), 32),
  TileLayout((3, 5, 7), (2, 4, 4), 32),
  TileLayout((5, 6, 9), (2, 4, 4), 64),
  TileLayout((4, 8, 8), (2, 4, 4), 32),
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda l: f"{l.grid}-{l.block}")


def _walk(layout):
  """Per tile, the (t, y, x) of its tokens in order: nested loops, nothing clever."""
  for corner in itertools.product(
    *(range(0, l, e) for l, e in zip(layout.grid, layout.tile, strict=True))
  ):
    ends = (min(c + e, l) for c, e, l in zip(corner, layout.tile, layout.grid, strict=True))
    yield list(itertools.product(*(range(c, end) for c, end in zip(corner, ends, strict=True))))


@layouts
def test_tables_equal_a_walk_over_tiles(layout):
  tables, walk = layout.arrays(), list(_walk(layout))
  assert layout.tiles == len(walk) == math.prod(layout.tile_grid)
  assert layout.n == sum(map(len, walk)) and layout.n_buffer == len(walk) * layout.block
  assert layout.fill == layout.n / layout.n_buffer
  np.testing.assert_array_equal(tables.kv_len, [len(tokens) for tokens in walk])
  for i, tokens in enumerate(walk):
    raster = [(t * layout.grid[1] + y) * layout.grid[2] + x for t, y, x in tokens]
    rows = slice(i * layout.block, (i + 1) * layout.block)
    k = len(tokens)
    np.testing.assert_array_equal(tables.gather[rows][:k], raster)
    np.testing.assert_array_equal(tables.scatter[raster], np.arange(rows.start, rows.start + k))
    np.testing.assert_array_equal(tables.positions[rows][:k], tokens)
    np.testing.assert_array_equal(tables.positions[rows][k:], 0)
    np.testing.assert_array_equal(tables.valid[rows], np.arange(layout.block) < k)
    assert set(tables.gather[rows][k:]) <= set(raster), (
      "padding rows must point into their own tile"
    )


@layouts
def test_pack_and_unpack(layout):
  tables = layout.arrays()
  x = np.random.default_rng(0).standard_normal((2, layout.n, 3)).astype(np.float32)
  packed = np.asarray(tables.pack(x))
  np.testing.assert_array_equal(packed[:, tables.valid], x[:, tables.gather[tables.valid]])
  np.testing.assert_array_equal(packed[:, ~tables.valid], 0)
  garbage = np.where(tables.valid[:, None], packed, np.float32(np.nan))
  np.testing.assert_array_equal(tables.unpack(garbage), x)


@pytest.mark.parametrize(
  "grid, block, tile",
  [
    ((21, 45, 80), 128, (3, 5, 8)),  # divides the grid; 4x4x8 would pad 22 %
    ((64, 128, 128), 128, (4, 4, 8)),
    ((128, 90, 160), 128, (4, 4, 8)),
    ((8, 16, 16), 64, (4, 4, 4)),
    ((1, 16, 16), 64, (1, 8, 8)),
    ((2, 2, 2), 64, (2, 2, 2)),
    ((1, 1, 9), 8, (1, 1, 5)),  # balanced: 5 + 4, not 8 + 1
    ((1, 1, 1), 64, (1, 1, 1)),
  ],
)
def test_fit_chooses(grid, block, tile):
  assert TileLayout.fit(grid, block) == TileLayout(grid, tile, block)


@pytest.mark.parametrize(
  "grid, block", [((5, 6, 9), 32), ((7, 7, 7), 64), ((1, 13, 8), 16), ((3, 11, 4), 24)]
)
def test_fit_has_the_fewest_tiles_of_all_compact_boxes(grid, block):
  def compact(tile):
    narrow = [e for e, l in zip(tile, grid, strict=True) if e < l]
    return math.prod(tile) <= block and (not narrow or max(tile) <= 3 * min(narrow))

  boxes = [tile for tile in itertools.product(*(range(1, l + 1) for l in grid)) if compact(tile)]
  assert TileLayout.fit(grid, block).tiles == min(
    TileLayout(grid, tile, block).tiles for tile in boxes
  )


def test_the_longest_axis_is_fitted_at_once():
  assert TileLayout.fit((1, 1, 2_000_000_000), 128).tiles == 15_625_000


def test_tile_overrides_the_fit_and_is_clipped_to_the_grid():
  assert TileLayout.fit((21, 45, 80), 128, tile=(4, 4, 8)).tile == (4, 4, 8)
  assert TileLayout.fit([1, 45, 80], np.int64(128), tile=[4, 8, 16]).tile == (1, 8, 16)


def test_layout_is_a_static_value_and_tables_are_computed_once():
  a, b = (TileLayout((3, 5, 7), (2, 4, 4), 32) for _ in range(2))
  assert a == b and hash(a) == hash(b) and a.arrays() is b.arrays()
  traces = []
  pack = jax.jit(lambda tables, x: traces.append(tables.layout) or tables.pack(x))
  for x in np.eye(2, a.n, dtype=np.float32)[:, None]:
    pack(a.arrays(), x)
  assert traces == [a]
  with pytest.raises(ValueError, match="read-only"):
    a.arrays().gather[0] = 1


def test_a_million_tokens_and_explicit_types():
  layout = TileLayout.fit((64, 128, 127), 128)  # ragged in x
  with jax.enable_x64(True):
    tables = jax.tree.map(jnp.asarray, layout.arrays())
  types = {
    name: getattr(tables, name).dtype
    for name in ("gather", "scatter", "kv_len", "positions", "valid")
  }
  assert types == dict(
    gather="int32", scatter="int32", kv_len="int32", positions="float32", valid="bool"
  )
  np.testing.assert_array_equal(
    np.asarray(tables.gather)[np.asarray(tables.scatter)], np.arange(layout.n)
  )
  assert int(tables.valid.sum()) == int(tables.kv_len.sum()) == layout.n


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: TileLayout((4, 4), (2, 2, 2), 8), r"grid=\(4, 4\).*three token extents"),
    (lambda: TileLayout((4, 0, 4), (2, 2, 2), 8), "grid=0.*positive integer"),
    (lambda: TileLayout((4, 4, 4), (2, 2.5, 2), 8), "tile=2.5.*positive integer"),
    (lambda: TileLayout((4, 4, 4), (2, 2, 4), 8), "16 tokens.*block=8.*smaller extents"),
    (lambda: TileLayout.fit((4, 4, 4), 0), "block=0.*positive integer"),
    (lambda: TileLayout.fit((4, 4, 4), 8, tile=(4, 4, 4)), "64 tokens.*block=8"),
    (lambda: TileLayout.fit((4096, 4096, 4096), 128), "int32"),
    (
      lambda: LAYOUTS[2].arrays().pack(np.zeros((1, 104))),
      r"pack got shape \(1, 104\).*\[b, 105, \.\.\.\]",
    ),
    (lambda: LAYOUTS[2].arrays().unpack(np.zeros(256)), r"unpack got shape \(256,\)"),
  ],
)
def test_errors_say_what_is_allowed(make, message):
  with pytest.raises(ValueError, match=message):
    make()
