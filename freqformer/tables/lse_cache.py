"""Row LSEs that survive a denoising step: every token's, in 32, 16 or 8 bits, or one mean per query tile."""

import jax
import jax.numpy as jnp

from freqformer.grid.layout import LayoutTables, TileLayout

KINDS = ("row", "tile")
DTYPES = ("bfloat16", "float32", "uint8")


def empty(kind: str, dtype: str, lead: tuple[int, int], layout: TileLayout) -> dict:
  """The shapes of `store`, zeros; `lead` is (batch, heads)."""
  found = {"lse": jnp.zeros((*lead, layout.n if kind == "row" else layout.tiles), dtype)}
  return found | ({"lse_range": jnp.zeros((*lead, layout.tiles, 2))} if dtype == "uint8" else {})


def store(kind: str, dtype: str, lse: jax.Array, arrays: LayoutTables) -> dict:
  """What is kept of the rows' LSE `[b, h, n_buffer]`; padding rows are not looked at.

  "row" keeps tokens only, in raster order. As uint8 they are steps between their tile's smallest and largest LSE (float32):
  the error is at most 1/510 of that range, where bfloat16's is up to 1/256 of the LSE itself. The 8-bit form is ours.
  """
  tiles = lse.reshape(*lse.shape[:2], arrays.layout.tiles, -1)
  valid = jnp.asarray(arrays.valid).reshape(arrays.layout.tiles, -1)
  if kind == "tile":
    return {"lse": (jnp.where(valid, tiles, 0).sum(-1) / arrays.kv_len).astype(dtype)}
  if dtype != "uint8":
    return {"lse": jnp.take(lse, arrays.scatter, -1).astype(dtype)}
  low, high = jnp.where(valid, tiles, jnp.inf).min(-1), jnp.where(valid, tiles, -jnp.inf).max(-1)
  step = jnp.maximum(high - low, 1e-6) / 255
  codes = jnp.clip(jnp.round((tiles - low[..., None]) / step[..., None]), 0, 255).reshape(lse.shape)
  return {
    "lse": jnp.take(codes, arrays.scatter, -1).astype(jnp.uint8),
    "lse_range": jnp.stack([low, step], -1),
  }


def load(kind: str, kept: dict, arrays: LayoutTables) -> jax.Array:
  """`[b, h, n_buffer]` in tile order (padding rows read some token's), or `[b, h, tiles]`."""
  if kind == "tile":
    return kept["lse"]
  lse = jnp.take(kept["lse"], arrays.gather, -1)
  if "lse_range" not in kept:
    return lse
  low, step = jnp.unstack(kept["lse_range"][..., None], axis=-2)
  return (lse.reshape(*lse.shape[:2], arrays.layout.tiles, -1) * step + low).reshape(lse.shape)
