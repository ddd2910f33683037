"""Linear attention against its O(n^2) form in float64 NumPy, gradients, empties and padding too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.linear.api import FEATURE_MAPS, Segments, linear_attention

from tools import offline

B, N, H, D = 2, 40, 3, 8
RAGGED = np.array(
  [0] * 5 + [-1] * 3 + [2] * 12 + [0] * 4 + [3] * 1 + [-1] * 2 + [2] * 13
)  # 1 is empty
TILES = np.array([8, 3, 0, 8, 5], np.int32)


def phi64(x, name):
  """The feature map in NumPy and its derivative applied to a cotangent."""
  if name == "softmax":
    e = np.exp(x - x.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    return p, lambda g: p * (g - (g * p).sum(-1, keepdims=True))
  if name == "elu":
    return np.where(
      x > 0, x + 1, np.exp(np.minimum(x, 0))
    ), lambda g: g * np.where(x > 0, 1, np.exp(np.minimum(x, 0)))
  return np.maximum(x, 0), lambda g: g * (x > 0)


def oracle(q, k, v, weights, name, d_out, d_log):
  """The dense form: `weights` `[b, h, n, n]` is how much query i reads of key j.

  Rows without any give 0, -inf and no gradient.
  """
  (fq, back_q), (fk, back_k) = phi64(q, name), phi64(k, name)
  scores = weights * np.einsum("bihm,bjhm->bhij", fq, fk)
  den = scores.sum(-1)
  some = den > 0
  safe = np.where(some, den, 1)
  p = scores / safe[..., None]
  out = np.einsum("bhij,bjhd->bihd", p, v)
  d_out = d_out * some.transpose(0, 2, 1)[..., None]
  delta = np.where(some, np.where(some, d_log, 0) - np.einsum("bihd,bihd->bhi", d_out, out), 0)
  ds = weights * (np.einsum("bihd,bjhd->bhij", d_out, v) + delta[..., None]) / safe[..., None]
  dq, dk = (
    back_q(np.einsum("bhij,bjhm->bihm", ds, fk)),
    back_k(np.einsum("bhij,bihm->bjhm", ds, fq)),
  )
  with np.errstate(divide="ignore"):
    return out, np.log(den), dq, dk, np.einsum("bhij,bihd->bjhd", p, d_out)


def draw(seed=0, n=N, dtype=np.float64):
  rng = np.random.default_rng(seed)
  qkv = [rng.standard_normal((B, n, H, D)) for _ in range(3)]
  return (
    [x.astype(dtype) for x in qkv],
    rng.standard_normal((B, n, H, D)),
    rng.standard_normal((B, H, n)),
  )


def case(name):
  """segments, reads and the dense weights `[b or 1, h or 1, n, n]` they stand for."""
  if name == "whole":
    return None, None, np.ones((1, 1, N, N))
  if name == "ids":
    return (
      Segments.of_ids(RAGGED),
      None,
      ((RAGGED[:, None] == RAGGED) & (RAGGED >= 0))[None, None].astype(float),
    )
  segments = Segments.of_tiles(TILES, 8)
  tile, valid = np.repeat(np.arange(5), 8), (np.arange(8) < TILES[:, None]).reshape(-1)
  own = (tile[:, None] == tile) & valid & valid[:, None]
  if name == "tiles":
    return segments, None, own[None, None].astype(float)
  reads = np.random.default_rng(3).random((B, H, 5, 5)) > 0.4
  reads[:, 0, 0] = False  # a query tile that reads nothing
  weights = reads[:, :, tile][..., tile] & valid & valid[:, None]
  return segments, reads, weights.astype(float)


def close(got, want, tolerance):
  """RMS-relative."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  there = np.isfinite(want)
  np.testing.assert_array_equal(np.isfinite(got), there)
  got, want = got[there], want[there]
  assert np.abs(got - want).max() <= tolerance * max(np.sqrt((want**2).mean()), 1e-3), np.abs(
    got - want
  ).max()


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("name", ["whole", "ids", "tiles", "reads"])
def test_values_and_gradients_against_the_dense_form(name, feature_map):
  segments, reads, weights = case(name)
  (q, k, v), d_out, d_log = draw(dtype=np.float32)
  want = oracle(*(x.astype(np.float64) for x in (q, k, v)), weights, feature_map, d_out, d_log)

  @jax.jit
  def run(q, k, v, segments, reads, d_out, d_log):
    def call(q, k, v):
      return linear_attention(q, k, v, segments, reads=reads, feature_map=feature_map)

    (out, log_den), rule = jax.vjp(call, q, k, v)
    return out, log_den, *rule((d_out, d_log))

  args = (q, k, v, segments, reads, d_out.astype(np.float32), d_log.astype(np.float32))
  got = run(*args)
  assert got[1].dtype == jnp.float32 and got[1].shape == (B, H, N)
  for x, y in zip(got, want, strict=True):
    close(x, y, 1e-4)
  for x, y in zip(got, run(*args), strict=True):
    np.testing.assert_array_equal(x, y)  # deterministic


