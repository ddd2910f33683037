"""Exact top-k without a sort: the same set as NumPy's, ties to the left, for any scores."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.hopper.interpret import interpreted
from freqformer.kernels.selection import hopper_topk, topk
from freqformer.kernels.selection.topk import top_ids, top_tiles, top_words
from jax.sharding import PartitionSpec

from tools.offline import compile_for


def oracle(scores, budget):
  """Stable sort by falling score, the first `budget`, ascending."""
  order = np.argsort(-scores.astype(np.float64), axis=-1, kind="stable")
  return np.sort(order[..., :budget], axis=-1)


def every_kind(m, rows=7):
  """Scores of every kind, float32 `[kinds, rows, m]`."""
  rng = np.random.default_rng(m)
  shape = (rows, m)
  normal = rng.standard_normal(shape)
  chance = rng.random(shape)
  kinds = [
    normal,
    rng.integers(-2, 3, shape),
    np.full(shape, normal[0, 0]),
    np.full(shape, -np.inf),
    np.full(shape, np.inf),
    np.select([chance < 0.2, chance < 0.4], [np.inf, -np.inf], normal),
    np.where(chance < 0.5, -0.0, 0.0),
    # A -0 that ranks below 0 would push out what is larger than both.
    rng.choice([-0.0, 0.0, 1.0, -1.0], shape, p=[0.4, 0.3, 0.15, 0.15]),
    1 + rng.integers(0, 40, shape) * 2.0**-23,  # neighbouring floats
    normal * 10.0 ** rng.integers(-40, 38, shape),  # every magnitude
  ]
  return np.stack(kinds).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 3])
def test_the_set_of_an_exact_top_k(bits, monkeypatch):
  monkeypatch.setattr(topk, "_BITS", {"cpu": bits})
  # A new function, of which jax has no older trace.
  found = jax.jit(lambda scores, budget: top_ids(scores, budget), static_argnums=1)
  for m, budget in ((1, 1), (2, 1), (33, 11), (33, 32), (33, 33), (200, 1), (200, 67), (200, 199)):
    scores = every_kind(m)
    want = oracle(scores, budget)
    np.testing.assert_array_equal(found(scores, budget), want, f"{m=} {budget=}")


def test_the_hopper_kernel_finds_the_same_sets():
  """All kinds of scores as rows of one call, in the GPU interpreter.

  The width is no multiple of a row's 128 lanes; the larger budget reaches below their filler.
  """
  always = np.array([[0, 199], [7, 7]])
  scores = every_kind(200, rows=2)
  with interpreted():
    ids = top_ids(jnp.asarray(scores), 150)
    some = top_ids(jnp.asarray(scores), 67, always)
  np.testing.assert_array_equal(ids, oracle(scores, 150))
  scores[:, np.arange(2)[:, None], always] = np.inf
  np.testing.assert_array_equal(some, oracle(scores, 67))


def test_the_hopper_kernel_compiles():
  """The longest rows, without spills; heads stay on their devices."""
  scores = jax.ShapeDtypeStruct((1, 8, 64, hopper_topk.MOST), jnp.float32)
  always = np.arange(64)[:, None]
  split = (PartitionSpec(None, "data"), None)
  compiled = compile_for(
    lambda x, ids: top_words(x, 800, ids), scores, always, devices=8, shardings=split
  )
  (kernel,) = compiled.kernels
  assert kernel.spill_stores == kernel.spill_loads == 0 and kernel.registers <= 168
  assert compiled.argument_bytes == pytest.approx(4 * 64 * hopper_topk.MOST, rel=0.01)
  collectives = "all-gather|all-reduce|all-to-all|collective-permute"
  assert not re.search(collectives, compiled.compiled.as_text())


def test_leading_axes_and_narrow_types():
  scores = np.random.default_rng(1).standard_normal((2, 3, 4, 50)).astype(jnp.bfloat16)  # many ties
  np.testing.assert_array_equal(top_ids(jnp.asarray(scores), 9), oracle(scores, 9))


def test_nan_rows_still_list_valid_tiles():
  scores = np.random.default_rng(2).standard_normal((5, 40)).astype(np.float32)
  scores[0] = np.nan
  scores[1, :20] = np.nan
  scores[2, 3] = -np.nan
  scores[3, ::2] = -np.nan
  ids = np.asarray(top_ids(jnp.asarray(scores), 6))
  assert ids.min() >= 0 and ids.max() < 40 and (np.diff(ids) > 0).all()


def test_budget_out_of_range():
  for budget in (0, 5):
    with pytest.raises(ValueError, match=r"must lie in 1\.\.4"):
      top_ids(jnp.zeros(4), budget)


@pytest.mark.parametrize("chunk_scores", [None, 1, 1000])
def test_tiles_per_head_with_fixed_ones(chunk_scores):
  rng = np.random.default_rng(4)
  # Exact products, many ties.
  q, k = rng.integers(-3, 4, (2, 2, 3, 37, 5)).astype(np.float32)
  fixed = np.stack([np.arange(37), np.full(37, 2), rng.integers(0, 37, 37)], -1)
  scores = np.einsum("bhid,bhjd->bhij", q, k)
  scores[:, :, np.arange(37)[:, None], fixed] = np.inf
  np.testing.assert_array_equal(top_tiles(q, k, 8, fixed, chunk_scores), oracle(scores, 8))


def test_scores_of_a_whole_head_never_exist():
  """12 heads of 16K x 16K tiles (2M tokens in tiles of 128): all scores would be 12.9 GB."""
  tiles = 16384
  heads = 12
  budget = 819
  pool = jax.ShapeDtypeStruct((1, heads, tiles, 128), jnp.float32)
  fixed = np.arange(tiles, dtype=np.int32)[:, None]
  compiled = compile_for(lambda q, k, f: top_tiles(q, k, budget, f), pool, pool, fixed)
  lists = 4 * heads * tiles * budget
  assert compiled.output_bytes == lists
  pools = 2 * 4 * heads * tiles * 128
  assert compiled.temp_bytes <= lists + pools + 5 * 4 * topk._CHUNK_ELSEWHERE, compiled.temp_bytes
  assert "sort(" not in compiled.compiled.as_text()
