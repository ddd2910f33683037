"""The portable backend: conformance, float64, long lists, and the memory it promises."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse import xla
from freqformer.kernels.block_sparse.api import ATTENTION, attention
from freqformer.kernels.block_sparse.table import dense_mask
from freqformer.kernels.core.target import Target

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

  def run(self, q, k, v, mask, d_out, d_lse):
    """In chunks of two tiles: the small lists of the suite would fit into one."""
    with mock.patch.object(xla, "_CHUNK_KEYS", 2 * mask.block_kv):
      return super().run(q, k, v, mask, d_out, d_lse)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_float64(implementation):
  with jax.enable_x64(True):
    for case in CASES[1:5]:
      mask, data = draw_mask(case, 8), draw_inputs(case, 8, jnp.float64)
      got = value_and_grads(*data[:3], mask, *data[3:], implementation)
      for g, w in zip(got, oracle(*data[:3], mask, *data[3:]), strict=True):
        assert g.dtype == jnp.float64
        assert relative_error(g, w) < 1e-13


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_float32_with_x64_enabled(implementation):
  """Index arithmetic must not widen, and float32 must stay float32."""
  with jax.enable_x64(True):
    mask, data = draw_mask(CASES[2], 9), draw_inputs(CASES[2], 9, jnp.float32)
    got = value_and_grads(*data[:3], mask, *data[3:], implementation)
    for g, w in zip(got, oracle(*data[:3], mask, *data[3:]), strict=True):
      assert g.dtype == jnp.float32
      assert relative_error(g, w) < 3e-6


def test_lists_longer_than_a_chunk():
  """Several chunks per row, unequal counts in a group: the online softmax and its loop bound."""
  case = Case(
    "long", b=1, h=3, d=8, n_q=256, n_kv=4096, block_q=32, block_kv=64, keep=0.6, table_h=3
  )
  mask, data = draw_mask(case, 10), draw_inputs(case, 10, jnp.float32)
  for g, w in zip(
    value_and_grads(*data[:3], mask, *data[3:], "xla"),
    oracle(*data[:3], mask, *data[3:]),
    strict=True,
  ):
    assert relative_error(g, w) < 3e-6


def test_large_scores_do_not_overflow():
  q = jnp.full((1, 64, 1, 4), 100.0)
  out, lse = attention(q, q, q, implementation="xla")
  np.testing.assert_allclose(out, 100, rtol=1e-6)
  np.testing.assert_allclose(lse, 100.0 * 100 * 4 / 2 + np.log(64), rtol=1e-6)


def test_no_mask_is_plain_attention():
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((2, 77, 3, 16)), jnp.float32) for _ in range(3))
  assert relative_error(attention(q, k, v)[0], jax.nn.dot_product_attention(q, k, v)) < 3e-6


def test_memory_is_linear_in_tokens():
  """Nothing n x n: at 16,384 tokens one head's score matrix alone would be 1 GB."""
  n, d = 16384, 64
  shape = jax.ShapeDtypeStruct((1, n, 1, d), jnp.float32)
  grad = jax.jit(
    jax.grad(lambda q, k, v: attention(q, k, v, dense_mask(n, n))[0].sum(), argnums=(0, 1, 2))
  )
  bytes_ = grad.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes
  assert bytes_ < 24 * n * d * 4 + 64e6


def test_automatic_choice_goes_on_to_the_next(monkeypatch):
  q = jnp.zeros((1, 8, 1, 4))
  call = (q, q, q, dense_mask(8, 8))
  cpu = Target("cpu", "cpu")
  assert ATTENTION.choose(*call, target=cpu) == "xla"
  monkeypatch.setattr(xla, "unsupported", lambda *a: "d=4 is below 64", raising=False)
  assert ATTENTION.choose(*call, target=cpu) == "reference"