def test_nothing_outside_the_segments_is_read():
  segments, (q, k, v) = Segments.of_ids(RAGGED), draw(dtype=np.float32)[0]
  dirty = [np.where((RAGGED < 0)[:, None, None], 1e4, x).astype(np.float32) for x in (q, k, v)]

  def run(q, k, v):
    (out, log_den), rule = jax.vjp(lambda *a: linear_attention(*a, segments), q, k, v)
    return (
      out,
      log_den,
      *rule((jnp.full_like(out, 3), jnp.where(jnp.isfinite(log_den), 2.0, jnp.nan))),
    )

  for x, y in zip(run(q, k, v), run(*dirty), strict=True):
    np.testing.assert_array_equal(x, y)
  out, log_den, *grads = run(q, k, v)
  assert (out[:, RAGGED < 0] == 0).all() and (log_den[..., RAGGED < 0] == -np.inf).all()
  for g in grads:
    assert np.isfinite(g).all() and (g[:, RAGGED < 0] == 0).all()


def test_a_vanishing_denominator_is_an_empty_row():
  """softmax features of far-apart logits do not overlap in float32: 0 and -inf, not nan."""
  q = np.zeros((1, 2, 1, 4), np.float32)
  k = q.copy()
  q[..., 0], k[..., 1] = 200, 200

  def loss(q):
    out, log_den = linear_attention(q, k, np.ones(q.shape, np.float32))
    return out.sum() + jnp.where(jnp.isfinite(log_den), log_den, 0).sum()

  out, log_den = linear_attention(q, k, np.ones(q.shape, np.float32))
  assert (out == 0).all() and (log_den == -np.inf).all() and (jax.grad(loss)(q) == 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits_lose_no_more_than_the_plain_computation(dtype):
  """RMS errors against float64 are at most twice those of the O(n^2) form in the same dtype."""
  (q, k, v), d_out, _ = draw(n=256)
  low, d_low = [jnp.asarray(x, dtype) for x in (q, k, v)], jnp.asarray(d_out, dtype)
  wide = [np.asarray(x, np.float64) for x in (*low, d_low)]
  out, _, *grads = oracle(
    *wide[:3], np.ones((1, 1, 256, 256)), "softmax", wide[3], np.zeros((B, H, 256))
  )

  def plain(q, k, v):
    scores = jnp.einsum("bihm,bjhm->bhij", jax.nn.softmax(q), jax.nn.softmax(k))
    return jnp.einsum("bhij,bjhd->bihd", scores / scores.sum(-1, keepdims=True), v)

  errors = []
  for f in (lambda *x: linear_attention(*x)[0], plain):
    y, rule = jax.vjp(f, *low)
    assert y.dtype == dtype
    pairs = zip((y, *rule(d_low)), (out, *grads), strict=True)
    errors.append([np.sqrt(((np.asarray(a, np.float64) - b) ** 2).mean()) for a, b in pairs])
  assert (np.array(errors[0]) <= 2 * np.array(errors[1])).all(), errors


def test_segments_of_ids_put_every_row_back():
  segments = Segments.of_ids(RAGGED)
  assert segments.length.tolist() == [9, 0, 25, 1] and segments.size == 25
  x = jnp.arange(N, dtype=jnp.float32)[None, :, None, None] + 1
  back = segments.scatter(segments.gather(x))[0, :, 0, 0]
  np.testing.assert_array_equal(back, np.where(RAGGED >= 0, np.arange(N) + 1, 0))


def test_float64_stays_float64():
  with jax.enable_x64(True):
    (q, k, v), d_out, d_log = draw()
    want = oracle(q, k, v, np.ones((1, 1, N, N)), "elu", d_out, d_log)
    (out, log_den), rule = jax.vjp(
      lambda *a: linear_attention(*a, feature_map="elu"), *map(jnp.asarray, (q, k, v))
    )
    for x, y in zip(
      (out, log_den, *rule((jnp.asarray(d_out), jnp.asarray(d_log)))), want, strict=True
    ):
      assert x.dtype == jnp.float64
      close(x, y, 1e-11)


def test_refusals():
  q = jnp.zeros((1, 8, 2, 4))
  with pytest.raises(ValueError, match="choose one of softmax, elu, relu"):
    linear_attention(q, q, q, feature_map="exp")
  with pytest.raises(ValueError, match="one shape and dtype"):
    linear_attention(q, q[:, :4], q)
  with pytest.raises(ValueError, match="describe 6 rows, the input has 8"):
    linear_attention(q, q, q, Segments.of_ids(np.zeros(6, int)))
  with pytest.raises(ValueError, match="2 x 2 segments"):
    linear_attention(
      q, q, q, Segments.of_tiles(np.array([4, 4], np.int32), 4), reads=np.ones((1, 1, 3, 3))
    )


def test_memory_on_a_gpu_is_linear_in_n():
  """Compiled for an H100: temporary bytes of forward and backward per token and head.

  d = 128, frames of 1,024 tokens.
  """

  def temporary(frames):
    def both(q, k, v, segments):
      out, rule = jax.vjp(
        lambda *x: linear_attention(*x, segments, implementation="pallas_mgpu"), q, k, v
      )
      return rule(out)

    x = jax.ShapeDtypeStruct((1, frames * 1024, 4, 128), jnp.bfloat16)
    found = offline.compile_for(both, x, x, x, Segments.of_ids(np.repeat(np.arange(frames), 1024)))
    return found.temp_bytes / (frames * 1024 * 4)

  small, large = temporary(16), temporary(64)
  assert large <= 1.05 * small <= 64, (small, large)
