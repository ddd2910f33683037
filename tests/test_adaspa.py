"""AdaSpa: exact selection, budgets that keep the mean, a schedule that fits or is refused, a state of known size."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.attention import AttentionDims
from freqformer.config import ConfigError
from freqformer.dit import VideoDiT
from freqformer.layout import TileLayout
from freqformer.methods.adaspa import AdaSpa, levels
from freqformer.methods.base import Cond, Dims, Projected
from freqformer.model_config import model_config
from freqformer.planners.tile_bits import largest, lists_of_bits, pack_bits, unpack_bits
from freqformer.sampling import SampleConfig, compile_steps, make_step, sample
from kernels.attention import attention
from kernels.block_mask import dense_mask
from kernels.block_scores import block_mass

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
  plain = lambda x, positions: x
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
  mask = dataclasses.replace(dense_mask(layout.n_buffer, layout.n_buffer, layout.block, layout.block), kv_len=arrays.kv_len)
  _, lse = attention(q, k, q, mask)
  return np.asarray(block_mass(q, k, lse, arrays.kv_len, layout.block)), lse


# ---- choosing and packing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 7, 8, 33, 64])
def test_largest_is_the_sorted_choice(tiles):
  rng = np.random.default_rng(tiles)
  mass = rng.choice([0, 1e-38, 1e-3, 0.5, 1, 2, 3e9], (5, tiles)).astype(np.float32)  # many ties
  mass[0] = rng.standard_normal(tiles) ** 2
  counts = sorted({1, (tiles + 1) // 2, tiles})
  got = np.asarray(jax.jit(lambda m: largest(m, counts))(mass))
  order = np.argsort(-mass, -1, kind="stable")
  for i, count in enumerate(counts):
    want = np.zeros_like(mass, bool)
    np.put_along_axis(want, order[:, :count], True, -1)
    np.testing.assert_array_equal(got[:, i], want)


def test_fixed_tiles_come_first_inside_the_budget():
  mass = np.tile(np.arange(8, dtype=np.float32), (2, 1))
  got = largest(mass, [3], fixed=np.array([[0, 0], [2, 1]]))[:, 0]
  assert [np.flatnonzero(row).tolist() for row in got] == [[0, 6, 7], [1, 2, 7]]


@pytest.mark.parametrize("tiles", [1, 8, 9, 31, 64])
def test_bits_and_lists_round_trip(tiles):
  rng = np.random.default_rng(0)
  marked = rng.random((2, 3, tiles, tiles)) < rng.random((2, 3, tiles, 1))  # rows from empty to full
  bits = pack_bits(jnp.asarray(marked))
  assert bits.dtype == jnp.uint8 and bits.shape[-1] == -(-tiles // 8)
  np.testing.assert_array_equal(unpack_bits(bits, tiles), marked)
  table = jax.jit(lambda bits: lists_of_bits(bits, tiles, np.full(tiles, 4, np.int32), 4))(bits)
  np.testing.assert_array_equal(jax.tree.map(np.asarray, table).check().to_tiles(), marked)


# ---- budgets and levels --------------------------------------------------------------------------------------------------


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
      assert abs(few - (1 - sparsity) / 2 * tiles) <= 1 and abs(many - 3 * (1 - sparsity) / 2 * tiles) <= 1
    if sparsity == 0.2:
      assert many == tiles  # the low level would be (3 s - 1) / 2 = -0.2: cut to 0, and the other side with it


def test_levels():
  recall = jnp.array([[0.9, 0.1, 0.5, 0.85, 0.2], [0.9, 0.95, 0.85, 0.99, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]])
  got = levels(recall, 0.8)
  assert got[0].tolist() == [0, 2, 1, 0, 2]
  assert got[1].tolist() == [1, 0, 2, 0, 2]  # four heads pass, but no more than 5 // 2 give: the best two to the worst two
  assert got[2].tolist() == [1] * 5
  assert levels(jnp.ones((1, 4)), 0.8).tolist() == [[0, 0, 2, 2]]
  assert levels(jnp.ones((1, 1)), 0.8).tolist() == [[1]]


# ---- one layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUT, RAGGED], ids=["even", "ragged"])
def test_sparsity_zero_is_dense_in_every_phase(layout):
  method, qkv = AdaSpa(sparsity=0.0), projected(layout)
  state = method.init_state(1, Dims(HEADS, HEAD_DIM, 4), layout)
  want = step(method, qkv, "warmup", state)[0]
  for phase in ("search_first", "search", "reuse"):
    out, state, aux = step(method, qkv, phase, state)
    np.testing.assert_allclose(layout.arrays().unpack(out), layout.arrays().unpack(want), atol=2e-6)
    np.testing.assert_allclose(aux["density"], 1, rtol=1e-6)


def test_masks_are_the_oracles_at_the_first_search():
  """With the exact LSE every row lists exactly the tiles of largest mass, as many as its head's level says."""
  method, qkv = AdaSpa(sparsity=0.75, recall=0.6), projected()
  few, base, many = method.budgets(LAYOUT)
  _, state, aux = step(method, qkv, "search_first", method.init_state(1, Dims(HEADS, HEAD_DIM, 4), LAYOUT))
  mass, _ = dense_mass(LAYOUT, qkv.q, qkv.k)
  tiles = np.asarray(unpack_bits(state["bits"], LAYOUT.tiles))
  counts = tiles.sum(-1)
  assert {few, many} <= set(counts[0, :, 0].tolist()) <= {few, base, many}
  assert (counts == counts[..., :1]).all() and counts[0, :, 0].mean() == base  # equal rows; mean over heads unchanged
  assert np.diagonal(tiles, axis1=2, axis2=3).all()
  for head in range(HEADS):
    first = np.where(np.eye(LAYOUT.tiles, dtype=bool), np.inf, mass[0, head])
    best = np.argsort(-first, -1, kind="stable")[:, : counts[0, head, 0]]
    np.testing.assert_array_equal(np.sort(best, -1), np.nonzero(tiles[0, head])[1].reshape(LAYOUT.tiles, -1))
  # Recall is at the base budget, and easy heads (narrow views) are the ones that give.
  top = np.sort(np.where(np.eye(LAYOUT.tiles, dtype=bool), 1e9, mass[0]), -1)[..., -base:]
  own = np.diagonal(mass[0], axis1=1, axis2=2)
  share = (top[..., :-1].sum((1, 2)) + own.sum(-1)) / mass[0].sum((1, 2))
  np.testing.assert_allclose(aux["recall"][0], share, rtol=1e-4)
  assert aux["recall"][0, -1] > aux["recall"][0, 0] and aux["level"][0, 0] == 2 and aux["level"][0, -1] == 0


