"""Axes of `shard_map` over which arrays vary, which JAX makes part of their types (`check_vma`)."""

from typing import Any

import jax
from jax import lax


def varying_axes(tree: Any) -> frozenset:
  """Returns the manual axes of the mesh over which some array of a tree varies."""
  kinds = (jax.typeof(x) for x in jax.tree.leaves(tree))
  return frozenset().union(*(kind.manual_axis_type.varying for kind in kinds))


def vary_over(axes: frozenset, tree: Any) -> Any:
  """Returns the arrays of a tree as ones that vary over `axes` at least; values are the same.

  The gradient of an array that did not vary is summed over the axes. A loop's first carry needs
  the cast, because its later ones vary.
  """

  def cast(x):
    missing = axes - varying_axes(x)
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

  return jax.tree.map(cast, tree)
