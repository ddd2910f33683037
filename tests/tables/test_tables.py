"""Each table against a slow restatement of what it should list."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.methods.radial import radial
from freqformer.methods.sparseflow import temporal
from freqformer.tables import topk
from freqformer.tables.packed import coarse_rows, full_rows, packed_kv_len
from freqformer.tables.topk import block_topk, fixed_tiles
from freqformer.tables.where import tiles_where
from freqformer.tables.window import deal_out, sliding_tile

RAGGED = TileLayout.fit((5, 6, 9), 32, tile=(2, 4, 4))


@pytest.mark.parametrize("border", ["clamp", "clip"])
@pytest.mark.parametrize("deal", ["octant", "as_is"])
@pytest.mark.parametrize("window", [(1, 1, 1), (3, 1, 3), (2, 2, 2), (2, 3, 4), (99, 99, 99)])
def test_window_lists_the_box_around_each_tile(border, deal, window):
  layout = TileLayout.fit((10, 12, 20), 32, tile=(2, 4, 4))
  grid = layout.tile_grid
  tables = np.asarray(sliding_tile(layout, window, border, deal).check().to_tiles())[0]
  even = [w % 2 == 0 for w in window]  # no even one is a whole axis
  sides = list(itertools.product(*((0, 1) if deal == "octant" and e else (0,) for e in even)))
  assert len(tables) == len(sides)
  for tiles, side in zip(tables, sides, strict=True):
    for i, query in enumerate(itertools.product(*map(range, grid))):
      for j, key in enumerate(itertools.product(*map(range, grid))):
        inside = True
        for q, k, w, g, later in zip(query, key, window, grid, side, strict=True):
          if border == "clamp" or deal == "as_is":
            w = min(w, g)
          start = q - w // 2 + later
          start = min(max(start, 0), g - w) if border == "clamp" else start
          inside &= start <= k < start + w
        assert tiles[i, j] == inside, (query, key)
    assert tiles.diagonal().all()
    if border == "clamp":
      assert len(set(tiles.sum(-1))) == 1


@pytest.mark.parametrize("border, whole", [("clamp", True), ("clip", False)])
def test_a_window_that_is_not_centred_is_refused(border, whole):
  """An even extent is centred only where it is the whole axis, wherever the query is."""
  two = TileLayout.fit((4, 12, 12), 32, tile=(2, 4, 4))  # 2 x 3 x 3 tiles
  with pytest.raises(ValueError, match="cannot be centred along .*y and x.*deal='octant'"):
    sliding_tile(two, (2, 2, 2), border)
  if whole:
    assert sliding_tile(two, (2, 3, 3), border).to_tiles().all()
  else:
    with pytest.raises(ValueError, match="along t: tiles"):
      sliding_tile(two, (2, 3, 3), border)


@pytest.mark.parametrize("heads", [8, 11])
def test_heads_get_the_sides_in_turn(heads):
  mask = sliding_tile(RAGGED, (2, 1, 2), deal="octant")
  sides = mask.to_tiles()[0]
  assert len(sides) == 4
  dealt = deal_out(mask.with_launch(), heads)
  np.testing.assert_array_equal(dealt.to_tiles()[0], [sides[h % 4] for h in range(heads)])
  own = dataclasses.replace(dealt, transposed=None, launch=None).with_launch()
  for name in ("offsets", "q_indices"):
    found = getattr(dealt.transposed, name)
    np.testing.assert_array_equal(found, getattr(own.transposed, name))
  for part, of_own in ((p, getattr(own.launch, p)) for p in ("by_query", "by_key")):
    for found, want in zip(getattr(dealt.launch, part)[:-1], of_own[:-1], strict=True):
      np.testing.assert_array_equal(found, want)
  with pytest.raises(ValueError, match="4 sides needs as many heads, the layer has 3"):
    deal_out(mask, 3)


def test_window_refuses_nonsense():
  with pytest.raises(ValueError, match="choose one of clamp, clip"):
    sliding_tile(RAGGED, (1, 1, 1), "wrap")
  with pytest.raises(ValueError, match="choose one of centred, octant, as_is"):
    sliding_tile(RAGGED, (1, 1, 1), deal="fair")
  with pytest.raises(ValueError, match="at least 1"):
    sliding_tile(RAGGED, (0, 1, 1))


@pytest.mark.parametrize("budget, chunk", [(3, 16), (6, 1 << 22), (100, 16)])
def test_topk_is_exact_and_keeps_fixed_tiles(budget, chunk, caplog):
  layout = TileLayout.fit((6, 8, 8), 16, tile=(2, 2, 4))
  rng = np.random.default_rng(1)
  q, k = (rng.standard_normal((2, 3, layout.tiles, 8)).astype(np.float32) for _ in range(2))
  fixed = fixed_tiles(layout, sink=1, anchors=1)

  def call(q, k):
    return block_topk(q, k, budget, fixed, layout.arrays(), chunk_scores=chunk)

  topk._log_all_tiles.cache_clear()
  with caplog.at_level("INFO", logger="absl"):
    mask = call(q, k)
    jax.eval_shape(call, q, k)
  logged = [m for m in caplog.messages if "key tiles are longer" in m]
  assert len(logged) == (budget > layout.tiles)  # once
  tiles = np.asarray(mask.check().to_tiles())
  scores = np.einsum("bhid,bhjd->bhij", q, k)
  for b, h, i in np.ndindex(tiles.shape[:3]):
    s = scores[b, h, i].copy()
    s[fixed[i]] = np.inf
    best = np.argsort(-s, kind="stable")[: min(budget, layout.tiles)]
    assert set(np.flatnonzero(tiles[b, h, i])) == set(best)


def test_topk_refuses_a_budget_below_the_fixed_tiles():
  layout = TileLayout.fit((6, 8, 8), 16, tile=(2, 2, 4))
  x = jnp.zeros((1, 1, layout.tiles, 4))
  with pytest.raises(ValueError, match="raise the budget"):
    block_topk(x, x, 2, fixed_tiles(layout, sink=3), layout.arrays())


@pytest.mark.parametrize("shared", [False, True])
def test_packed_tables_cover_their_rows_only(shared):
  tables = RAGGED.arrays()
  kv_len = packed_kv_len(40, tables.kv_len, 32)
  assert kv_len[:2].tolist() == [32, 8]
  low = coarse_rows(kv_len, 2, 32).check().to_tiles()[0, 0]
  assert low[:2, :2].all() and low.sum() == 4
  window = sliding_tile(RAGGED, (1, 2, 1))
  high = full_rows(window, kv_len, 2, shared).check().to_tiles()[0, 0]
  np.testing.assert_array_equal(high[2:, 2:], window.to_tiles()[0, 0])
  assert not high[:2].any() and high[2:, :2].all() == shared and high[2:, :2].any() == shared


def test_tables_that_would_outgrow_memory_are_refused_before_they_are_built():
  long = TileLayout.fit((256, 256, 256), 128)
  for make in (
    lambda: sliding_tile(long, (1000, 1000, 1000)),
    lambda: temporal(long, 1000, (1000, 1000), 1),
    lambda: radial(long),
    lambda: tiles_where(TileLayout.fit((64, 128, 128), 32), lambda q, k: np.ones((1, 1), bool)),
  ):
    with pytest.raises(ValueError, match="fewer tokens"):
      make()
  with pytest.raises(ValueError, match="choose block_dct"):
    SpectralBasis("dct", (0.5,) * 3, (0.75,) * 3).fit(TileLayout.fit((1, 1, 10_007), 128))
