"""Block mass against brute force; its approximations reported; its memory bounded."""

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
SCALE = (
  0.6  # of 8 channels: scores with a spread of some units, so that rows differ in what they look at
)


def inputs(seed=0, b=2, h=3, d=8, kv_len=KV_LEN, dtype=jnp.float32):
  """q, k and their row LSE `[b, h, n]` in float32; `dtype` rounds q and k first."""
  rng = np.random.default_rng(seed)
  q, k = (
    jnp.asarray(rng.standard_normal((b, len(kv_len) * BLOCK, h, d)) * 1.5, dtype) for _ in "qk"
  )
  scores = np.where(valid(kv_len), exact_scores(q, k), -np.inf)
  return q, k, jnp.asarray(np.log(np.exp(scores).sum(-1)), jnp.float32)


def valid(kv_len=KV_LEN):
  """bool `[n]`."""
  return (np.arange(BLOCK) < kv_len[:, None]).reshape(-1)


def exact_scores(q, k):
  return (
    np.einsum("bihd,bjhd->bhij", *(np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k)))
    * SCALE
  )


def brute(q, k, lse, kv_len=KV_LEN):
  """float64 `[b, h, tiles, tiles]`, with the n x n matrix."""
  seen = valid(kv_len)
  p = np.where(
    seen & seen[:, None], np.exp(exact_scores(q, k) - np.asarray(lse, np.float64)[..., None]), 0
  )
  tiles = len(kv_len)
  return p.reshape(*p.shape[:2], tiles, BLOCK, tiles, BLOCK).sum((3, 5))


def kept(mass, truth, count=3):
  """Share of the true mass on the `count` tiles per row that `mass` ranks first."""
  best = np.argsort(-np.asarray(mass), -1, kind="stable")[..., :count]
  return np.take_along_axis(truth, best, -1).sum() / truth.sum()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scores, rows", [(1 << 20, 1024), (2 * BLOCK**2, 16), (6 * BLOCK**2, 48)])
def test_equals_brute_force(monkeypatch, scores, rows, dtype):
  """Whatever the group and chunk sizes: 48 rows are 3 tiles of 7, 6 tiles of scores 2 key tiles."""
  monkeypatch.setattr(block_scores, "_SCORES", {"cpu": scores})
  monkeypatch.setattr(block_scores, "_GROUP_ROWS", rows)
  q, k, lse = inputs(dtype=dtype)
  got = jax.jit(lambda *x: block_mass(*x, KV_LEN, BLOCK, scale=SCALE))(q, k, lse)
  assert got.dtype == jnp.float32
  assert relative_error(got, brute(q, k, lse)) < 3e-6
  # A query tile's mass is its number of valid rows.
  np.testing.assert_allclose(got.sum(-1), np.broadcast_to(KV_LEN, (2, 3, TILES)), rtol=1e-5)


def test_padding_rows_are_not_seen():
  q, k, lse = inputs()
  want = block_mass(q, k, lse, KV_LEN, BLOCK, scale=SCALE)

  def soil(x, axis):
    return jnp.where(valid().reshape([-1 if i == axis else 1 for i in range(x.ndim)]), x, 1e4)

  for bad in (soil(lse, 2), jnp.where(valid(), lse, jnp.nan), jnp.where(valid(), lse, -jnp.inf)):
    np.testing.assert_array_equal(
      block_mass(soil(q, 1), soil(k, 1), bad, KV_LEN, BLOCK, scale=SCALE), want
    )


def test_lengths_per_sample():
  q, k, lse = inputs()
  other = np.array([3, 16, 16, 0, 16, 16, 16], np.int32)
  both = block_mass(q, k, lse, np.stack([KV_LEN, other]), BLOCK, scale=SCALE)
  assert relative_error(both[1], brute(q, k, lse, other)[1]) < 3e-6
  np.testing.assert_array_equal(both[0], block_mass(q, k, lse, KV_LEN, BLOCK, scale=SCALE)[0])


