"""Ops on several devices: every device runs its own samples and heads, nothing is gathered.

A kernel is opaque to XLA's partitioner: left alone it would gather q, k and v of the whole batch
and run them on every device. Here it learns that samples and heads are independent: operands keep
whatever sharding these two dimensions have, all other dimensions are made whole. On one device, and
inside `shard_map`, this adds nothing to the program.

Where shardings are part of the types (the Explicit axes of a mesh), `shard_map` does it. Elsewhere
they are known to the partitioner alone, which asks through `custom_partitioning`.
"""

import dataclasses
import functools
import itertools
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def several_devices() -> bool:
  """Returns True if the code being traced may be split over devices."""
  return jax.device_count() > 1 or jax.sharding.get_abstract_mesh().size > 1


def inside_shard_map() -> bool:
  """Returns True if the code being traced is one device's: nothing is left to be split."""
  mesh = jax.sharding.get_abstract_mesh()
  return bool(mesh.manual_axes) and not mesh.explicit_axes


def explicit_mesh(tree: Any) -> AbstractMesh | None:
  """Returns the mesh on whose Explicit axes arrays are typed, set or not; None if on none.

  The partitioner does not share work along these axes, be they of one device.
  """
  kinds = (jax.typeof(x) for x in jax.tree.leaves(tree))
  meshes = [jax.sharding.get_abstract_mesh(), *(kind.sharding.mesh for kind in kinds)]
  return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def by_sample_and_head(fn: Callable, operands: tuple, operand_dims: Any, result_dims: Any) -> Any:
  """Runs `fn(*operands)`, split over devices along samples and heads where the operands are.

  Dimensions of an array are a string with one letter each: "b" samples, "h" heads, "." (or a
  missing letter at the end) anything else. A leaf with size 1 for samples or heads serves all.

  Args:
    fn: a function of arrays that treats samples and heads independently, and so runs on parts.
    operands: pytrees of arrays; the first one is an array with samples and heads.
    operand_dims: a tree of strings whose structure is a prefix of the operands'.
    result_dims: likewise of what `fn` returns.

  Raises:
    ValueError: if operands are sharded along Explicit axes of a mesh in another way.
  """
  leaves, tree = jax.tree.flatten(operands)

  def nested(*leaves):
    return fn(*jax.tree.unflatten(tree, leaves))

  def flat(*leaves):
    return jax.tree.leaves(nested(*leaves))

  whole, structure = _traced(nested, leaves)
  size = dict(zip(operand_dims[0], leaves[0].shape, strict=False))
  operand_letters = _letters(operand_dims, operands, size)
  result_letters = _letters(result_dims, structure, size)
  call = _Call(flat, whole, operand_letters, result_letters)
  return jax.tree.unflatten(jax.tree.structure(structure), call(*leaves))


