"""Block mass against brute force; its approximations; its memory bounded; the Hopper kernel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.hopper.interpret import interpreted
from freqformer.kernels.selection import block_scores, hopper_block_scores
from freqformer.kernels.selection.block_scores import block_mass
from jax.sharding import PartitionSpec as P

from tests.kernels.block_sparse.suite import relative_error
from tools.offline import SHARED_LIMIT, compile_for

BLOCK = 16
KV_LEN = np.array([16, 16, 11, 16, 1, 16, 7], np.int32)
TILES = len(KV_LEN)
VALID = (np.arange(BLOCK) < KV_LEN[:, None]).reshape(-1)
# Of 8 channels: scores with a spread of some units, so that rows differ in what they look at.
SCALE = 0.6


def inputs(seed=0, dtype=jnp.float32):
  """q, k and their row LSE `[b, h, n]` in float32; `dtype` rounds q and k first."""
  rng = np.random.default_rng(seed)
  q, k = (jnp.asarray(rng.standard_normal((2, VALID.size, 3, 8)) * 1.5, dtype) for _ in "qk")
  scores = np.where(VALID, exact_scores(q, k), -np.inf)
  return q, k, jnp.asarray(np.log(np.exp(scores).sum(-1)), jnp.float32)


def exact_scores(q, k):
  q, k = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k))
  return np.einsum("bihd,bjhd->bhij", q, k) * SCALE


def brute(q, k, lse, seen=VALID):
  """float64 `[b, h, tiles, tiles]`, with the n x n matrix."""
  p = np.exp(exact_scores(q, k) - np.asarray(lse, np.float64)[..., None])
  p = np.where(seen & seen[:, None], p, 0)
  return p.reshape(*p.shape[:2], TILES, BLOCK, TILES, BLOCK).sum((3, 5))


def mass(q, k, lse, kv_len=KV_LEN, **options):
  return block_mass(q, k, lse, kv_len, BLOCK, scale=SCALE, **options)


def with_tile(mass, tile):
  """A reduction that keeps everything."""
  return {"mass": mass, "tile": tile}


@pytest.mark.parametrize(
  ("scores", "rows", "dtype"),
  [(1 << 20, 1024, jnp.float32), (2 * BLOCK**2, 16, jnp.float32), (6 * BLOCK**2, 48, jnp.bfloat16)],
)
def test_equals_brute_force(monkeypatch, scores, rows, dtype):
  """Whatever the group and chunk sizes: 48 rows are 3 tiles of 7, 6 tiles of scores 2 key tiles."""
  monkeypatch.setattr(block_scores, "_SCORES", {"cpu": scores})
  monkeypatch.setattr(block_scores, "_GROUP_ROWS", rows)
  q, k, lse = inputs(dtype=dtype)
  found = jax.jit(lambda *x: mass(*x, reduce=with_tile))(q, k, lse)
  got = found["mass"]
  assert got.dtype == jnp.float32
  assert relative_error(got, brute(q, k, lse)) < 3e-6
  # A query tile's mass is its number of valid rows.
  np.testing.assert_allclose(got.sum(-1), np.broadcast_to(KV_LEN, (2, 3, TILES)), rtol=1e-5)
  np.testing.assert_array_equal(found["tile"], np.broadcast_to(np.arange(TILES), (2, 3, TILES)))


def test_padding_rows_are_not_seen():
  q, k, lse = inputs()
  run = jax.jit(mass)
  want = run(q, k, lse)
  q, k = (jnp.where(VALID[:, None, None], x, 1e4) for x in (q, k))
  for filler in (1e4, jnp.nan, -jnp.inf):
    np.testing.assert_array_equal(run(q, k, jnp.where(VALID, lse, filler)), want)


def test_lengths_per_sample():
  q, k, lse = inputs()
  other = np.array([3, 16, 16, 0, 16, 16, 16], np.int32)
  both = mass(q, k, lse, np.stack([KV_LEN, other]))
  seen = (np.arange(BLOCK) < other[:, None]).reshape(-1)
  assert relative_error(both[0], brute(q, k, lse)[0]) < 3e-6
  assert relative_error(both[1], brute(q, k, lse, seen)[1]) < 3e-6


def test_coarser_lse_loses_little(record_property):
  """A bf16 LSE scales a row's mass by at most exp(ulp / 2); a tile's mean moves more."""
  q, k, lse = inputs(seed=3)
  truth = brute(q, k, lse)
  rows = np.where(VALID, lse, 0).reshape(2, 3, TILES, BLOCK).sum(-1) / KV_LEN
  found = {
    "f32": truth,
    "bf16": mass(q, k, lse.astype(jnp.bfloat16)),
    "tile": mass(q, k, jnp.asarray(rows)),
    "none": mass(q, k, jnp.zeros((2, 3, TILES))),
  }
  rtol = float(np.exp(np.abs(lse).max() * 2.0**-8) - 1)
  np.testing.assert_allclose(found["bf16"], truth, rtol=rtol)
  share = {}
  for name, each in found.items():  # the true mass on the 3 tiles per row that are ranked first
    best = np.argsort(-np.asarray(each), -1, kind="stable")[..., :3]
    share[name] = np.take_along_axis(truth, best, -1).sum() / truth.sum()
    record_property(f"mass_kept_{name}", float(share[name]))
  assert share["f32"] >= share["bf16"] >= 0.999 * share["f32"]
  assert share["bf16"] > share["tile"] > 0.9 * share["f32"]
  # Within a row of tiles one number for all ranks the same.
  assert share["none"] == pytest.approx(share["tile"], rel=1e-6)


def test_stale_lse_gives_finite_masses():
  q, k, lse = inputs()
  assert np.isfinite(mass(q, k, lse - 500)).all()


def test_memory_is_not_quadratic():
  """16,384 tokens: scores of one head alone would be 1 GB."""
  tiles, block = 128, 128
  q = jax.ShapeDtypeStruct((1, tiles * block, 4, 16), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 4, tiles * block), jnp.bfloat16)
  kv_len = np.full(tiles, block, np.int32)

  def run(q, k, lse):
    return block_mass(q, k, lse, kv_len, block, reduce=lambda mass, _: (mass > 1).sum(-1))

  memory = jax.jit(run).lower(q, q, lse).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 32 * 2**20


def test_refusals():
  q, k, lse = inputs()
  with pytest.raises(ValueError, match="over one buffer of 6 tiles of 16 rows"):
    mass(q, k, lse, KV_LEN[:6])
  with pytest.raises(ValueError, match=r"lse must be \[b, h, n\]"):
    mass(q, k, lse[..., :5])


# ---- the Hopper kernel ---------------------------------------------------------------------------


def tile_inputs(block, kv_len, b, h, dtype=jnp.bfloat16):
  rng = np.random.default_rng(block)
  shape = (b, kv_len.shape[-1] * block, h, 32)
  q, k = (jnp.asarray(rng.standard_normal(shape) * 1.5, dtype) for _ in "qk")
  return q, k, jnp.asarray(rng.standard_normal((b, h, q.shape[1])) + 3, jnp.float32)


@pytest.mark.parametrize("block, dtype", [(64, jnp.bfloat16), (128, jnp.float16)])
def test_the_hopper_kernel_gives_the_same_masses(block, dtype):
  """Ragged and empty tiles, lengths per sample, dead rows, stale LSEs, a negative scale."""
  kv_len = np.array([[block, 37, 0], [1, block, block]], np.int32)
  q, k, lse = tile_inputs(block, kv_len, 2, 2, dtype)
  lse = lse.at[:, :, 3].set(-jnp.inf).at[:, 1, 5].set(-500.0)
  scale = 0.3 if block == 64 else -0.2
  with interpreted():
    found = block_mass(q, k, lse, kv_len, block, scale=scale, reduce=with_tile)
  want = block_mass(q, k, lse, kv_len, block, scale=scale, implementation="xla")
  # Exponents reach 60: rounding one to float32 moves its exponential by up to 60 * 2^-24 = 4e-6.
  ordinary = np.asarray(want) < 1e20
  assert relative_error(found["mass"], want) < 6e-6 and not ordinary.all()
  assert relative_error(np.asarray(found["mass"])[ordinary], np.asarray(want)[ordinary]) < 6e-6
  np.testing.assert_array_equal(found["tile"], np.broadcast_to(np.arange(3), (2, 2, 3)))


def test_sums_of_many_key_tiles(capfd):
  """More key tiles than are collected at once, and some behind the last; watched for races."""
  kv_len = np.full(66, 64, np.int32)
  q, k, lse = tile_inputs(64, kv_len, 1, 1)
  with interpreted(detect_races=True):
    run = jax.jit(hopper_block_scores.row_mass, static_argnames=("count", "scale"))
    found = run(q, k, lse, kv_len[None], jnp.array([65], jnp.int32), count=2, scale=0.2)
    found.block_until_ready()
  assert "RACE DETECTED" not in capfd.readouterr().out  # the detector prints and goes on
  natural = lse / np.log2(np.e)
  want = block_mass(q, k, natural, kv_len, 64, scale=0.2, implementation="xla")[0, 0, [65, 65]]
  assert relative_error(found, want) < 2e-6  # behind the last tile it is the last one again


def test_chunks_cross_heads(monkeypatch):
  monkeypatch.setattr(hopper_block_scores, "_MASSES", 8)
  monkeypatch.setattr(hopper_block_scores, "_LEAST_BLOCKS", 1)
  kv_len = np.array([64, 64, 40], np.int32)
  q, k, lse = tile_inputs(64, kv_len, 1, 3)
  with interpreted():
    found = block_mass(q, k, lse, kv_len, 64)  # 9 query tiles in chunks of 2
  assert relative_error(found, block_mass(q, k, lse, kv_len, 64, implementation="xla")) < 2e-6


@pytest.mark.parametrize("block, d, devices", [(64, 32, 1), (128, 64, 2), (128, 128, 1)])
def test_the_hopper_kernel_compiles(block, d, devices):
  """Without spills; heads stay on their devices."""
  x = jax.ShapeDtypeStruct((1, 9 * block, 4, d), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 4, 9 * block), jnp.bfloat16)
  split = (P(None, None, "data"), P(None, None, "data"), P(None, "data"))
  kv_len = np.full(9, block, np.int32)

  def run(q, k, lse):
    return block_mass(q, k, lse, kv_len, block, reduce=lambda mass, _: mass.argmax(-1))

  compiled = compile_for(run, x, x, lse, devices=devices, shardings=split)
  (kernel,) = compiled.kernels
  assert kernel.spill_stores == kernel.spill_loads == 0
  assert kernel.shared_bytes <= SHARED_LIMIT and kernel.registers <= 168
  collectives = "all-gather|all-reduce|all-to-all|collective-permute"
  assert not re.search(collectives, compiled.compiled.as_text())