def test_reduce_sees_every_tile_once_with_its_number():
  q, k, lse = inputs()
  mass = block_mass(q, k, lse, KV_LEN, BLOCK, scale=SCALE)

  def best(mass, tile):
    return {"best": mass.argmax(-1), "tile": tile}

  found = block_mass(q, k, lse, KV_LEN, BLOCK, scale=SCALE, reduce=best)
  np.testing.assert_array_equal(found["best"], mass.argmax(-1))
  np.testing.assert_array_equal(found["tile"], np.broadcast_to(np.arange(TILES), (2, 3, TILES)))


def test_coarser_lse_loses_little(record_property):
  """A bf16 LSE scales a row's mass by at most exp(ulp / 2); a tile's mean moves more."""
  q, k, lse = inputs(seed=3)
  truth = brute(q, k, lse)
  rows = (np.where(valid(), lse, 0).reshape(2, 3, TILES, BLOCK)).sum(-1) / KV_LEN
  share = {"f32": kept(truth, truth)}
  for name, coarse in (
    ("bf16", lse.astype(jnp.bfloat16)),
    ("tile", jnp.asarray(rows)),
    ("none", jnp.zeros((2, 3, TILES))),
  ):
    mass = block_mass(q, k, coarse, KV_LEN, BLOCK, scale=SCALE)
    share[name] = kept(mass, truth)
    if name == "bf16":
      np.testing.assert_allclose(mass, truth, rtol=float(np.exp(np.abs(lse).max() * 2.0**-8) - 1))
  for name, value in share.items():
    record_property(f"mass_kept_{name}", float(value))
  print({k: round(float(v), 5) for k, v in share.items()})
  assert share["f32"] >= share["bf16"] >= 0.999 * share["f32"]
  assert share["bf16"] > share["tile"] > 0.9 * share["f32"]
  assert share["none"] == pytest.approx(
    share["tile"], rel=1e-6
  )  # within a row of tiles one number for all ranks the same


def test_stale_lse_gives_finite_masses():
  q, k, lse = inputs()
  assert np.isfinite(block_mass(q, k, lse - 500, KV_LEN, BLOCK, scale=SCALE)).all()


def test_memory_is_not_quadratic():
  """16,384 tokens: scores of one head alone would be 1 GB."""
  tiles, block = 128, 128
  q = jax.ShapeDtypeStruct((1, tiles * block, 4, 16), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 4, tiles * block), jnp.bfloat16)

  def count(mass, tile):
    return (mass > 1).sum(-1)

  run = jax.jit(
    lambda q, k, lse: block_mass(q, k, lse, np.full(tiles, block, np.int32), block, reduce=count)
  )
  assert run.lower(q, q, lse).compile().memory_analysis().temp_size_in_bytes < 32 * 2**20


def test_refusals():
  q, k, lse = inputs()
  with pytest.raises(ValueError, match="over one buffer of 6 tiles of 16 rows"):
    block_mass(q, k, lse, KV_LEN[:6], BLOCK)
  with pytest.raises(ValueError, match=r"lse must be \[b, h, n\]"):
    block_mass(q, k, lse[..., :5], KV_LEN, BLOCK)


# ---- the Hopper kernel ---------------------------------------------------------------------------


def tile_inputs(block, kv_len, b, h, d, dtype=jnp.bfloat16):
  rng = np.random.default_rng(block)
  q, k = (
    jnp.asarray(rng.standard_normal((b, kv_len.shape[-1] * block, h, d)) * 1.5, dtype) for _ in "qk"
  )
  return q, k, jnp.asarray(rng.standard_normal((b, h, q.shape[1])) + 3, jnp.float32)


