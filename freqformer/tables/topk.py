"""The key tiles with the largest pooled score, plus fixed ones. They depend on data: traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.ad_checkpoint import checkpoint_name

from freqformer.grid.layout import LayoutTables, TileLayout
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.selection.topk import top_tiles


@jax.named_scope("pool")
def pool_tiles(x: jax.Array, arrays: LayoutTables) -> jax.Array:
  """Mean over each tile's valid rows: `[b, n_buffer, h, d] -> [b, h, tiles, d]`, float32."""
  b, _, h, d = x.shape
  valid = jnp.asarray(arrays.valid)[:, None, None]
  x = jnp.where(valid, x, 0).astype(jnp.float32).reshape(b, arrays.tiles, arrays.block, h, d).sum(2)
  return (x / jnp.asarray(arrays.kv_len, jnp.float32)[:, None, None]).transpose(0, 2, 1, 3)


def anchor_frames(frames: int, anchors: int) -> np.ndarray:
  """Evenly spread frames of `frames`, the first always among them; none if `anchors` is 0."""
  return np.unique(np.linspace(0, frames - 1, min(anchors, frames)).round().astype(np.int32))


def fixed_tiles(layout: TileLayout, sink: int = 0, anchors: int = 0) -> np.ndarray:
  """Lists a tile, the first `sink`, its place in anchor frames: int32 `[tiles, f]`, some twice."""
  own = np.arange(layout.tiles, dtype=np.int32)[:, None]
  frames, rows, columns = layout.tile_grid
  sinks = np.arange(min(sink, layout.tiles), dtype=np.int32)
  sinks = np.broadcast_to(sinks, (layout.tiles, len(sinks)))
  anchored = anchor_frames(frames, anchors) * (rows * columns) + own % (rows * columns)
  return np.concatenate([own, sinks, anchored.astype(np.int32)], 1)


@jax.named_scope("select")
def block_topk(
  q_pool: jax.Array,
  k_pool: jax.Array,
  budget: int,
  fixed: np.ndarray,
  arrays: LayoutTables,
  implementation: str | None = None,
  chunk_scores: int | None = None,
) -> BlockMask:
  """Lists the `budget` best key tiles per query tile by `q_pool . k_pool`; no gradient flows.

  Args:
    q_pool, k_pool: `[b, h, tiles, d]`, pooled from unfiltered, normed, rotated q and k.
    budget: tiles per list, fixed ones included; more than there are means all.
    fixed: int `[tiles, f]`, ids that are always listed (repeats allowed).
    arrays: of the layout.
    implementation, chunk_scores: of the top-k (`top_tiles`).

  Raises:
    ValueError: if the budget cannot hold the fixed tiles.
  """
  tiles = k_pool.shape[2]
  if budget > tiles:
    _log_all_tiles(budget, tiles)
  budget = min(budget, tiles)
  distinct = 0
  if isinstance(fixed, np.ndarray) and fixed.size:
    distinct = max(len(np.unique(row)) for row in fixed)
  if distinct > budget:
    raise ValueError(
      f"{budget=} key tiles cannot hold the {distinct} fixed ones (own, sink, anchors); raise the "
      "budget."
    )
  q_pool = jax.lax.stop_gradient(q_pool)
  k_pool = jax.lax.stop_gradient(k_pool)
  ids = top_tiles(q_pool, k_pool, budget, fixed, chunk_scores, implementation)
  ids = checkpoint_name(ids, "tables")  # the backward pass selects what the forward selected
  counts = jnp.full(ids.shape[:3], budget, jnp.int32)
  return BlockMask(ids, counts, arrays.kv_len, None, arrays.block, arrays.block)


@functools.cache
def _log_all_tiles(budget, tiles):
  logging.info(
    "lists of %d key tiles are longer than the grid's %d tiles: they hold every tile", budget, tiles
  )
