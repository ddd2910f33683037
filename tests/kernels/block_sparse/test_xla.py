"""The portable backend: conformance, float64, long lists, memory; and what `attention` refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse import xla
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import dense_mask

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


@pytest.mark.parametrize(
  ("dtype", "mask", "words"),
  [
    (jnp.float32, dense_mask(64, 64, 64, 64), "build the table for this buffer"),
    (jnp.int32, None, "must share one of"),
    (
      jnp.float32,
      dataclasses.replace(dense_mask(128, 128), kv_counts=np.ones((1, 3, 1), np.int32)),
      "each must match or be 1",
    ),
  ],
)
def test_inputs_that_contradict_the_table_are_refused(dtype, mask, words):
  q = jnp.zeros((1, 128, 2, 32))
  with pytest.raises(ValueError, match=words):
    attention(q, q, q.astype(dtype), mask)
