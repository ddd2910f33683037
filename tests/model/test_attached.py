"""Methods beside a model of somebody's own: raster order, phases, memory, density, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqformer
from freqformer.config import ConfigError

GRID = (4, 6, 8)
SIZES = dict(heads=2, head_dim=16, layers=2, steps=6, block=16)


def drawn(batch=2):
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(key, (batch, 192, 2, 16)) for key in keys]


def plain(q, k, v):
  weights = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / 4, -1)
  return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def test_dense_is_attention_in_raster_order():
  sparse = freqformer.attach("dense", GRID, **SIZES)
  out = sparse(*drawn(), layer=0, step=0)
  np.testing.assert_allclose(out, plain(*drawn()), atol=1e-5)
  density = sparse.stats()["density"]
  assert density.shape == (6, 2, 2) and (density[0, 0] == 1).all()
  assert np.isnan(density[1:]).all() and np.isnan(density[0, 1]).all()


@pytest.mark.parametrize("guided", [False, True])
def test_what_a_method_finds_stays_with_its_layer(guided):
  """AdaSpa: dense warm-up, a search, and lists that are used again, others in another layer."""
  method = "adaspa(sparsity=0.5, warmup=1, search=(1,))"
  sparse = freqformer.attach(method, GRID, **SIZES, guided=guided)
  q, k, v = drawn()
  found = {}
  for step in range(4):
    for layer, queries in enumerate((q, q[:, ::-1])):
      found[step, layer] = sparse(queries, k, v, layer=layer, step=step)
  np.testing.assert_allclose(found[0, 0], plain(q, k, v), atol=1e-5)
  assert float(jnp.abs(found[2, 0] - found[0, 0]).max()) > 1e-3
  np.testing.assert_array_equal(found[2, 0], found[3, 0])
  density = sparse.stats()["density"]
  assert (density[0] == 1).all() and (density[2:4] < 0.7).all() and np.isnan(density[4:]).all()
  sparse.detach()
  np.testing.assert_allclose(sparse(q, k, v, layer=1, step=5), plain(q, k, v), atol=1e-5)
  assert np.isnan(sparse.stats()["density"][:5]).all()


@pytest.mark.parametrize(
  "method", ["sliding_tile", "radial", "block_topk(density=0.5, coarse=none)"]
)
def test_methods_without_memory(method):
  sparse = freqformer.attach(method, GRID, **SIZES)
  assert sparse(*drawn(), layer=1, step=3).shape == (2, 192, 2, 16)
  assert 0 < sparse.stats()["density"][3, 1].mean() <= 1


@pytest.mark.parametrize(
  "method, words",
  [
    ("octaves", "need training"),
    ("nothing", "nothing"),
    ("freqformer(allocation=(1, 1, 0))", "cannot be attached to finished q and k"),
  ],
)
def test_methods_that_need_more_are_refused(method, words):
  with pytest.raises(ConfigError, match=words):
    freqformer.attach(method, GRID, **SIZES)(*drawn(), layer=0, step=0)


def test_other_shapes_are_refused():
  sparse = freqformer.attach("dense", GRID, **SIZES)
  q, k, v = drawn()
  with pytest.raises(ConfigError, match=r"attached was \[b, 192, 2, 16\]"):
    sparse(q[:, 1:], k, v, layer=0, step=0)
  with pytest.raises(ConfigError, match="layer=2 and step=0 must lie below"):
    sparse(q, k, v, layer=2, step=0)
