"""Ops on several devices: every device runs its own samples and heads, nothing is gathered.

A kernel is opaque to XLA's partitioner: left alone it would gather q, k and v of the whole batch
and run them on every device. Here it learns that samples and heads are independent: operands keep
whatever sharding these two dimensions have, all other dimensions are made whole. On one device, and
inside `shard_map`, this adds nothing to the program.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def several_devices() -> bool:
  """Returns True if the code being traced may be split over devices."""
  return jax.device_count() > 1 or jax.sharding.get_abstract_mesh().size > 1


def by_sample_and_head(fn: Callable, operands: tuple, operand_dims: Any, result_dims: Any) -> Any:
  """Runs `fn(*operands)`, split over devices along samples and heads where the operands are.

  Dimensions of an array are a string with one letter each: "b" samples, "h" heads, "." (or a
  missing letter at the end) anything else. A leaf with size 1 for samples or heads serves all.

  Args:
    fn: a function of arrays that treats samples and heads independently, and so runs on parts.
    operands: pytrees of arrays; the first one is an array with samples and heads.
    operand_dims: a tree of strings whose structure is a prefix of the operands'.
    result_dims: likewise of what `fn` returns.
  """
  leaves, tree = jax.tree.flatten(operands)
  outer = jax.sharding.get_abstract_mesh()

  def flat(*leaves):
    return fn(*jax.tree.unflatten(tree, leaves))

  # What is partitioned may hold no constants: they become operands; a part has its own.
  whole, structure = jax.make_jaxpr(flat, return_shape=True)(*leaves)
  count = len(leaves)
  constants = whole.consts
  size = dict(zip(operand_dims[0], leaves[0].shape, strict=False))
  operand_letters = _letters(operand_dims, operands, size)
  operand_letters += ["." * np.ndim(constant) for constant in constants]
  result_letters = _letters(result_dims, structure, size)
  results = jax.tree.structure(structure)

  def all_of_it(*leaves_and_constants):
    leaves = leaves_and_constants[:count]
    out = jax.core.eval_jaxpr(whole.jaxpr, leaves_and_constants[count:], *leaves)
    return jax.tree.unflatten(results, out)

  def partition(mesh, arg_shapes, result_shape):
    del result_shape
    axes = {"b": None, "h": None, ".": None}
    for letters, leaf in zip(operand_letters, arg_shapes, strict=True):
      for letter, axis in zip(letters, _spec(leaf), strict=False):
        if letter != "." and axes[letter] is None:
          axes[letter] = axis

    def place(letters):
      return NamedSharding(mesh, PartitionSpec(*(axes[letter] for letter in letters)))

    def local(*leaves_and_constants):
      # The target is read off the mesh that was set when the program was traced.
      with jax.sharding.use_abstract_mesh(outer):
        return flat(*leaves_and_constants[:count])

    placed = jax.tree.unflatten(results, [place(letters) for letters in result_letters])
    return mesh, local, placed, tuple(place(letters) for letters in operand_letters)

  call = custom_partitioning(all_of_it)
  call.def_partition(partition, sharding_rule=_rule(operand_letters, result_letters))
  return call(*leaves, *constants)


def _letters(dims, arrays, size: dict[str, int]) -> list[str]:
  """Returns one letter per dimension of every leaf of `arrays`."""

  def of_leaf(letters, x):
    pairs = zip(letters.ljust(np.ndim(x), "."), np.shape(x), strict=True)
    return "".join("." if n != size.get(letter) else letter for letter, n in pairs)

  def of_subtree(letters, subtree):
    return [of_leaf(letters, x) for x in jax.tree.leaves(subtree)]

  return jax.tree.leaves(jax.tree.map(of_subtree, dims, arrays))


def _spec(leaf) -> tuple:
  spec = getattr(leaf.sharding, "spec", None)
  return tuple(spec) if spec is not None else ()


def _rule(operand_letters, result_letters) -> str:
  """Returns Shardy's einsum-like rule: b and h are shared, other dimensions have own factors."""
  number = itertools.count()

  def side(all_letters):
    return ", ".join(
      " ".join(letter if letter != "." else f"x{next(number)}" for letter in letters)
      for letters in all_letters
    )

  return f"{side(operand_letters)} -> {side(result_letters)}"
