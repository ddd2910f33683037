"""AdaSpa in one layer: budgets that keep the mean, masks that are the oracle's, guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.selection.block_scores import block_mass

from freqformer.grid.layout import TileLayout
from freqformer.methods.adaspa import AdaSpa, levels
from freqformer.methods.base import Dims
from freqformer.tables.adaspa_memory import (
  LSE_DTYPES,
  empty_lse,
  load_lse,
  store_lse,
  top_bits,
  unpack_bits,
)
from freqformer.tables.dense import dense
from tests.kernels.block_sparse.suite import relative_error
from tests.methods.layers import RAGGED, step

LAYOUT = TileLayout((8, 8, 16), (2, 4, 4), 32)  # 32 full tiles
HEADS = 6
HEAD_DIM = 16
DIMS = Dims(HEADS, HEAD_DIM, 4)


def near_sighted(seed=0, b=1):
  """q, k, v whose heads look at their surroundings, widely (head 0) to narrowly (head 5)."""
  rng = np.random.default_rng(seed)
  place = LAYOUT.arrays().positions / np.asarray(LAYOUT.grid, np.float32)
  waves = rng.standard_normal((3, HEAD_DIM // 2)) * 3
  features = np.concatenate([np.cos(place @ waves), np.sin(place @ waves)], -1)[None, :, None]
  sharp = np.linspace(1.0, 2.6, HEADS)[:, None]
  shape = (b, LAYOUT.n_buffer, HEADS, HEAD_DIM)
  q, k = (features * sharp + 0.3 * rng.standard_normal(shape) for _ in "qk")
  return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, rng.standard_normal(shape)))


def run(method, qkv, phase, state, **fields):
  return step(method, qkv, LAYOUT, phase, state, **fields)


def dense_mass(q, k):
  """The exact block mass, from the exact LSE."""
  _, lse = attention(q, k, q, dense(LAYOUT))
  return np.asarray(block_mass(q, k, lse, LAYOUT.tile_lengths, LAYOUT.block))


# ---- budgets and levels ----------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.2, 1 / 3, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("sink", [0, 2])
def test_three_budgets_keep_the_mean(sparsity, sink):
  method = AdaSpa(sparsity=sparsity, sink=sink)
  for tiles in (32, 81, 630):
    layout = TileLayout((tiles, 4, 4), (1, 4, 4), 16)
    few, base, many = method.budgets(layout)
    assert few + many == 2 * base and sink + 1 <= few <= base <= many <= tiles
    assert abs(base - (1 - sparsity) * tiles) <= 0.5
    if sparsity >= 1 / 3 and few > sink + 1:  # the paper's levels, to whole tiles
      assert abs(few - (1 - sparsity) / 2 * tiles) <= 1
      assert abs(many - 3 * (1 - sparsity) / 2 * tiles) <= 1
    if sparsity == 0.2:
      # The low level would be (3 s - 1) / 2 = -0.2: it is cut to 0, and the other side with it.
      assert many == tiles


def test_levels():
  recall = jnp.array(
    [[0.9, 0.1, 0.5, 0.85, 0.2], [0.9, 0.95, 0.85, 0.99, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]]
  )
  got = levels(recall, 0.8)
  assert got[0].tolist() == [0, 2, 1, 0, 2]
  # Four heads pass, but no more than 5 // 2 give: the best two to the worst two.
  assert got[1].tolist() == [1, 0, 2, 0, 2]
  assert got[2].tolist() == [1] * 5
  assert levels(jnp.ones((1, 4)), 0.8).tolist() == [[0, 0, 2, 2]]
  assert levels(jnp.ones((1, 1)), 0.8).tolist() == [[1]]


@pytest.mark.parametrize("dtype", LSE_DTYPES)
def test_lse_cache_round_trip(dtype):
  """Padding rows are not kept. 8 bits are finer than bfloat16, which loses 1/256 of the LSE."""
  arrays = RAGGED.arrays()
  rng = np.random.default_rng(0)
  lse = jnp.asarray(12 + rng.standard_normal((2, 3, RAGGED.n_buffer)), jnp.float32)
  dirty = jnp.where(arrays.valid, lse, 1e4)
  kept = store_lse("row", dtype, dirty, arrays)
  empty = empty_lse("row", dtype, (2, 3), RAGGED)
  assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, empty)
  assert jax.tree.map(jnp.dtype, kept) == jax.tree.map(jnp.dtype, empty)
  error = jnp.abs(load_lse("row", kept, arrays) - lse)[..., arrays.valid].max()
  assert error <= {"float32": 0, "bfloat16": 2**-5, "uint8": 8 / 510}[dtype]
  means = load_lse("tile", store_lse("tile", "float32", dirty, arrays), arrays)
  np.testing.assert_allclose(means[0, 0, 0], lse[0, 0, : arrays.kv_len[0]].mean(), rtol=1e-6)


# ---- one layer -------------------------------------------------------------------------


def test_masks_are_the_oracles_at_the_first_search():
  """With the exact LSE every row lists exactly the tiles of largest mass that its level allows."""
  method, qkv = AdaSpa(sparsity=0.75, recall=0.6), near_sighted()
  few, base, many = method.budgets(LAYOUT)
  _, state, aux = run(method, qkv, "search_first", method.init_state(1, DIMS, LAYOUT))
  mass = dense_mass(*qkv[:2])
  tiles = np.asarray(unpack_bits(state["bits"], LAYOUT.tiles))
  counts = tiles.sum(-1)
  assert {few, many} <= set(counts[0, :, 0].tolist()) <= {few, base, many}
  assert (counts == counts[..., :1]).all()  # the rows of a head have one budget
  assert counts[0, :, 0].mean() == base
  assert np.diagonal(tiles, axis1=2, axis2=3).all()
  for head in range(HEADS):
    first = np.where(np.eye(LAYOUT.tiles, dtype=bool), np.inf, mass[0, head])
    best = np.argsort(-first, -1, kind="stable")[:, : counts[0, head, 0]]
    listed = np.nonzero(tiles[0, head])[1].reshape(LAYOUT.tiles, -1)
    np.testing.assert_array_equal(np.sort(best, -1), listed)
  # Recall is at the base budget, and easy heads (narrow views) are the ones that give.
  top = np.sort(np.where(np.eye(LAYOUT.tiles, dtype=bool), 1e9, mass[0]), -1)[..., -base:]
  own = np.diagonal(mass[0], axis1=1, axis2=2)
  share = (top[..., :-1].sum((1, 2)) + own.sum(-1)) / mass[0].sum((1, 2))
  np.testing.assert_allclose(aux["recall"][0], share, rtol=1e-4)
  assert aux["recall"][0, -1] > aux["recall"][0, 0]
  assert aux["level"][0, 0] == 2 and aux["level"][0, -1] == 0


@pytest.mark.parametrize("cache", [dict(lse_dtype="uint8"), dict(lse_cache="tile")], ids=str)
def test_a_later_search_is_near_the_oracle(cache):
  """With later inputs and a cached LSE, masks keep nearly the mass of the oracle's equal budget."""
  method = AdaSpa(sparsity=0.75, adaptive=False, **cache)
  first, moved = near_sighted(), near_sighted(seed=9)
  later = (*(0.4 * a + 0.6 * b for a, b in zip(first[:2], moved[:2], strict=True)), first[2])
  _, state, _ = run(method, first, "search_first", method.init_state(1, DIMS, LAYOUT))
  stale = np.asarray(unpack_bits(state["bits"], LAYOUT.tiles))
  _, state, aux = run(method, later, "search", state)
  mass = dense_mass(*later[:2])
  tiles, base = np.asarray(unpack_bits(state["bits"], LAYOUT.tiles)), method.budgets(LAYOUT)[1]

  def share(tiles):
    return float((mass * tiles).sum() / mass.sum())

  def best(x):
    return np.asarray(unpack_bits(top_bits(jnp.asarray(x), [base]), LAYOUT.tiles))[..., 0, :]

  anything = best(np.random.default_rng(0).random(mass.shape, np.float32))
  assert share(tiles) > 0.97 * share(best(mass))
  assert share(tiles) > 1.5 * share(anything)
  assert share(tiles) > share(stale) + 0.01  # searching again is worth something here
  assert aux["density"].mean() == pytest.approx(base / LAYOUT.tiles)


def test_training_is_dense():
  _, state, aux = run(AdaSpa(sparsity=0.75), near_sighted(), "", {})
  assert (aux["density"] == 1).all() and state == {}


def test_guidance_searches_the_conditional_half_only():
  method, qkv = AdaSpa(sparsity=0.75), near_sighted(b=4)
  state = alone = method.init_state(2, DIMS, LAYOUT)
  for phase in ("search_first", "search"):
    out, state, _ = run(method, qkv, phase, state, guided=True)
    want, alone, _ = run(method, [x[:2] for x in qkv], phase, alone)
    jax.tree.map(np.testing.assert_array_equal, state, alone)
    assert relative_error(out[:2], want) < 1e-6
