"""The Hopper kernels of linear attention on a machine without one: numerics, work, refusals."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.hopper.interpret import interpreted
from freqformer.kernels.linear import segments
from freqformer.kernels.linear.api import Segments, linear_attention
from jax.sharding import PartitionSpec as P

from freqformer.grid.layout import TileLayout
from tests.kernels.block_sparse.suite import relative_error
from tools import offline

# Runs of 40 rows: boxes of 8. Segment 2 is empty, 3 short of rows, one box has no segment at all.
FRAMES = np.repeat([0, 1, 3, 0, 4], [40, 40, 16, 24, 40]).astype(np.int32)
FRAMES[[7, 8, 50, 79]] = -1
FRAMES[88:96] = -1
# Runs of 18 rows, as frames of 21 x 30 x 52 have: boxes that two segments share.
MIXED = np.repeat([0, 1, 2, 0, 1, 2, -1], [18, 18, 18, 18, 18, 18, 20]).astype(np.int32)
TILES = np.array([64, 13, 0, 64, 30], np.int32)


def draw(segments, b, h, d):
  """Returns q, k, v, d_out and into, and the cotangent of log_den."""
  rng = np.random.default_rng(d)
  shape = (b, segments.buffer, h, d)
  rows = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(5)]
  return rows, rng.standard_normal((b, h, segments.buffer)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(implementation, feature_map, rows, d_log, segments, reads=None, heads=None):
  """Returns both results, and the gradients of q, k, v and into."""
  *qkv, d_out, into = rows

  def call(q, k, v, into):
    return linear_attention(
      q,
      k,
      v,
      segments,
      reads=reads,
      heads=heads,
      into=None if heads is None else into,
      feature_map=feature_map,
      implementation=implementation,
    )

  found, pull = jax.vjp(call, *qkv, into)
  return *found, *pull((d_out, d_log))


def in_chunks(n):
  with mock.patch.object(segments, "_MAX_CHUNK_STAGES", 2):
    return Segments.whole(n)


READS = np.random.default_rng(0).random((2, 1, 5, 5)) > 0.5
# Name -> feature map, samples, head dimension, segments, options.
CASES = {
  "frames": ("softmax", 1, 64, Segments.of_ids(FRAMES), {}),
  "mixed": ("elu", 1, 64, Segments.of_ids(MIXED), {"heads": np.array([[False, True]])}),
  "heads": ("elu", 2, 128, Segments.of_tiles(TILES[:2], 64), {"heads": np.eye(2, dtype=bool)}),
  "tiles": ("relu", 2, 64, Segments.of_tiles(TILES, 64), {"reads": READS}),
  "chunks": ("elu", 1, 64, in_chunks(200), {"heads": np.array([[True, False]])}),
}


@pytest.mark.parametrize("name", CASES)
def test_errs_no_more_than_xla(name):
  """RMS errors against float32 are at most 1.2 times XLA's with the same bfloat16 operands."""
  feature_map, b, d, segments, options = CASES[name]
  rows, d_log = draw(segments, b, 2 if "heads" in options else 1, d)
  with interpreted():
    got = run("pallas_mgpu", feature_map, rows, d_log, segments, **options)
  plain = run("xla", feature_map, rows, d_log, segments, **options)
  wide = [x.astype(jnp.float32) for x in rows]
  want = run("xla", feature_map, wide, d_log, segments, **options)
  names = ("out", "log_den", "dq", "dk", "dv", "d_into")
  for what, x, y, z in zip(names, got, plain, want, strict=True):
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    found, allowed = relative_error(x, z), 1.2 * relative_error(y, z) + 1e-7
    assert found <= allowed, (what, found, allowed)
  if "heads" in options:
    others = ~np.broadcast_to(options["heads"], (b, 2))
    out, into = (np.asarray(x).transpose(0, 2, 1, 3)[others] for x in (got[0], rows[4]))
    np.testing.assert_array_equal(out, into)


def test_rows_without_a_segment_and_repeats():
  """Rows of no segment, 1e4 or NaN, change nothing and get nothing; two runs are equal."""
  segments = Segments.of_ids(FRAMES)
  rows, d_log = draw(segments, 1, 1, 64)
  none = FRAMES < 0
  dirt = (1e4, 1e4, 1e4, jnp.nan, 0)
  dirty = [
    jnp.where(none[:, None, None], jnp.asarray(y, x.dtype), x)
    for x, y in zip(rows, dirt, strict=True)
  ]
  with interpreted():
    clean = run("pallas_mgpu", "softmax", rows, d_log, segments)
    soiled = run("pallas_mgpu", "softmax", dirty, np.where(none, np.nan, d_log), segments)
  for x, y in zip(clean[:5], soiled[:5], strict=True):
    np.testing.assert_array_equal(x, y)
  out, log_den, *gradients = clean
  assert (log_den[..., none] == -np.inf).all()
  assert all((x[:, none] == 0).all() for x in (out, *gradients[:3]))


