"""Names of a model's arrays, as checkpoints and files of weights have them."""

from typing import Any

import jax


def flatten(tree) -> dict[str, Any]:
  """Returns a tree's leaves by path: `{"params/embed/kernel": array, ...}`."""
  return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def leaf_name(path) -> str:
  """Returns the name of a leaf in `flatten`, from its path in a pytree."""
  # NNX wraps each array in a variable whose leaf is called "value", which tells a reader nothing.
  return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
