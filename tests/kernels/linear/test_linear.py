"""Linear attention against its O(n^2) form in float64, gradients, empties and padding too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.linear.api import FEATURE_MAPS, Segments, linear_attention

from tests.kernels.block_sparse.suite import relative_error, worst_error
from tools import offline

B = 2
N = 40
H = 3
D = 8
# Segment 1 is empty.
RAGGED = np.repeat([0, -1, 2, 0, 3, -1, 2], [5, 3, 12, 4, 1, 2, 13])
TILES = np.array([8, 3, 0, 8, 5], np.int32)
PHI = {"softmax": jax.nn.softmax, "elu": lambda x: jax.nn.elu(x) + 1, "relu": jax.nn.relu}


def dense(q, k, v, weights=1, feature_map="softmax"):
  """The O(n^2) form: `weights` `[b, h, n, n]` is how much query i reads of key j.

  Rows without any give 0, -inf and no gradient.
  """
  phi = PHI[feature_map]
  scores = weights * jnp.einsum("bihm,bjhm->bhij", phi(q), phi(k))
  total = scores.sum(-1)
  safe = jnp.where(total > 0, total, 1)
  out = jnp.einsum("bhij,bjhd->bihd", scores / safe[..., None], v)
  return out, jnp.where(total > 0, jnp.log(safe), -jnp.inf)


def oracle(qkv, weights, feature_map, d_out, d_log):
  """out, log_den, dq, dk, dv of `dense` in float64."""
  with jax.enable_x64(True):
    *qkv, d_out, d_log = (jnp.asarray(x, jnp.float64) for x in (*qkv, d_out, d_log))
    found, pull = jax.vjp(lambda *x: dense(*x, weights, feature_map), *qkv)
    return *found, *pull((d_out, d_log))


def draw(n=N, dtype=np.float32):
  """q, k and v, and the cotangents of both results."""
  rng = np.random.default_rng(0)
  *qkv, d_out = (rng.standard_normal((B, n, H, D)).astype(dtype) for _ in range(4))
  return qkv, d_out, rng.standard_normal((B, H, n)).astype(dtype)


def case(name):
  """segments, reads and the dense weights `[b or 1, h or 1, n, n]` they stand for."""
  if name == "whole":
    return None, None, np.ones((1, 1, N, N))
  if name == "ids":
    own = (RAGGED[:, None] == RAGGED) & (RAGGED >= 0)
    return Segments.of_ids(RAGGED), None, own[None, None].astype(float)
  segments = Segments.of_tiles(TILES, 8)
  tile, valid = np.repeat(np.arange(5), 8), (np.arange(8) < TILES[:, None]).reshape(-1)
  reads = np.random.default_rng(3).random((B, H, 5, 5)) > 0.4
  reads[:, 0, 0] = False  # a query tile that reads nothing
  if name == "tiles":
    reads = np.eye(5, dtype=bool)[None, None]
  weights = reads[:, :, tile][..., tile] & valid & valid[:, None]
  return segments, reads if name == "reads" else None, weights.astype(float)


def results(segments, reads=None, feature_map="softmax"):
  """Returns a jitted function of q, k, v and cotangents: both results and three gradients."""

  @jax.jit
  def run(q, k, v, d_out, d_log):
    def call(q, k, v):
      return linear_attention(q, k, v, segments, reads=reads, feature_map=feature_map)

    found, pull = jax.vjp(call, q, k, v)
    return *found, *pull((d_out, d_log))

  return run


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("name", ["whole", "ids", "tiles", "reads"])
def test_values_and_gradients_against_the_dense_form(name, feature_map):
  segments, reads, weights = case(name)
  qkv, *cotangents = draw()
  want = oracle(qkv, weights, feature_map, *cotangents)
  run = results(segments, reads, feature_map)
  got = run(*qkv, *cotangents)
  assert got[1].dtype == jnp.float32 and got[1].shape == (B, H, N)
  for x, y, again in zip(got, want, run(*qkv, *cotangents), strict=True):
    assert worst_error(x, y) <= 1e-4
    np.testing.assert_array_equal(x, again)


def test_nothing_outside_the_segments_is_read():
  """1e4 in rows of no segment, NaN for a cotangent there: nothing changes, they get nothing."""
  qkv, d_out, d_log = draw()
  none = RAGGED < 0
  dirty = [np.where(none[:, None, None], np.float32(1e4), x) for x in qkv]
  run = results(Segments.of_ids(RAGGED))
  clean = run(*qkv, d_out, d_log)
  soiled = run(*dirty, d_out, np.where(none, np.nan, d_log))
  for x, y in zip(clean, soiled, strict=True):
    np.testing.assert_array_equal(x, y)
  out, log_den, *grads = soiled
  assert (log_den[..., none] == -np.inf).all()
  assert all((x[:, none] == 0).all() for x in (out, *grads))


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


def gradients(form):
  """Returns a jitted function of q, k, v, d_out: the form's output and its gradients."""

  @jax.jit
  def run(q, k, v, d_out):
    out, pull = jax.vjp(lambda *x: form(*x)[0], q, k, v)
    return out, *pull(d_out)

  return run


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits_lose_no_more_than_the_plain_computation(dtype):
  """RMS errors against float64 are at most twice those of the O(n^2) form in the same dtype."""
  qkv, d_out, _ = draw(n=256)
  *low, d_low = (jnp.asarray(x, dtype) for x in (*qkv, d_out))
  out, _, *grads = oracle(low, 1, "softmax", d_low, np.zeros((B, H, 256)))
  errors = []
  for form in (linear_attention, dense):
    found = gradients(form)(*low, d_low)
    assert found[0].dtype == dtype
    errors.append([relative_error(x, y) for x, y in zip(found, (out, *grads), strict=True)])
  assert (np.array(errors[0]) <= 2 * np.array(errors[1])).all(), errors