def test_no_races(capfd):
  """Rings that wrap around, several boxes a stage.

  No box stands for a second time, which would be a race that is meant.
  """
  segments = Segments.of_ids(np.tile(np.repeat([0, 1], 32), 10))
  rows, d_log = draw(segments, 1, 1, 64)
  with interpreted(detect_races=True):
    jax.block_until_ready(run("pallas_mgpu", "softmax", rows, d_log, segments))
  assert "RACE DETECTED" not in capfd.readouterr().out  # the detector prints and goes on


@pytest.mark.parametrize("seed", range(8))
def test_work_covers_every_row_once(seed):
  """Random runs, empty segments, rows of none: what the stages hold, and who owns them."""
  rng = np.random.default_rng(seed)
  longest = 20 * (1 + 20 * (seed == 0))
  runs = rng.integers(-1, 5, 12)
  ids = np.repeat(runs, (8 - seed % 2) * rng.integers(2, longest, 12)).astype(np.int32)
  ids[rng.random(len(ids)) < 0.1] = -1
  ids[:8] = 6  # 5 is empty
  ids = ids[: len(ids) // 8 * 8]
  segments = Segments.of_ids(ids)
  work = segments.work
  rows = (work.boxes[..., None] * work.box + np.arange(work.box)).reshape(-1)
  np.testing.assert_array_equal(rows[work.back], np.arange(len(ids)))
  np.testing.assert_array_equal(np.bincount(rows, work.fresh, len(ids)), ids >= 0)
  np.testing.assert_array_equal(work.valid[work.back] > 0, ids >= 0)
  assert work.mixed == bool(seed % 2)
  chunks = zip(work.start, work.count, strict=True)
  stages = np.concatenate([np.arange(start, start + count) for start, count in chunks])
  np.testing.assert_array_equal(np.sort(stages), np.arange(len(work.boxes)))
  owner = np.repeat(np.arange(len(work.start)) // work.per_segment, work.count)[np.argsort(stages)]
  owner = np.where(owner < segments.count, owner, -1).repeat(64)
  np.testing.assert_array_equal(work.valid > 0, (ids[rows] == owner) & (owner >= 0))
  assert work.count.max() <= 32


def test_work_on_video():
  """Frames of whole tiles cost no row twice, frames that share boxes do; short ones are refused."""

  def frames(layout):
    arrays = layout.arrays()
    return np.where(arrays.valid, arrays.positions[:, 0], -1).astype(np.int32)

  even = TileLayout.fit((16, 64, 64), 128)
  odd = TileLayout.fit((21, 30, 52), 128)
  work = Segments.of_ids(frames(even)).work
  assert work.box == 32
  assert work.rows == even.n_buffer
  assert work.fresh.all()
  assert not work.mixed
  work = Segments.of_ids(frames(odd)).work
  assert work.mixed
  assert work.rows < 1.35 * odd.n_buffer
  assert Segments.of_ids(np.arange(256) % 4).work is None
  assert Segments.of_ids(np.zeros(60, np.int32)).work is None
  assert Segments.of_tiles(TILES, 32).work is None


def test_in_place_and_on_two_devices():
  """Compiled for two H100s: the output that is written into is not copied, nothing is gathered."""
  x = jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16)
  heads = jax.ShapeDtypeStruct((2, 4), jnp.bool_)

  def call(q, k, v, d_out, segments, heads):
    def f(q, k, v):
      options = {"heads": heads, "into": jnp.sin(v), "implementation": "pallas_mgpu"}
      return linear_attention(q, k, v, segments, **options)[0]

    out, pull = jax.vjp(f, q, k, v)
    return out, pull(d_out)

  places = (P(None, None, "data"),) * 4 + (P(), P(None, "data"))
  segments = Segments.of_ids(np.tile(np.repeat(np.arange(4), 32), 8))
  found = offline.compile_for(call, *[x] * 4, segments, heads, devices=2, shardings=places)
  text = found.compiled.as_text()
  assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)
  assert [k.name.rsplit("_", 1)[0] for k in found.kernels].count("linear_read") == 1
  assert "bf16[2,1024,2,64]{3,2,1,0} copy(" not in text
