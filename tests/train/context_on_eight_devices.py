"""Devices that share the tokens of a sample compute what one computes; `test_mesh.py` runs it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import from_tiles

from freqformer.analysis.hlo_bytes import collectives, operations
from freqformer.placement import split
from freqformer.train.mesh import MeshConfig, make_mesh, whole_mesh
from tests.train.on_eight_devices import BATCH, SHAPE, assert_equal, drawn, trained

HEADS = 8
# All methods that train, a layer each. Freqformer runs all of its branches in training. Octaves are
# a model of their own: they also learn from a teacher, which is dense.
METHODS = (
  ("octaves",),
  (
    "freqformer",
    "sliding_tile(window=(1, 3, 3), unit=tiles)",
    "block_topk",
    "sparseflow",
    "sparse_linear",
  ),
)


@pytest.mark.parametrize("methods", METHODS, ids=["octaves", "others"])
def test_a_step_equals_one_device(methods):
  alone = trained(methods, 1, 1, heads=HEADS)
  together = trained(methods, 1, 1, context=8, heads=HEADS)
  assert_equal(together, alone)
  moved = operations(together[-1].as_text())
  assert any(op.opcode.startswith("all-to-all") for op in moved)
  # Tokens are exchanged, never gathered, nor is what a method makes of them: neither at once nor
  # bit by bit.
  tokens = 4 * BATCH * math.prod(SHAPE[:3]) * 12 * HEADS
  gathered = [op.result for op in moved if op.opcode.startswith("all-gather")]
  assert max(gathered) < tokens / 10
  assert sum(gathered) < tokens / 4


def test_a_step_equals_one_device_on_all_three_axes():
  """Heads that are dealt to devices by their cost stay themselves."""
  methods = ("dense", "freqformer(allocation=(1, 4, 3))", "sparseflow(allocation=(3, 5))")
  alone = trained(methods, 1, 1, heads=HEADS)
  assert_equal(trained(methods, 2, 2, context=2, heads=HEADS), alone)


def test_fewer_heads_than_devices_exchange_tiles():
  window = "sliding_tile(window=(1, 2, 2), unit=tiles, deal=octant, border=clip)"
  methods = (window, "radial(sink=0)")
  alone = trained(methods, 1, 1, heads=4)
  together = trained(methods, 1, 1, context=8, heads=4)
  assert_equal(together, alone)
  moved = collectives(together[-1].as_text())
  assert "collective-permute" in moved and "all-to-all" not in moved


def test_samples_equal_those_of_one_device():
  """Two groups of four devices; the methods measure heads and search for masks."""
  methods = ("spatial_temporal", "adaspa")
  wanted = drawn(methods, make_mesh(MeshConfig(1), 8), HEADS)
  assert len(wanted) == 10 and np.ptp(wanted) > 1
  found = drawn(methods, whole_mesh(context=4), HEADS)
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