def _traced(fn: Callable, leaves: Sequence) -> tuple:
  """Returns the program of `fn` on whole arrays and the structure of its results.

  Explicit axes count as automatic, as if the arrays were on one device: not every program can be
  typed on them.
  """
  outer = jax.sharding.get_abstract_mesh()
  if explicit_mesh(leaves) is not None:
    types = (jax.typeof(x) for x in leaves)
    leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in types]
    outer = outer.update_axis_types(dict.fromkeys(outer.explicit_axes, AxisType.Auto))
  with jax.sharding.use_abstract_mesh(outer):
    return jax.make_jaxpr(fn, return_shape=True)(*leaves)


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
  """A function of arrays and how it may be split; called, it runs on arrays like those traced.

  Attributes:
    fn: takes and returns flat lists of arrays; it runs on parts, too.
    whole: its program on whole arrays.
    operand_letters, result_letters: a letter for each dimension of each array; those that share a
      letter other than "." are split alike.
  """

  fn: Callable
  whole: Any
  operand_letters: list[str]
  result_letters: list[str]

  def __call__(self, *leaves):
    split = custom_vmap(self._split)
    split.def_vmap(self._mapped)
    run = jax.custom_jvp(split)
    run.defjvp(self._differentiated)
    return run(*leaves)

  def _split(self, *leaves):
    mesh = explicit_mesh(leaves)
    if mesh is not None:
      return self._by_type(mesh, leaves)
    return self._by_partitioner(leaves)

  def _mapped(self, axis_size: int, mapped: Sequence[bool], *leaves):
    """Runs the mapped function, whose new dimension may be split as samples and heads may."""
    del axis_size
    known = {letter for letters in self.operand_letters for letter in letters}
    new = next(letter for letter in string.ascii_uppercase if letter not in known)
    pairs = zip(self.operand_letters, mapped, strict=True)
    operand_letters = [new + letters if own else letters for letters, own in pairs]
    result_letters = [new + letters for letters in self.result_letters]
    fn = jax.vmap(self.fn, in_axes=[0 if own else None for own in mapped])
    whole, _ = _traced(fn, leaves)
    found = _Call(fn, whole, operand_letters, result_letters)(*leaves)
    return found, [True] * len(found)

  def _differentiated(self, primals, tangents):
    """Differentiates the function as it is, which XLA then partitions as it can."""
    mesh = explicit_mesh(primals)
    fn = self.fn if mesh is None else functools.partial(self._shard_mapped, mesh)
    return jax.jvp(lambda *leaves: fn(*leaves), primals, tangents)

  def _by_type(self, mesh: AbstractMesh, leaves: Sequence):
    # In a program of its own, because some operands may not be on the mesh yet.
    return jax.jit(functools.partial(self._shard_mapped, mesh))(*leaves)

  def _shard_mapped(self, mesh: AbstractMesh, *leaves):
    """Runs the function by `shard_map` over all Explicit axes of the mesh."""
    axes = self._axes([jax.typeof(x).sharding.spec for x in leaves])
    operand_specs = [_place(letters, axes) for letters in self.operand_letters]
    for x, letters, spec in zip(leaves, self.operand_letters, operand_specs, strict=True):
      _check_type(jax.typeof(x), letters, spec)
    used = [axis for entry in axes.values() for axis in _names(entry)]
    if len(used) > len(set(used)):
      raise ValueError(
        f"samples and heads are sharded along the same axis of the mesh ({axes}); use jax.reshard "
        "on the operands first"
      )
    placed = [
      jax.reshard(x, NamedSharding(mesh, spec))
      for x, spec in zip(leaves, operand_specs, strict=True)
    ]
    # None named are all of them, without those that `vmap` has taken away.
    mixed = set(mesh.explicit_axes) != set(mesh.axis_names)
    run = jax.shard_map(
      self.fn,
      mesh=mesh,
      in_specs=tuple(operand_specs),
      out_specs=[_place(letters, axes) for letters in self.result_letters],
      axis_names=set(mesh.explicit_axes) if mixed else set(),
    )
    return run(*placed)

  def _by_partitioner(self, leaves: Sequence):
    """Runs the function by `custom_partitioning`: shardings are known when XLA asks for them."""
    outer = jax.sharding.get_abstract_mesh()
    count = len(leaves)
    # What is partitioned may hold no constants: they become operands; a part has its own.
    constants = self.whole.consts
    operand_letters = self.operand_letters + ["." * np.ndim(constant) for constant in constants]

    def all_of_it(*leaves_and_constants):
      leaves = leaves_and_constants[:count]
      return jax.core.eval_jaxpr(self.whole.jaxpr, leaves_and_constants[count:], *leaves)

    def partition(mesh, arg_shapes, result_shape):
      del result_shape
      axes = self._axes([_spec(leaf) for leaf in arg_shapes])

      def place(letters):
        return NamedSharding(mesh, _place(letters, axes))

      def local(*leaves_and_constants):
        # The target is read off the mesh that was set when the program was traced.
        with jax.sharding.use_abstract_mesh(outer):
          return self.fn(*leaves_and_constants[:count])

      placed = [place(letters) for letters in self.result_letters]
      return mesh, local, placed, tuple(place(letters) for letters in operand_letters)

    call = custom_partitioning(all_of_it)
    call.def_partition(partition, sharding_rule=_rule(operand_letters, self.result_letters))
    return call(*leaves, *constants)

  def _axes(self, specs: Sequence[Sequence]) -> dict:
    """Returns the axes of the mesh that split each letter: those of the first array that is."""
    axes = {letter: None for letters in self.operand_letters for letter in letters} | {".": None}
    for letters, spec in zip(self.operand_letters, specs, strict=False):
      for letter, axis in zip(letters, spec, strict=False):
        if letter != "." and axes[letter] is None:
          axes[letter] = axis
    return axes


def _check_type(kind, letters: str, spec: PartitionSpec) -> None:
  """Refuses what only a gather, which nobody asked for, would bring to where it is computed."""
  for letter, own, wanted in zip(letters, kind.sharding.spec, spec, strict=False):
    if own is not None and own != wanted:
      what = {".": "neither of samples nor of heads"}.get(letter, f"that others split by {wanted}")
      raise ValueError(
        f"an operand {kind} is sharded along {own} in a dimension {what}; under Explicit axes of "
        "a mesh all operands may be sharded along samples and heads alone, and alike: use "
        "jax.reshard on it first"
      )


def _place(letters: str, axes: dict) -> PartitionSpec:
  return PartitionSpec(*(axes[letter] for letter in letters))


def _names(entry) -> tuple:
  """Returns the axes that an entry of a PartitionSpec names."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


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
  """Returns Shardy's einsum-like rule: letters are shared, other dimensions have own factors."""
  number = itertools.count()

  def side(all_letters):
    return ", ".join(
      " ".join(letter if letter != "." else f"x{next(number)}" for letter in letters)
      for letters in all_letters
    )

  return f"{side(operand_letters)} -> {side(result_letters)}"
