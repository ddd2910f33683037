"""The portable backend: conformance, float64, long lists, memory; and what `attention` refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse import xla
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask, dense_mask, from_tiles

from tests.kernels.block_sparse.suite import (
  CASES,
  AttentionSuite,
  Case,
  draw_inputs,
  draw_mask,
  oracle,
  relative_error,
  value_and_grads,
)


class TestXla(AttentionSuite):
  implementation = "xla"

  @pytest.fixture(autouse=True)
  def _two_tiles_in_a_chunk(self, monkeypatch):
    """The small lists of the suite would fit into one chunk."""
    monkeypatch.setattr(xla, "_CHUNK_KEYS", 128)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float64, 1e-13), (jnp.float32, 3e-6)])
def test_with_x64_enabled(implementation, dtype, limit):
  """Float64 stays float64; index arithmetic does not widen, and float32 stays float32."""
  with jax.enable_x64(True):
    case = dataclasses.replace(CASES[2], bias=True)
    mask, data = draw_mask(case, 8), draw_inputs(case, 8, dtype)
    got = value_and_grads(implementation)(*data[:3], mask, *data[3:])
    for g, w in zip(got, oracle(*data[:3], mask, *data[3:]), strict=True):
      assert g.dtype == dtype
      assert relative_error(g, w) < limit


def test_lists_longer_than_a_chunk():
  """Several chunks per row, unequal counts in a group: the online softmax and its loop bound."""
  sizes = {"h": 3, "table_h": 3, "d": 8, "n_q": 256, "n_kv": 4096, "block_q": 32, "keep": 0.6}
  case = Case("long", **sizes)
  mask, data = draw_mask(case, 10), draw_inputs(case, 10, jnp.float32)
  got = value_and_grads("xla")(*data[:3], mask, *data[3:])
  for g, w in zip(got, oracle(*data[:3], mask, *data[3:]), strict=True):
    assert relative_error(g, w) < 3e-6


def test_no_mask_is_plain_attention():
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((2, 77, 3, 16)), jnp.float32) for _ in range(3))
  assert relative_error(attention(q, k, v)[0], jax.nn.dot_product_attention(q, k, v)) < 3e-6


def test_memory_is_linear_in_tokens():
  """Nothing n x n: at 16,384 tokens one head's score matrix alone would be 1 GB."""
  n, d = 16384, 64
  x = jax.ShapeDtypeStruct((1, n, 1, d), jnp.float32)
  grad = jax.grad(lambda *x: attention(*x, dense_mask(n, n))[0].sum(), argnums=(0, 1, 2))
  memory = jax.jit(grad).lower(x, x, x).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 24 * n * d * 4 + 64e6


ROWS = np.zeros((1, 128, 2, 32), np.float32)
BY_HEAD = dataclasses.replace(dense_mask(128, 128), kv_counts=np.ones((1, 3, 1), np.int32))


@pytest.mark.parametrize(
  ("call", "error", "words"),
  [
    (lambda: attention(*[ROWS] * 3, dense_mask(64, 64, 64, 64)), ValueError, "build the table"),
    (lambda: attention(*[ROWS] * 3, BY_HEAD), ValueError, "each must match or be 1"),
    (lambda: attention(ROWS, ROWS, np.int32(ROWS)), ValueError, "must share one of"),
    (lambda: attention(ROWS, *[ROWS[..., :16]] * 2), ValueError, "equal b and d"),
    (lambda: attention(ROWS, ROWS, ROWS[..., :16]), ValueError, "equal b and d"),
    (lambda: attention(ROWS[:, :, :1], ROWS, ROWS), ValueError, "h_kv divides h"),
    (
      lambda: attention(*[ROWS.swapaxes(1, 2)] * 3, dense_mask(128, 128, 64, 64)),
      ValueError,
      r"has 2 query rows.*in the order \[b, h, n, d\] need x.swapaxes",
    ),
    (
      lambda: attention(*[ROWS] * 3, np.ones((128, 128), bool)),
      TypeError,
      r"must be a BlockMask or None, got bool \(128, 128\).*from_tiles.*dot_product_attention",
    ),
    (lambda: attention(*[ROWS] * 3, "causal"), TypeError, "must be a BlockMask or None, got str"),
    (
      lambda: jax.jit(lambda scale: attention(*[ROWS] * 3, scale=scale))(0.5),
      TypeError,
      "scale must be a number.*Multiply q by",
    ),
    (lambda: attention(*[ROWS] * 3, scale=np.ones(2)), TypeError, "scale must be a number"),
  ],
)
def test_calls_that_are_refused_say_what_to_do(call, error, words):
  with pytest.raises(error, match=words):
    call()


def test_a_table_of_other_rows_is_not_taken_for_another_order():
  with pytest.raises(ValueError, match="for this buffer.$"):
    attention(*[ROWS] * 3, dense_mask(512, 512))


LIES = {
  "id": dict(kv_indices=np.array([[[[0, 9], [0, 1]]]], np.int32)),
  "order": dict(kv_indices=np.array([[[[1, 0], [0, 1]]]], np.int32)),
  "twice": dict(kv_indices=np.array([[[[1, 1], [0, 1]]]], np.int32)),
  "count": dict(kv_counts=np.full((1, 1, 2), 5, np.int32)),
  "length": dict(kv_len=np.array([64, 65], np.int32)),
}


@pytest.mark.parametrize("lie", LIES)
def test_tables_that_lie_are_refused(lie):
  """NumPy's and JAX's, and those that a jitted function closes over; traced ones are believed."""
  good = from_tiles(np.ones((2, 2), bool), [64, 64], 64, 64)
  bad = dataclasses.replace(good, **LIES[lie])
  x = ROWS[..., :1]
  jax.eval_shape(lambda x: attention(x, x, x, good), x)
  for table in (bad, jax.tree.map(jnp.asarray, bad)):
    with pytest.raises(ValueError, match="kv_"):
      attention(x, x, x, table, implementation="reference")
    with pytest.raises(ValueError, match="kv_"):
      jax.eval_shape(lambda x, table=table: attention(x, x, x, table), x)
  jax.eval_shape(attention, x, x, x, bad)


def test_a_table_is_checked_once(monkeypatch):
  checks = []
  check = BlockMask.check
  monkeypatch.setattr(BlockMask, "check", lambda self: checks.append(None) or check(self))
  table = from_tiles(np.ones((2, 2), bool), [64, 64], 64, 64)
  for _ in range(2):
    jax.eval_shape(lambda x: attention(x, x, x, table), ROWS)
  assert len(checks) == 1