@pytest.mark.parametrize("block, dtype", [(64, jnp.bfloat16), (128, jnp.float16)])
def test_the_hopper_kernel_gives_the_same_masses(block, dtype):
  """Ragged and empty tiles, lengths per sample, dead rows, stale LSEs, a negative scale."""
  kv_len = np.array([[block, 37, 0], [1, block, block]], np.int32)
  q, k, lse = tile_inputs(block, kv_len, 2, 2, 32, dtype)
  lse = lse.at[:, :, 3].set(-jnp.inf).at[:, 1, 5].set(-500.0)

  def best(mass, tile):
    return {"mass": mass, "tile": tile}

  for scale in (0.3, -0.2):
    with interpreted():
      found = block_mass(q, k, lse, kv_len, block, scale=scale, reduce=best)
    want = block_mass(q, k, lse, kv_len, block, scale=scale, implementation="xla")
    # Exponents reach 60: rounding one to float32 moves its exponential by up to 60 * 2^-24 = 4e-6.
    ordinary = np.asarray(want) < 1e20
    assert relative_error(found["mass"], want) < 6e-6 and not ordinary.all()
    assert relative_error(np.asarray(found["mass"])[ordinary], np.asarray(want)[ordinary]) < 6e-6
    np.testing.assert_array_equal(found["tile"], np.broadcast_to(np.arange(3), (2, 2, 3)))


def test_sums_of_many_key_tiles(capfd):
  """More key tiles than are collected at once, and some behind the last; watched for races."""
  kv_len = np.full(66, 64, np.int32)
  q, k, lse = tile_inputs(64, kv_len, 1, 1, 32)
  with interpreted(detect_races=True):
    found = jax.jit(
      lambda first: hopper_block_scores.row_mass(
        q, k, lse, kv_len[None], first, count=2, scale=0.2, largest=60.0
      )
    )(jnp.int32([65]))
    found.block_until_ready()
  assert "RACE DETECTED" not in capfd.readouterr().out  # the detector prints and goes on
  want = block_mass(q, k, lse / np.log2(np.e), kv_len, 64, scale=0.2, implementation="xla")[
    0, 0, 65
  ]
  assert (
    relative_error(found, np.stack([want, want])) < 2e-6
  )  # behind the last tile it is the last one again


def test_chunks_cross_heads(monkeypatch):
  monkeypatch.setattr(hopper_block_scores, "_MASSES", 8)
  monkeypatch.setattr(hopper_block_scores, "_LEAST_BLOCKS", 1)
  kv_len = np.array([64, 64, 40], np.int32)
  q, k, lse = tile_inputs(64, kv_len, 1, 3, 32)
  with interpreted():
    found = block_mass(q, k, lse, kv_len, 64)  # 9 query tiles in chunks of 2
  assert relative_error(found, block_mass(q, k, lse, kv_len, 64, implementation="xla")) < 2e-6


@pytest.mark.parametrize("block, d", [(64, 32), (128, 64), (128, 128)])
@pytest.mark.parametrize("devices", [1, 2])
def test_the_hopper_kernel_compiles(devices, block, d):
  """Without spills; heads stay on their devices."""
  x, lse = (
    jax.ShapeDtypeStruct((1, 9 * block, 4, d), jnp.bfloat16),
    jax.ShapeDtypeStruct((1, 4, 9 * block), jnp.bfloat16),
  )
  split = (P(None, None, "data"),) * 2 + (P(None, "data"),)

  def run(q, k, lse):
    return block_mass(
      q, k, lse, np.full(9, block, np.int32), block, reduce=lambda mass, _: mass.argmax(-1)
    )

  compiled = compile_for(run, x, x, lse, devices=devices, shardings=split)
  (kernel,) = compiled.kernels
  assert (
    kernel.spill_stores == kernel.spill_loads == 0
    and kernel.shared_bytes <= SHARED_LIMIT
    and kernel.registers <= 168
  )
  assert not re.search(
    "all-gather|all-reduce|all-to-all|collective-permute", compiled.compiled.as_text()
  )
