"""Choosing the key tiles with the largest mass, and keeping the choice as bits: 630 tiles in 79 bytes instead of 2,520."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_mask import BlockMask, pad_lists


def largest(mass: jax.Array, counts, fixed: jax.Array | np.ndarray | None = None) -> jax.Array:
  """Marks the largest entries of each row, exactly as many as asked; of equal ones the first.

  No sort: bisection over the bit patterns of the floats, which are ordered as the floats are when none is negative. 31 passes
  find the k-th largest entry exactly.

  Args:
    mass: float32 `[..., tiles]`, >= 0.
    counts: int `[c]`, entries to mark, each in 1..tiles.
    fixed: int `[..., f]`, entries that come before all others (repeats allowed), or None.

  Returns:
    bool `[..., c, tiles]`.
  """
  tiles, counts = mass.shape[-1], jnp.asarray(counts, jnp.int32)
  if fixed is not None:
    always = (jnp.asarray(fixed)[..., None] == np.arange(tiles)).any(-2)
    mass = jnp.where(always, jnp.inf, mass)
  keys = jax.lax.bitcast_convert_type(mass.astype(jnp.float32), jnp.int32)[..., None, :]

  def bit(i, bound):
    higher = bound | (1 << (30 - i))
    enough = (keys >= higher[..., None]).sum(-1, dtype=jnp.int32) >= counts
    return jnp.where(enough, higher, bound)

  bound = jax.lax.fori_loop(0, 31, bit, jnp.zeros((*mass.shape[:-1], len(counts)), jnp.int32))[..., None]
  above, equal = keys > bound, keys == bound
  room = counts[:, None] - above.sum(-1, keepdims=True, dtype=jnp.int32)
  return above | (equal & (jnp.cumsum(equal, -1, dtype=jnp.int32) <= room))


def pack_bits(tiles: jax.Array) -> jax.Array:
  """bool `[..., tiles]` -> uint8 `[..., ceil(tiles / 8)]`."""
  return jnp.packbits(tiles, axis=-1, bitorder="little")


def unpack_bits(bits: jax.Array, tiles: int) -> jax.Array:
  """The inverse of `pack_bits`."""
  return jnp.unpackbits(bits, axis=-1, count=tiles, bitorder="little").astype(bool)


def lists_of_bits(bits: jax.Array, max_kv: int, kv_len, block: int) -> BlockMask:
  """The table of packed bits, ids ascending; no sort: the s-th listed tile is where the running count reaches s + 1.

  Args:
    bits: uint8 `[b, h, q_tiles, ceil(kv_tiles / 8)]`.
    max_kv: static bound on the tiles that a row lists.
    kv_len: int32 `[kv_tiles]`; block: rows of a tile.
  """
  count = jnp.cumsum(unpack_bits(bits, kv_len.shape[-1]), -1, dtype=jnp.int32)
  slots = np.arange(1, max_kv + 1, dtype=np.int32)
  ids = jax.vmap(lambda row: jnp.searchsorted(row, slots))(count.reshape(-1, count.shape[-1]))
  ids = jnp.minimum(ids, kv_len.shape[-1] - 1).reshape(*count.shape[:3], max_kv).astype(jnp.int32)
  return pad_lists(ids, jnp.minimum(count[..., -1], max_kv), kv_len, None, block, block)
