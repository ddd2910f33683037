"""Attention on several devices: every device runs its own samples and heads, nothing is gathered.

A kernel is opaque to XLA's partitioner: left alone it would gather q, k and v of the whole batch and run them on every device.
Here it learns that samples and heads are independent: operands keep whatever sharding these two dimensions have, all other
dimensions are made whole. On one device, and inside `shard_map`, this adds nothing to the program.
"""

import itertools

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def several_devices() -> bool:
  """Whether the code being traced now may be split over devices."""
  return jax.device_count() > 1 or jax.sharding.get_abstract_mesh().size > 1


def table_dims(mask, b: int, h: int) -> list[str]:
  """Which dimensions of a `BlockMask`'s leaves are samples and heads of a call with `b` and `h` of them; size 1 serves all."""

  def dims(x):
    # Everything per head starts [b or 1, h or 1]; kv_len alone may be [b, kv_tiles]. Both 1-D leaves are per key tile.
    lead = {1: ".", 2: "b."}.get(x.ndim, "bh" + "." * (x.ndim - 2))
    return "".join(
      d if d == "." or size == {"b": b, "h": h}[d] > 1 else "."
      for d, size in zip(lead, x.shape, strict=True)
    )

  return [dims(x) for x in jax.tree.leaves(mask)]


def by_sample_and_head(fn, operands, operand_dims, result_dims):
  """`fn(*operands)`, split over devices along samples and heads where the operands are.

  Args:
    fn: a function of arrays that treats samples and heads independently; it also runs on a part of them.
    operands: pytrees of arrays.
    operand_dims: one string per leaf of `operands`, one letter per dimension: "b" samples, "h" heads, "." anything else.
    result_dims: the same of what `fn` returns, in the structure that it returns.

  Returns:
    What `fn` returns.
  """
  leaves, tree = jax.tree.flatten(operands)
  outer = jax.sharding.get_abstract_mesh()

  def flat(*leaves):
    return fn(*jax.tree.unflatten(tree, leaves))

  # What is partitioned may not hold constants: they become operands, whole on every device. A part has constants of its own.
  whole, structure = jax.make_jaxpr(flat, return_shape=True)(*leaves)
  count, constants = len(leaves), whole.consts
  operand_dims = [*operand_dims, *("." * np.ndim(c) for c in constants)]

  def all_of_it(*leaves_and_constants):
    leaves, constants = leaves_and_constants[:count], leaves_and_constants[count:]
    out = jax.core.eval_jaxpr(whole.jaxpr, constants, *leaves)
    return jax.tree.unflatten(jax.tree.structure(structure), out)

  def partition(mesh, arg_shapes, result_shape):
    axes = {"b": None, "h": None, ".": None}
    for dims, leaf in zip(operand_dims, arg_shapes, strict=True):
      for letter, axis in zip(dims, _spec(leaf), strict=False):
        if letter != "." and axes[letter] is None:
          axes[letter] = axis

    def place(dims):
      return NamedSharding(mesh, PartitionSpec(*(axes[letter] for letter in dims)))

    def local(*leaves_and_constants):
      with jax.sharding.use_abstract_mesh(
        outer
      ):  # the device that the program is for, as seen when it was traced
        return flat(*leaves_and_constants[:count])

    del result_shape
    return mesh, local, jax.tree.map(place, result_dims), tuple(map(place, operand_dims))

  call = custom_partitioning(all_of_it)
  call.def_partition(partition, sharding_rule=_rule(operand_dims, jax.tree.leaves(result_dims)))
  return call(*leaves, *constants)


def _spec(leaf):
  spec = getattr(leaf.sharding, "spec", None)
  return tuple(spec) if spec is not None else ()


def _rule(operand_dims, result_dims) -> str:
  """Shardy's einsum-like rule: b and h are shared, every other dimension has a factor of its own."""
  number = itertools.count()

  def side(all_dims):
    return ", ".join(
      " ".join(d if d != "." else f"x{next(number)}" for d in dims) for dims in all_dims
    )

  return f"{side(operand_dims)} -> {side(result_dims)}"
