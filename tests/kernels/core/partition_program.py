"""Attention on four devices equals attention on one.

`tests/kernels/core/test_partition.py` runs this in a process with four CPU devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.block_sparse.suite import relative_error

B, H, N, D, BLOCK = 4, 2, 96, 16, 16


def tables(rng):
  """Tables with and without lists per sample and head, lengths per sample, a bias, stored lists."""
  tiles = N // BLOCK

  def table(b, h, kv_len, bias=None):
    counts = rng.integers(0, 4, (b, h, tiles)).astype(np.int32)
    ids = np.sort(np.argsort(rng.random((b, h, tiles, tiles)))[..., :4], -1).astype(np.int32)
    return jax.tree.map(jnp.asarray, BlockMask(ids, counts, kv_len, bias, BLOCK, BLOCK))

  full = np.full(tiles, BLOCK, np.int32)
  yield table(1, 1, full)
  yield table(B, H, rng.integers(1, BLOCK, (B, tiles)).astype(np.int32))
  yield table(1, H, full, rng.standard_normal(tiles).astype(np.float32)).with_launch()
  yield BlockMask(
    None, jnp.full((1, 1, tiles), tiles, jnp.int32), jnp.asarray(full), None, BLOCK, BLOCK
  )


def both(implementation, q, k, v, mask, d_out, d_lse):
  """Outputs and gradients of one call."""
  (out, lse), pull = jax.vjp(
    lambda q, k, v: attention(q, k, v, mask, implementation=implementation), q, k, v
  )
  return out, lse, *pull((d_out, d_lse))


def main():
  devices = np.array(jax.devices()).reshape(2, 2)
  assert devices.size == 4
  mesh = Mesh(devices, ("data", "heads"))
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  q, k, v, d_out = (normal(B, N, H, D) for _ in range(4))
  d_lse = normal(B, H, N)
  for i, mask in enumerate(tables(rng)):
    # The xla backend holds constants and loops and is slow to compile: once.
    call = functools.partial(both, "xla" if i == 1 else "reference")
    expected = jax.jit(call)(q, k, v, mask, d_out, d_lse)

    def place(x, *spec):
      return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    x = [place(x, "data", None, "heads") for x in (q, k, v, d_out)]
    args = (*x[:3], jax.tree.map(place, mask), x[3], place(d_lse, "data", "heads"))
    run = jax.jit(call).lower(*args).compile()
    text = run.as_text()
    assert "all-gather" not in text and "all-to-all" not in text, "q, k or v left their device"
    found = run(*args)
    assert found[0].sharding.spec == P("data", None, "heads"), found[0].sharding
    for a, b in zip(found, expected, strict=True):
      assert relative_error(a, b) < 1e-6
  print("same on four devices")


if __name__ == "__main__":
  main()
