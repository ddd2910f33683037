"""Per query tile the key tiles with the largest pooled score, plus fixed ones. Depends on the data, so it is traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from freqformer.grid.layout import LayoutTables, TileLayout
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.selection.topk import top_tiles

# Pooled scores that exist at once; None: what `top_tiles` holds for good on the target.
_CHUNK_SCORES = None


@jax.named_scope("pool")
def pool_tiles(x: jax.Array, tables: LayoutTables) -> jax.Array:
  """Mean over each tile's valid rows: `[b, n_buffer, h, d] -> [b, h, tiles, d]`, float32."""
  layout = tables.layout
  b, _, h, d = x.shape
  valid = jnp.asarray(tables.valid)[:, None, None]
  x = jnp.where(valid, x, 0).astype(jnp.float32).reshape(b, layout.tiles, layout.block, h, d).sum(2)
  return (x / jnp.asarray(tables.kv_len, jnp.float32)[:, None, None]).transpose(0, 2, 1, 3)


def fixed_tiles(layout: TileLayout, sink: int = 0, anchors: int = 0) -> np.ndarray:
  """Tiles that every list holds: its own, the first `sink`, and the tile at its place in evenly spread frames.

  Returns:
    int32 `[tiles, 1 + sink + anchors]`; ids may repeat within a row.
  """
  own = np.arange(layout.tiles, dtype=np.int32)[:, None]
  frames, place = layout.tile_grid[0], layout.tile_grid[1] * layout.tile_grid[2]
  spread = np.unique(np.linspace(0, frames - 1, min(anchors, frames)).round().astype(np.int32))
  columns = [
    own,
    np.broadcast_to(
      np.arange(min(sink, layout.tiles), dtype=np.int32), (layout.tiles, min(sink, layout.tiles))
    ),
  ]
  columns.append((spread * place + own % place).astype(np.int32))
  return np.concatenate(columns, 1)


@jax.named_scope("select")
def block_topk(
  q_pool: jax.Array,
  k_pool: jax.Array,
  budget: int,
  fixed: np.ndarray,
  kv_len,
  block: int,
  implementation: str | None = None,
) -> BlockMask:
  """The `budget` best key tiles per query tile by `q_pool . k_pool`; fixed tiles count inside the budget.

  Args:
    q_pool, k_pool: `[b, h, tiles, d]`, pooled from unfiltered, normed, rotated q and k. No gradient flows.
    budget: tiles per list; more than there are means all.
    fixed: int `[tiles, f]`, ids that are always listed (repeats allowed).
    kv_len: int32 `[tiles]`.
    block: rows of a tile.
    implementation: of the top-k, or None for automatic choice.

  Raises:
    ValueError: if the budget cannot hold the fixed tiles.
  """
  tiles = k_pool.shape[2]
  if budget > tiles:
    _log_all_tiles(budget, tiles)
  budget = min(budget, tiles)
  distinct = (
    max(len(np.unique(row)) for row in fixed) if isinstance(fixed, np.ndarray) and fixed.size else 0
  )
  if distinct > budget:
    raise ValueError(
      f"{budget=} key tiles cannot hold the {distinct} fixed ones (own, sink, anchors); raise the budget."
    )
  q_pool, k_pool = jax.lax.stop_gradient((q_pool, k_pool))
  ids = top_tiles(q_pool, k_pool, budget, fixed, _CHUNK_SCORES, implementation)
  counts = jnp.full(ids.shape[:3], budget, jnp.int32)
  return BlockMask(ids, counts, kv_len, None, block, block)


@functools.cache
def _log_all_tiles(budget, tiles):
  logging.info(
    "lists of %d key tiles are longer than the grid's %d tiles: they hold every tile", budget, tiles
  )