@pytest.mark.parametrize("cache", [dict(), dict(lse_dtype="float32"), dict(lse_cache="tile")], ids=["bf16", "f32", "tile"])
def test_a_later_search_is_near_the_oracle(cache, record_property):
  """Later inputs, cached LSE: mass kept against the oracle of equal budget and against random tiles."""
  method = AdaSpa(sparsity=0.75, adaptive=False, **cache)
  first, later = projected(), projected()
  moved = near_sighted(seed=9)
  later = dataclasses.replace(later, q=0.4 * first.q + 0.6 * moved[0], k=0.4 * first.k + 0.6 * moved[1])
  _, state, _ = step(method, first, "search_first", method.init_state(1, Dims(HEADS, HEAD_DIM, 4), LAYOUT))
  stale = np.asarray(unpack_bits(state["bits"], LAYOUT.tiles))
  _, state, aux = step(method, later, "search", state)
  mass, _ = dense_mass(LAYOUT, later.q, later.k)
  tiles, base = np.asarray(unpack_bits(state["bits"], LAYOUT.tiles)), method.budgets(LAYOUT)[1]
  share = lambda tiles: float((mass * tiles).sum() / mass.sum())
  oracle = np.asarray(largest(mass, [base]))[..., 0, :]
  random = np.asarray(largest(np.random.default_rng(0).random(mass.shape, np.float32), [base]))[..., 0, :]
  shares = dict(search=share(tiles), oracle=share(oracle), first_masks=share(stale), random=share(random))
  for name, value in shares.items():
    record_property(f"mass_kept_{name}", value)
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
    np.testing.assert_allclose(out[:2], want, atol=1e-6)
    for leaf in (aux["mask"].kv_indices, aux["density"]):
      if leaf.shape[0] == 4:
        np.testing.assert_array_equal(leaf[:2], leaf[2:])


