"""Which key tiles a query tile lists, as bits: 630 tiles in 79 bytes instead of 2,520."""

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.kernels.block_sparse.table import BlockMask, pad_lists
from freqformer.kernels.selection.topk import places, top_words


def top_bits(mass: jax.Array, counts, fixed: jax.Array | np.ndarray | None = None) -> jax.Array:
  """The key tiles of largest mass, exactly as many as asked; of equal ones the first.

  Args:
    mass: float32 `[..., tiles]`.
    counts: ints in 1..tiles, for each of which a set is wanted.
    fixed: int `[..., f]`, tiles that come before all others (repeats allowed), or None.

  Returns:
    uint8 `[..., len(counts), ceil(tiles / 8)]`, tile 0 in the lowest bit of byte 0.
  """
  tiles = mass.shape[-1]
  if fixed is not None:
    always = (jnp.asarray(fixed)[..., None] == np.arange(tiles)).any(-2)
    mass = jnp.where(always, jnp.inf, mass)
  words = jnp.stack([top_words(mass, count) for count in counts], -2)
  return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], -1)[
    ..., : -(-tiles // 8)
  ]


def unpack_bits(bits: jax.Array, tiles: int) -> jax.Array:
  """bool `[..., tiles]` of bits uint8 `[..., ceil(tiles / 8)]`."""
  return jnp.unpackbits(bits, axis=-1, count=tiles, bitorder="little").astype(bool)


def lists_of_bits(bits: jax.Array, max_kv: int, kv_len, block: int) -> BlockMask:
  """The table of packed bits, ids ascending; no sort.

  Args:
    bits: uint8 `[b, h, q_tiles, ceil(kv_tiles / 8)]`.
    max_kv: static bound on the tiles that a row lists.
    kv_len: int32 `[kv_tiles]`; block: rows of a tile.
  """
  words = jnp.pad(bits, ((0, 0),) * 3 + ((0, -bits.shape[-1] % 4),)).reshape(*bits.shape[:3], -1, 4)
  words = jax.lax.bitcast_convert_type(words, jnp.uint32)
  counts = jax.lax.population_count(words).sum(-1).astype(jnp.int32)
  return pad_lists(places(words, max_kv), jnp.minimum(counts, max_kv), kv_len, None, block, block)
