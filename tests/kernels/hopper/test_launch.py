"""Launched kernels under JAX's transformations: mapped, and inside `shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import dense_mask
from freqformer.kernels.hopper.interpret import interpreted
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tools import offline


def test_mapped_launches_follow_each_other():
  x = jax.random.normal(jax.random.key(0), (2, 1, 64, 1, 32), jnp.bfloat16)
  mask = dense_mask(64, 64, 64, 64)
  with interpreted():
    found = jax.vmap(lambda x: attention(x, x, x, mask, implementation="pallas_mgpu")[0])(x)
  want = jax.vmap(lambda x: attention(x, x, x)[0])(x)
  np.testing.assert_allclose(found.astype(np.float32), want.astype(np.float32), atol=2e-2)


@pytest.mark.parametrize("check", [True, False])
def test_inside_shard_map(check):
  """Results vary over the axes that operands vary over, gradients too: JAX compares the types."""
  gpus = offline.mesh(2)
  x = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)
  gradient = jax.grad(lambda q: attention(q, q, q)[0].astype(jnp.float32).sum())
  mapped = jax.shard_map(
    gradient, mesh=gpus, in_specs=P("data"), out_specs=P("data"), check_vma=check
  )
  with jax.sharding.use_abstract_mesh(gpus.abstract_mesh):
    program = str(jax.make_jaxpr(mapped)(x))
  assert all(f"attention_{kernel}" in program for kernel in ("forward", "dq", "dkv"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_two_gpus(kind):
  """The kernels are found under `vmap` and on either kind of mesh; keys have fewer heads."""
  mesh = offline.mesh(2).abstract_mesh.update_axis_types({"data": kind})
  x = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
  gradient = jax.grad(lambda q: attention(q, *[q[:, :, :1]] * 2)[0].astype(jnp.float32).sum())
  for run in (gradient, jax.vmap(lambda x: gradient(x[None])[0])):
    with jax.sharding.use_abstract_mesh(mesh):
      program = str(jax.make_jaxpr(run)(x))
    assert all(f"attention_{kernel}" in program for kernel in ("forward", "dq", "dkv"))
    split = "shard_map" if kind == AxisType.Explicit else "custom_partitioning"
    assert split in program