# ---- whole runs ----------------------------------------------------------------------------------------------------------

SHAPE = (4, 8, 8, 2)
BASE = dict(size="custom", width=24, depth=3, heads=2, patch=(1, 1, 1))


def model_of(adaspa=None, method="adaspa", **attention):
  attention = dict(method=method, block=16, adaspa=adaspa or {}, **attention)
  model = VideoDiT(model_config({**BASE, "attention": attention}), SHAPE, 3, nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  keys = iter(jax.random.split(jax.random.key(1), 1000))
  return nnx.merge(graphdef, jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params))


def draw(model, steps=10, guidance=3.0, labels=(0, 1), compiled=True):
  graphdef, params = nnx.split(model)
  config = SampleConfig(steps=steps, guidance=guidance, batch_size=len(labels))
  tables = model.tables(SHAPE)
  run = make_step(graphdef, config)
  if compiled:
    run = compile_steps(run, params, model, tables, SHAPE, config)
  out = sample(run, params, model, labels, np.arange(len(labels)), 0, tables, SHAPE, config, progress=False)
  return (*out, run)


def test_a_run_is_four_compiled_steps():
  model = model_of(dict(sparsity=0.5))
  out, aux, step = draw(model, compiled=False)
  assert step._cache_size() == 4 and np.isfinite(out).all()
  ahead, _, _ = draw(model)
  np.testing.assert_array_equal(out, ahead)
  density = [float(a[0]["density"].mean()) for a in aux]
  searched = [i for i, a in enumerate(aux) if "recall" in a[0]]
  assert density[:3] == [1, 1, 1] and searched == [2, 6]
  np.testing.assert_allclose(density[3:], 0.5)  # full tiles: exactly the base budget, in every step and layer
  assert aux[3][0]["density"].shape == (3, 4, 2) and aux[2][0]["recall"].shape == (3, 2, 2)
  assert float(aux[6][0]["cost"].mean()) == pytest.approx(1.0) and float(aux[2][0]["cost"].mean()) == pytest.approx(1.5)


def test_runs_of_layers_mix_and_share_one_schedule():
  model = model_of(dict(sparsity=0.5), layers=((0, 1, "dense"), (1, None, "adaspa")))
  assert model.schedule(5) == [("", p) for p in ("warmup", "search_first", "reuse", "search", "reuse")]
  _, aux, step = draw(model, steps=5, compiled=False)
  assert step._cache_size() == 4
  np.testing.assert_allclose(aux[-1][0]["density"], 1)
  np.testing.assert_allclose(aux[-1][1]["density"], 0.5)


def test_sparsity_zero_samples_as_dense():
  dense, wide = model_of(method="dense"), model_of(dict(sparsity=0.0))
  np.testing.assert_allclose(draw(wide, steps=5)[0], draw(dense, steps=5)[0], atol=1e-4)


def test_a_checkpoint_holds_nothing_of_it():
  """Parameters are those of dense attention: nothing is cached in a module, whatever has run."""
  paths = lambda model: {(p, leaf.shape) for p, leaf in nnx.to_flat_state(nnx.state(model))}
  model = model_of(dict(sparsity=0.5))
  before = paths(model)
  draw(model, steps=5)
  assert paths(model) == before == paths(model_of(method="dense"))


def test_training_is_dense():
  sparse, dense = model_of(dict(sparsity=0.5)), model_of(method="dense")
  x, t, y = jnp.ones((1, *SHAPE)), jnp.full(1, 0.5), jnp.zeros(1, jnp.int32)
  out = [m(x, t, y, m.tables(SHAPE), train=True, rng=jax.random.key(0))[0] for m in (sparse, dense)]
  np.testing.assert_allclose(*out, atol=1e-6)


