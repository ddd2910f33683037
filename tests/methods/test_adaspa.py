"""AdaSpa in one layer: budgets that keep the mean, masks that are the oracle's, guidance. Whole runs: test_adaspa_runs.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import dense_mask
from freqformer.kernels.selection.block_scores import block_mass

from freqformer.grid.layout import TileLayout
from freqformer.methods.adaspa import AdaSpa, levels
from freqformer.methods.base import Cond, Dims, Projected
from freqformer.tables import lse_cache
from freqformer.tables.adaspa_memory import top_bits, unpack_bits
from tests.kernels.block_sparse.suite import relative_error

LAYOUT = TileLayout((8, 8, 16), (2, 4, 4), 32)  # 32 full tiles
RAGGED = TileLayout((5, 6, 9), (2, 4, 4), 32)  # 18 tiles of 32 to 2 tokens
HEADS, HEAD_DIM = 6, 16


def near_sighted(layout=LAYOUT, seed=0, b=1):
  """q, k, v whose heads look at their surroundings, widely (head 0) to narrowly (head 5), plus noise."""
  rng = np.random.default_rng(seed)
  place = layout.arrays().positions / np.asarray(layout.grid, np.float32)
  waves = rng.standard_normal((3, HEAD_DIM // 2)) * 3
  features = np.concatenate([np.cos(place @ waves), np.sin(place @ waves)], -1)[None, :, None]
  sharp = np.linspace(1.0, 2.6, HEADS)[:, None]
  shape = (b, layout.n_buffer, HEADS, HEAD_DIM)
  q, k = (features * sharp + 0.3 * rng.standard_normal(shape) for _ in "qk")
  return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, rng.standard_normal(shape)))


def projected(layout=LAYOUT, seed=0, b=1):
  def plain(x, positions):
    return x

  return Projected(*near_sighted(layout, seed, b), plain, plain, layout.arrays())


def cond_of(b, **fields):
  return Cond(jnp.full(b, 0.5), jnp.zeros((b, 4)), **fields)


def step(method, qkv, phase, state, **fields):
  layout, b = qkv.layout.layout, qkv.q.shape[0]
  leaves = (qkv.q, qkv.k, qkv.v, qkv.layout)
  run = jax.jit(
    lambda leaves, tables, state: method(
      None,
      dataclasses.replace(qkv, q=leaves[0], k=leaves[1], v=leaves[2], layout=leaves[3]),
      cond_of(b, phase=phase, **fields),
      tables,
      state,
    )
  )
  return run(leaves, method.tables(layout), state)


def dense_mass(layout, q, k):
  """The exact block mass, from the exact LSE."""
  arrays = layout.arrays()
  mask = dataclasses.replace(
    dense_mask(layout.n_buffer, layout.n_buffer, layout.block, layout.block), kv_len=arrays.kv_len
  )
  _, lse = attention(q, k, q, mask)
  return np.asarray(block_mass(q, k, lse, arrays.kv_len, layout.block)), lse


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
      assert (
        abs(few - (1 - sparsity) / 2 * tiles) <= 1
        and abs(many - 3 * (1 - sparsity) / 2 * tiles) <= 1
      )
    if sparsity == 0.2:
      assert (
        many == tiles
      )  # the low level would be (3 s - 1) / 2 = -0.2: cut to 0, and the other side with it


def test_levels():
  recall = jnp.array(
    [[0.9, 0.1, 0.5, 0.85, 0.2], [0.9, 0.95, 0.85, 0.99, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]]
  )
  got = levels(recall, 0.8)
  assert got[0].tolist() == [0, 2, 1, 0, 2]
  assert got[1].tolist() == [
    1,
    0,
    2,
    0,
    2,
  ]  # four heads pass, but no more than 5 // 2 give: the best two to the worst two
  assert got[2].tolist() == [1] * 5
  assert levels(jnp.ones((1, 4)), 0.8).tolist() == [[0, 0, 2, 2]]
  assert levels(jnp.ones((1, 1)), 0.8).tolist() == [[1]]


@pytest.mark.parametrize("dtype", lse_cache.DTYPES)
def test_lse_cache_round_trip(dtype):
  """Of tokens only: what padding rows hold is not kept. 8 bits are finer than bfloat16's, which lose 1/256 of the LSE."""
  arrays, rng = RAGGED.arrays(), np.random.default_rng(0)
  lse = jnp.asarray(12 + rng.standard_normal((2, 3, RAGGED.n_buffer)), jnp.float32)
  dirty = jnp.where(arrays.valid, lse, 1e4)
  kept = lse_cache.store("row", dtype, dirty, arrays)
  shapes = jax.tree.map(
    lambda x: (x.shape, x.dtype), (kept, lse_cache.empty("row", dtype, (2, 3), RAGGED))
  )
  assert shapes[0] == shapes[1]
  error = jnp.abs(lse_cache.load("row", kept, arrays) - lse)[..., arrays.valid].max()
  assert error <= {"float32": 0, "bfloat16": 2**-5, "uint8": 8 / 510}[dtype]
  means = lse_cache.load("tile", lse_cache.store("tile", "float32", dirty, arrays), arrays)
  np.testing.assert_allclose(
    means[0, 0, 0], lse[0, 0, : RAGGED.arrays().kv_len[0]].mean(), rtol=1e-6
  )


