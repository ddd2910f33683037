"""AdaSpa's memory between denoising steps: which key tiles each query tile lists, and row LSEs.

Lists are kept as bits: 630 tiles in 79 bytes instead of 2,520. LSEs are kept for every token in 32,
16 or 8 bits, or as one mean per query tile.
"""

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.grid.layout import LayoutTables, TileLayout
from freqformer.kernels.block_sparse.table import BlockMask, pad_lists
from freqformer.kernels.selection.topk import places, top_words

LSE_KINDS = ("row", "tile")
LSE_DTYPES = ("bfloat16", "float32", "uint8")


# ---- lists as bits ------------------------------------------------------------


def top_bits(mass: jax.Array, counts, fixed: jax.Array | np.ndarray | None = None) -> jax.Array:
  """Marks the key tiles of largest mass, exactly as many as asked; of equal ones the first.

  Args:
    mass: float32 `[..., tiles]`.
    counts: ints in 1..tiles, one per set that is wanted.
    fixed: int `[..., f]`, tiles that come before all others (repeats allowed), or None.

  Returns:
    uint8 `[..., len(counts), ceil(tiles / 8)]`, tile 0 in the lowest bit of byte 0.
  """
  tiles = mass.shape[-1]
  if fixed is not None:
    always = (jnp.asarray(fixed)[..., None] == np.arange(tiles)).any(-2)
    mass = jnp.where(always, jnp.inf, mass)
  words = jnp.stack([top_words(mass, count) for count in counts], -2)
  bits = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], -1)
  return bits[..., : -(-tiles // 8)]


def unpack_bits(bits: jax.Array, tiles: int) -> jax.Array:
  """Bits uint8 `[..., ceil(tiles / 8)]` as bool `[..., tiles]`."""
  return jnp.unpackbits(bits, axis=-1, count=tiles, bitorder="little").astype(bool)


def lists_of_bits(bits: jax.Array, max_kv: int, kv_len, block: int) -> BlockMask:
  """Builds the table of packed bits, ids ascending, without a sort.

  Args:
    bits: uint8 `[b, h, q_tiles, ceil(kv_tiles / 8)]`.
    max_kv: static bound on the tiles that a row lists.
    kv_len: int32 `[kv_tiles]`, tokens of each tile.
  """
  words = jnp.pad(bits, ((0, 0),) * 3 + ((0, -bits.shape[-1] % 4),)).reshape(*bits.shape[:3], -1, 4)
  words = jax.lax.bitcast_convert_type(words, jnp.uint32)
  counts = jax.lax.population_count(words).sum(-1).astype(jnp.int32)
  return pad_lists(places(words, max_kv), jnp.minimum(counts, max_kv), kv_len, None, block, block)


# ---- row LSEs --------------------------------------------------------------


def empty_lse(kind: str, dtype: str, lead: tuple[int, int], layout: TileLayout) -> dict:
  """Zeros in the shapes of `store_lse`; `lead` is (batch, heads)."""
  kept = {"lse": jnp.zeros((*lead, layout.n if kind == "row" else layout.tiles), dtype)}
  if dtype == "uint8":
    kept["lse_range"] = jnp.zeros((*lead, layout.tiles, 2))
  return kept


def store_lse(kind: str, dtype: str, lse: jax.Array, arrays: LayoutTables) -> dict:
  """Compacts the rows' LSE `[b, h, n_buffer]`; padding rows are not read.

  "row" keeps tokens only, in raster order. As uint8 they are steps between their tile's smallest
  and largest LSE (float32): the error is at most 1/510 of that range, where bfloat16's is up to
  1/256 of the LSE itself.
  """
  # choice: the 8-bit form.
  tiles = lse.reshape(*lse.shape[:2], arrays.tiles, -1)
  valid = jnp.asarray(arrays.valid).reshape(arrays.tiles, -1)
  if kind == "tile":
    return {"lse": (jnp.where(valid, tiles, 0).sum(-1) / arrays.kv_len).astype(dtype)}
  if dtype != "uint8":
    return {"lse": jnp.take(lse, arrays.scatter, -1).astype(dtype)}
  low = jnp.where(valid, tiles, jnp.inf).min(-1)
  high = jnp.where(valid, tiles, -jnp.inf).max(-1)
  step = jnp.maximum(high - low, 1e-6) / 255
  codes = jnp.clip(jnp.round((tiles - low[..., None]) / step[..., None]), 0, 255).reshape(lse.shape)
  return {
    "lse": jnp.take(codes, arrays.scatter, -1).astype(jnp.uint8),
    "lse_range": jnp.stack([low, step], -1),
  }


def load_lse(kind: str, kept: dict, arrays: LayoutTables) -> jax.Array:
  """Restores `[b, h, n_buffer]` (padding rows hold some token's LSE), or `[b, h, tiles]`."""
  if kind == "tile":
    return kept["lse"]
  lse = jnp.take(kept["lse"], arrays.gather, -1)
  if "lse_range" not in kept:
    return lse
  low, step = jnp.unstack(kept["lse_range"][..., None], axis=-2)
  return (lse.reshape(*lse.shape[:2], arrays.tiles, -1) * step + low).reshape(lse.shape)