# ---- size and cost -------------------------------------------------------------------------------------------------------


def state_bytes(tile=None, **fields):
  """State of 40 layers of 40 heads at 21x45x80 = 75,600 tokens, one sample under guidance."""
  config = dict(size="custom", width=5120, depth=40, heads=40, patch=(1, 1, 1))
  config["attention"] = dict(method="adaspa", block=128, tile=tile or (), adaspa=fields)
  shape = (21, 45, 80, 16)
  model = nnx.eval_shape(lambda: VideoDiT(model_config(config), shape, 1, nnx.Rngs(0)))
  state = jax.eval_shape(lambda: model.init_state(2, shape, guided=True))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_state_fits():
  assert state_bytes() == 40 * 40 * (2 * 75_600 + 630 * 79) <= 320 * 2**20
  assert state_bytes(tile=(7, 9, 2)) == 40 * 40 * (2 * 75_600 + 600 * 75) <= 320e6
  assert state_bytes(lse_cache="tile") == 40 * 40 * 630 * (2 + 79)


def test_cost_by_phase():
  method, args = AdaSpa(sparsity=0.75), (LAYOUT, HEADS, HEAD_DIM)
  whole = 4 * LAYOUT.n**2 * HEADS * HEAD_DIM
  totals = {p: method.phase_cost(p, *args).total / whole for p in ("", "warmup", "search_first", "search", "reuse")}
  assert totals == pytest.approx({"": 1, "warmup": 1, "search_first": 1.5, "search": 0.75, "reuse": 0.25})


# ---- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(warmup=11), "warmup=11 is longer than the run of 10 steps"),
    (dict(search=(3, 10)), "step 10 comes after the last step of a run of 10"),
    (dict(warmup=4, search=(3, 6)), "step 3 lies in the warm-up of 4 dense steps"),
    (dict(search=(6, 3)), "ascending"),
  ],
)
def test_a_schedule_that_does_not_fit_is_refused_before_the_run(fields, message):
  with pytest.raises(ConfigError, match=message):
    draw(model_of(dict(sparsity=0.5) | fields))


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(sparsity=1.0), r"sparsity=1.0 must lie in \[0, 1\)"),
    (dict(sparsity=0.99), "of 16 tiles rounds to no tile per query tile; lower it to 0.938"),
    (dict(sparsity=0.9, sink=4), "leaves 2 per query tile, fewer than the own tile and sink=4"),
    (dict(search=()), "names no step"),
    (dict(warmup=-1), "steps .integers >= 0. or shares"),
    (dict(search=(0.2, 1.5)), "shares of the run"),
    (dict(lse_cache="half"), "must be one of"),
    (dict(sparsty=0.5), "did you mean 'sparsity'"),
    (dict(warmup="ten"), "must be int | float"),
  ],
)
def test_bad_fields(fields, message):
  with pytest.raises(ConfigError, match=message):
    model_of(fields)


def test_shares_and_steps():
  """The paper's schedule at 50 steps, and the same shares elsewhere; every run length works."""
  method = AdaSpa()
  searches = lambda steps: [i for i in range(steps) if method.phase(i, steps).startswith("search")]
  assert searches(50) == [10, 30] and [method.phase(i, 50) for i in (0, 9, 11, 29, 49)] == ["warmup"] * 2 + ["reuse"] * 3
  assert AdaSpa(warmup=10, search=(10, 30)).phase(30, 50) == "search"
  for steps in range(1, 60):
    method.check_run(steps)
    assert searches(steps)[0] <= steps // 5 and method.phase(searches(steps)[0], steps) == "search_first"


def test_the_layer_builds_no_parameters():
  assert AttentionDims(48, 6, 8).for_method == Dims(6, 8, 8) and AdaSpa(sparsity=0.5).build(Dims(6, 8, 8), LAYOUT, None) is None