def test_float64_stays_float64():
  qkv, *cotangents = draw(dtype=np.float64)
  want = oracle(qkv, np.ones((1, 1, N, N)), "elu", *cotangents)
  with jax.enable_x64(True):
    for x, y in zip(results(None, None, "elu")(*qkv, *cotangents), want, strict=True):
      assert x.dtype == jnp.float64
      assert worst_error(x, y) <= 1e-11


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"feature_map": "exp"}, "choose one of softmax, elu, relu"),
    ({"k": np.zeros((1, 4, 2, 4))}, "one shape and dtype"),
    ({"segments": Segments.whole(6)}, "describe 6 rows, the input has 8"),
    ({"reads": np.ones((1, 1, 3, 3))}, "1 x 1 segments"),
    ({"reads": np.ones((1, 3, 1, 1))}, r"reads must be \[b or 1, h or 1"),
    ({"heads": np.ones((1, 3), bool)}, "heads must be bool"),
    ({"into": np.zeros((1, 8, 2, 4))}, "into must come with heads"),
  ],
)
def test_refusals(options, words):
  q = np.zeros((1, 8, 2, 4))
  with pytest.raises(ValueError, match=words):
    linear_attention(**{"q": q, "k": q, "v": q, **options})


def test_memory_on_a_gpu_is_linear_in_n():
  """Compiled for an H100, 64 frames of 1,024 tokens: bytes of forward and backward, d = 128."""

  def both(q, k, v, segments):
    call = functools.partial(linear_attention, segments=segments, implementation="pallas_mgpu")
    out, pull = jax.vjp(call, q, k, v)
    return pull(out)

  frames, heads = 64, 4
  x = jax.ShapeDtypeStruct((1, frames * 1024, heads, 128), jnp.bfloat16)
  segments = Segments.of_ids(np.repeat(np.arange(frames), 1024))
  found = offline.compile_for(both, x, x, x, segments)
  assert found.temp_bytes <= 64 * frames * 1024 * heads
