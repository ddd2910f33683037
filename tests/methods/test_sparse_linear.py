"""Sparse-linear attention: classes of tiles, neutral at init, the O(n^2) form, it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.methods.sparse_linear import SparseLinear
from tests.methods.layers import DIMS, RAGGED, finished, layer_of, run, tokens, where

METHOD = SparseLinear(critical=0.2, negligible=0.1)  # of 30 tiles: 6 and 3
TILE = RAGGED.arrays().scatter // RAGGED.block  # of each token


def classes(q, k):
  """Brute force: critical and negligible key tiles, bool `[b, h, tiles, tiles]`."""
  hot = np.eye(RAGGED.tiles)[TILE]

  def pool(x):
    return np.einsum("bnhd,nt->bhtd", np.asarray(x, np.float64), hot) / hot.sum(0)[:, None]

  rank = np.argsort(np.argsort(-np.einsum("bhid,bhjd->bhij", pool(q), pool(k)), -1), -1)
  return rank < 6, rank >= RAGGED.tiles - 3


def test_it_is_the_sparse_part_at_init_and_the_dense_form_after():
  layer, x = layer_of(METHOD), tokens()
  q, k, v, _ = finished(layer, x)
  critical, negligible = classes(q, k)

  def spread(a):
    return a[:, :, TILE][..., TILE]

  scores = jnp.where(spread(critical), jnp.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(8), -jnp.inf)
  sparse = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), v)
  out, aux = run(layer, x, where(want_masks=True))
  np.testing.assert_allclose(out, layer.out(sparse.reshape(2, RAGGED.n, 48)), atol=2e-5)
  np.testing.assert_array_equal(aux["mask"].to_tiles(), critical)

  rng = np.random.default_rng(1)
  layer.method.kernel[...] = rng.standard_normal((8, 8))
  layer.method.bias[...] = rng.standard_normal(8)
  weights = spread(~critical & ~negligible) * jnp.einsum(
    "bihd,bjhd->bhij", jax.nn.softmax(q), jax.nn.softmax(k)
  )
  linear = jnp.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
  want = layer.out((sparse + layer.method(linear)).reshape(2, RAGGED.n, DIMS.width))
  np.testing.assert_allclose(run(layer, x, where(want_masks=True))[0], want, atol=5e-5)


def test_the_projection_leaves_zero():
  layer = layer_of(METHOD)

  def loss(layer):
    out, _, _ = layer(tokens(), where(train=True), RAGGED.arrays(), {}, {})
    return (out**2).sum()

  for leaf in jax.tree.leaves(nnx.jit(nnx.grad(loss))(layer).method):
    assert np.any(leaf)


@pytest.mark.parametrize("tiles, want", [(100, (5, 10)), (30, (2, 3)), (3, (1, 0)), (1, (1, 0))])
def test_budgets_round_critical_up_and_negligible_down(tiles, want):
  assert SparseLinear().budgets(tiles) == want


def test_refusals():
  with pytest.raises(ValueError, match="together at most 1"):
    SparseLinear(critical=0.6, negligible=0.5)
  with pytest.raises(ValueError, match="above 0 and at most 1"):
    SparseLinear(critical=0.0)
  with pytest.raises(ValueError, match="feature_map"):
    SparseLinear(feature_map="exp")
