"""Devices that share the tokens of a sample compute what one computes; `test_mesh.py` runs it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import from_tiles

from freqformer.analysis.hlo_bytes import collectives
from freqformer.placement import split
from freqformer.train.mesh import MeshConfig, make_mesh, whole_mesh
from tests.train.on_eight_devices import BATCH, SHAPE, assert_equal, drawn, trained

HEADS = 8
# All methods that train. Freqformer runs all of its branches in training.
METHODS = (
  "dense",
  "freqformer",
  "octaves",
  "sliding_tile(window=(1, 3, 3), unit=tiles)",
  "block_topk",
  "sparseflow",
  "sparse_linear",
)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_equals_one_device(method):
  alone = trained(method, 1, 1, heads=HEADS)
  together = trained(method, 1, 1, context=8, heads=HEADS)
  assert_equal(together, alone)
  if method in ("dense", "freqformer"):
    assert_equal(trained(method, 2, 2, context=2, heads=HEADS), alone)
  moved = collectives(together[-1].as_text())
  assert "all-to-all" in moved
  # Tokens are exchanged, never gathered, nor is what a method makes of them.
  tokens = 4 * BATCH * math.prod(SHAPE[:3]) * 12 * HEADS
  assert moved["all-gather"][1] < tokens / 10


@pytest.mark.parametrize(
  "method", ["freqformer(allocation=(1, 4, 3))", "sparseflow(allocation=(3, 5))"]
)
def test_heads_that_are_dealt_by_cost_stay_themselves(method):
  alone = trained(method, 1, 1, heads=HEADS)
  assert_equal(trained(method, 2, 1, context=4, heads=HEADS), alone)


@pytest.mark.parametrize(
  "method",
  ["sliding_tile(window=(1, 2, 2), unit=tiles, deal=octant, border=clip)", "radial(sink=0)"],
)
def test_fewer_heads_than_devices_exchange_tiles(method):
  alone = trained(method, 1, 1, heads=4)
  together = trained(method, 1, 1, context=8, heads=4)
  assert_equal(together, alone)
  assert "collective-permute" in collectives(together[-1].as_text())


@pytest.mark.parametrize("method", ["octaves", "spatial_temporal", "adaspa"])
def test_samples_equal_those_of_one_device(method):
  """The latter two measure heads and search for masks on the way."""
  wanted = drawn(method, make_mesh(MeshConfig(1), 8), HEADS)
  found = drawn(method, whole_mesh(context=8), HEADS)
  np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_forward_lse_and_gradients_equal_one_device():
  rng = np.random.default_rng(0)
  tiles = rng.random((1, HEADS, 5, 5)) < 0.5
  lengths = np.array([16, 16, 9, 16, 1])
  mask = from_tiles(tiles, lengths, block_q=16, block_kv=16)
  q, k, v, d_out = rng.standard_normal((4, 2, 80, HEADS, 16), np.float32)
  valid = (np.arange(16) < lengths[:, None]).reshape(-1)
  d_out *= valid[:, None, None]
  d_lse = rng.standard_normal((2, HEADS, 80), np.float32) * valid
  d_lse = np.where(np.isfinite(np.asarray(attention(q, k, v, mask)[1])), d_lse, 0)

  @jax.jit
  def both(q, k, v, mask, d_out, d_lse):
    def run(*qkv):
      out, lse = attention(*(split(x, context=2) for x in qkv), mask)
      return out, lse

    out, pull = jax.vjp(run, q, k, v)
    return out, pull((d_out, d_lse))

  arrays = (q, k, v, mask, jnp.asarray(d_out), jnp.asarray(d_lse))
  wanted = both(*arrays)
  with jax.set_mesh(whole_mesh(context=8)):
    found = both(*arrays)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