# ---- one layer -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUT, RAGGED], ids=["even", "ragged"])
def test_sparsity_zero_is_dense_in_every_phase(layout):
  method, qkv = AdaSpa(sparsity=0.0), projected(layout)
  state = method.init_state(1, Dims(HEADS, HEAD_DIM, 4), layout)
  want = step(method, qkv, "warmup", state)[0]
  for phase in ("search_first", "search", "reuse"):
    out, state, aux = step(method, qkv, phase, state)
    assert relative_error(layout.arrays().unpack(out), layout.arrays().unpack(want)) < 1e-6
    np.testing.assert_allclose(aux["density"], 1, rtol=1e-6)


def test_masks_are_the_oracles_at_the_first_search():
  """With the exact LSE every row lists exactly the tiles of largest mass, as many as its head's level says."""
  method, qkv = AdaSpa(sparsity=0.75, recall=0.6), projected()
  few, base, many = method.budgets(LAYOUT)
  _, state, aux = step(
    method, qkv, "search_first", method.init_state(1, Dims(HEADS, HEAD_DIM, 4), LAYOUT)
  )
  mass, _ = dense_mass(LAYOUT, qkv.q, qkv.k)
  tiles = np.asarray(unpack_bits(state["bits"], LAYOUT.tiles))
  counts = tiles.sum(-1)
  assert {few, many} <= set(counts[0, :, 0].tolist()) <= {few, base, many}
  assert (counts == counts[..., :1]).all() and counts[
    0, :, 0
  ].mean() == base  # equal rows; mean over heads unchanged
  assert np.diagonal(tiles, axis1=2, axis2=3).all()
  for head in range(HEADS):
    first = np.where(np.eye(LAYOUT.tiles, dtype=bool), np.inf, mass[0, head])
    best = np.argsort(-first, -1, kind="stable")[:, : counts[0, head, 0]]
    np.testing.assert_array_equal(
      np.sort(best, -1), np.nonzero(tiles[0, head])[1].reshape(LAYOUT.tiles, -1)
    )
  # Recall is at the base budget, and easy heads (narrow views) are the ones that give.
  top = np.sort(np.where(np.eye(LAYOUT.tiles, dtype=bool), 1e9, mass[0]), -1)[..., -base:]
  own = np.diagonal(mass[0], axis1=1, axis2=2)
  share = (top[..., :-1].sum((1, 2)) + own.sum(-1)) / mass[0].sum((1, 2))
  np.testing.assert_allclose(aux["recall"][0], share, rtol=1e-4)
  assert (
    aux["recall"][0, -1] > aux["recall"][0, 0]
    and aux["level"][0, 0] == 2
    and aux["level"][0, -1] == 0
  )


@pytest.mark.parametrize(
  "cache",
  [dict(), dict(lse_dtype="float32"), dict(lse_dtype="uint8"), dict(lse_cache="tile")],
  ids=["bf16", "f32", "uint8", "tile"],
)
def test_a_later_search_is_near_the_oracle(cache, record_property):
  """Later inputs, cached LSE: mass kept against the oracle of equal budget and against random tiles."""
  method = AdaSpa(sparsity=0.75, adaptive=False, **cache)
  first, later = projected(), projected()
  moved = near_sighted(seed=9)
  later = dataclasses.replace(
    later, q=0.4 * first.q + 0.6 * moved[0], k=0.4 * first.k + 0.6 * moved[1]
  )
  _, state, _ = step(
    method, first, "search_first", method.init_state(1, Dims(HEADS, HEAD_DIM, 4), LAYOUT)
  )
  stale = np.asarray(unpack_bits(state["bits"], LAYOUT.tiles))
  _, state, aux = step(method, later, "search", state)
  mass, _ = dense_mass(LAYOUT, later.q, later.k)
  tiles, base = np.asarray(unpack_bits(state["bits"], LAYOUT.tiles)), method.budgets(LAYOUT)[1]

  def share(tiles):
    return float((mass * tiles).sum() / mass.sum())

  def best(x):
    return np.asarray(unpack_bits(top_bits(jnp.asarray(x), [base]), LAYOUT.tiles))[..., 0, :]

  oracle, random = best(mass), best(np.random.default_rng(0).random(mass.shape, np.float32))
  shares = dict(
    search=share(tiles), oracle=share(oracle), first_masks=share(stale), random=share(random)
  )
  for name, value in shares.items():
    record_property(f"mass_kept_{name}", float(value))
  print({k: round(v, 4) for k, v in shares.items()})
  assert shares["search"] > 0.97 * shares["oracle"] and shares["search"] > 1.5 * shares["random"]
  assert shares["search"] > shares["first_masks"] + 0.01  # searching again is worth something here
  assert aux["density"].mean() == pytest.approx(base / LAYOUT.tiles)


def test_guidance_searches_the_conditional_half_only():
  method, qkv = AdaSpa(sparsity=0.75), projected(b=4)
  state = method.init_state(2, Dims(HEADS, HEAD_DIM, 4), LAYOUT)
  half = dataclasses.replace(qkv, q=qkv.q[:2], k=qkv.k[:2], v=qkv.v[:2])
  alone = state
  for phase in ("search_first", "search", "reuse"):
    out, state, aux = step(method, qkv, phase, state, guided=True, want_masks=True)
    want, alone, _ = step(method, half, phase, alone)
    jax.tree.map(np.testing.assert_array_equal, state, alone)
    assert relative_error(out[:2], want) < 1e-6
    for leaf in (aux["mask"].kv_indices, aux["density"]):
      if leaf.shape[0] == 4:
        np.testing.assert_array_equal(leaf[:2], leaf[2:])
