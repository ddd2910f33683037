"""Attention over several devices: each runs its own samples and heads, and the numbers stay.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.kernels.core.test_partition
"""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.block_sparse.suite import relative_error

B = 4
H = 2
N = 96
D = 16
BLOCK = 16


def test_four_devices_equal_one():
  """In a process of its own: the number of CPU devices is fixed when jax starts."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
  run = subprocess.run(
    [sys.executable, "-m", "tests.kernels.core.test_partition"],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[3],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
  )
  assert run.returncode == 0, run.stderr[-3000:]


def tables(rng):
  """Tables with and without lists per sample and head, lengths per sample, a bias, stored lists."""
  tiles = N // BLOCK

  def table(b, h, kv_len, bias=None):
    counts = rng.integers(0, 4, (b, h, tiles)).astype(np.int32)
    ids = np.sort(np.argsort(rng.random((b, h, tiles, tiles)))[..., :4], -1).astype(np.int32)
    return jax.tree.map(jnp.asarray, BlockMask(ids, counts, kv_len, bias, BLOCK, BLOCK))

  full = np.full(tiles, BLOCK, np.int32)
  every = jnp.full((1, 1, tiles), tiles, jnp.int32)
  return {
    "reference": [
      table(1, 1, full),
      table(1, H, full, rng.standard_normal(tiles).astype(np.float32)).with_launch(),
      BlockMask(None, every, jnp.asarray(full), None, BLOCK, BLOCK),
    ],
    # Holds constants and loops, and is slow to compile.
    "xla": [table(B, H, rng.integers(1, BLOCK, (B, tiles)).astype(np.int32))],
  }


def results(q, k, v, d_out, d_lse, tables):
  """Outputs and gradients of a call with each table."""
  found = []
  for implementation, masks in tables.items():
    for mask in masks:
      call = functools.partial(attention, mask=mask, implementation=implementation)
      found.append(jax.vjp(call, q, k, v))
  return [(*outs, *pull((d_out, d_lse))) for outs, pull in found]


def main():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "heads"))
  rng = np.random.default_rng(0)
  rows = [jnp.asarray(rng.standard_normal((B, N, H, D)), jnp.float32) for _ in range(4)]
  d_lse = jnp.asarray(rng.standard_normal((B, H, N)), jnp.float32)
  masks = tables(rng)

  def place(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))

  args = (
    *(place(x, "data", None, "heads") for x in rows),
    place(d_lse, "data", "heads"),
    jax.tree.map(place, masks),
  )
  run = jax.jit(results).lower(*args).compile()
  text = run.as_text()
  assert "all-gather" not in text and "all-to-all" not in text, "q, k or v left their device"
  for found, want in zip(run(*args), jax.jit(results)(*rows, d_lse, masks), strict=True):
    assert found[0].sharding.spec == P("data", None, "heads"), found[0].sharding
    for a, b in zip(found, want, strict=True):
      assert relative_error(a, b) < 1e-6


if __name__ == "__main__":
  main()
