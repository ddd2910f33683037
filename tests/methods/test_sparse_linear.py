"""Sparse-linear attention: classes of tiles, neutral at init, the O(n^2) form, it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqformer.grid.layout import TileLayout
from freqformer.grid.rotary import rotate
from freqformer.methods.sparse_linear import SparseLinear
from tests.methods.method_training import trains
from tests.methods.test_sparseflow import LAYOUT, layer_of, run, tokens, where

METHOD = SparseLinear(critical=0.2, negligible=0.1)  # of 30 tiles: 6 and 3


def parts(layer, x, layout=LAYOUT):
  """q, k, v `[b, n, h, d]` in raster order, normed and rotated, and each token's tile."""
  arrays = layout.arrays()
  q, k, v = jnp.unstack(layer.qkv(arrays.unpack(x)).reshape(2, layout.n, 3, 6, 8), axis=2)
  position = np.stack(np.unravel_index(np.arange(layout.n), layout.grid), -1).astype(np.float32)
  q = rotate(layer.q_norm(q), position)
  k = rotate(layer.k_norm(k), position)
  return q, k, v, arrays.scatter // layout.block


def classes(q, k, tile):
  """Brute force: critical and negligible key tiles, bool `[b, h, tiles, tiles]`."""
  hot = np.eye(LAYOUT.tiles)[tile]

  def pool(x):
    return np.einsum("bnhd,nt->bhtd", np.asarray(x, np.float64), hot) / hot.sum(0)[:, None]

  rank = np.argsort(np.argsort(-np.einsum("bhid,bhjd->bhij", pool(q), pool(k)), -1), -1)
  return rank < 6, rank >= LAYOUT.tiles - 3


def test_it_is_the_sparse_part_at_init_and_the_dense_form_after():
  layer, x = layer_of(METHOD), tokens()
  q, k, v, tile = parts(layer, x)
  critical, negligible = classes(q, k, tile)

  def spread(a):
    return a[:, :, tile][..., tile]

  scores = jnp.where(spread(critical), jnp.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(8), -jnp.inf)
  sparse = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), v)
  out, aux = run(layer, x, where(want_masks=True))
  np.testing.assert_allclose(out, layer.out(sparse.reshape(2, LAYOUT.n, 48)), atol=2e-5)
  np.testing.assert_array_equal(aux["mask"].to_tiles(), critical)
  np.testing.assert_allclose(aux["density"], aux["mask"].density(LAYOUT.n), rtol=1e-6)

  rng = np.random.default_rng(1)
  layer.method.kernel[...] = rng.standard_normal((8, 8))
  layer.method.bias[...] = rng.standard_normal(8)
  weights = spread(~critical & ~negligible) * jnp.einsum(
    "bihd,bjhd->bhij", jax.nn.softmax(q), jax.nn.softmax(k)
  )
  linear = jnp.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
  want = layer.out((sparse + layer.method(linear)).reshape(2, LAYOUT.n, 48))
  np.testing.assert_allclose(run(layer, x)[0], want, atol=5e-5)


@pytest.mark.parametrize("tiles, want", [(100, (5, 10)), (30, (2, 3)), (3, (1, 0)), (1, (1, 0))])
def test_budgets_round_critical_up_and_negligible_down(tiles, want):
  assert SparseLinear().budgets(tiles) == want


def test_a_single_token_works():
  layout = TileLayout.fit((1, 1, 1), 32)
  out, _ = run(layer_of(METHOD, layout), tokens(layout), layout=layout)
  assert np.isfinite(out).all()


def test_it_trains_and_the_projection_leaves_zero():
  before, after = trains("sparse_linear", dict(critical=0.2))
  before, after = (dict(params.flat_state()) for params in (before, after))
  paths = [path for path in before if "method" in path]
  assert len(paths) == 2  # kernel and bias of the stacked layers
  for path in paths:
    assert not np.any(before[path][...]) and np.any(after[path][...])


def test_refusals():
  with pytest.raises(ValueError, match="together at most 1"):
    SparseLinear(critical=0.6, negligible=0.5)
  with pytest.raises(ValueError, match="in \\(0, 1\\]"):
    SparseLinear(critical=0.0)
  with pytest.raises(ValueError, match="feature_map"):
    SparseLinear(feature_map="exp")
