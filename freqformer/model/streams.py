"""Random keys by name: what a module draws at the start does not depend on what is built before it.

Models that differ in their attention method alone begin with the same weights everywhere else, so
that runs of one seed can be compared in pairs.
"""

import zlib

import jax
from flax import nnx


def named(rngs: nnx.Rngs, name: str) -> nnx.Rngs:
  """Returns streams of their own for the part called `name`; those of `rngs` do not move on."""
  return nnx.Rngs(jax.random.fold_in(rngs["params"].key[...], zlib.crc32(name.encode())))


def numbered(rngs: nnx.Rngs, name: str, numbers: jax.Array) -> jax.Array:
  """Returns a key `[k]` for each of the parts `name` with `numbers`, int `[k]`."""
  key = named(rngs, name)["params"].key[...]
  return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
