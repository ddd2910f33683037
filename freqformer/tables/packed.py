"""Tables over the packed buffer `[coarse tokens | full tokens]`.

Tile ids below `coarse_tiles` are coarse, the others full. A head's table fills either the coarse or
the full query rows and leaves the others with count 0, so that their output is 0 and
`full rows + lift(coarse rows)` needs no select. One launch serves every head, whatever its band.
"""

from collections.abc import Sequence

import numpy as np

from freqformer.kernels.block_sparse.table import BlockMask, array_module, check_listed


def packed_kv_len(n_coarse: int, full_kv_len: np.ndarray, block: int) -> np.ndarray:
  """Valid rows per tile of the packed buffer, int32 `[coarse_tiles + full_tiles]`."""
  tiles = -(-n_coarse // block)
  coarse = np.clip(n_coarse - np.arange(tiles) * block, 0, block)
  return np.concatenate([coarse, full_kv_len]).astype(np.int32)


def coarse_rows(kv_len: np.ndarray, coarse_tiles: int, block: int) -> BlockMask:
  """A dense table among coarse tokens; full query rows list nothing."""
  tiles = len(kv_len)
  counts = np.where(np.arange(tiles) < coarse_tiles, coarse_tiles, 0).astype(np.int32)
  ids = np.broadcast_to(np.arange(coarse_tiles, dtype=np.int32), (1, 1, tiles, coarse_tiles))
  return BlockMask(ids, counts[None, None], kv_len, None, block, block)


def full_rows(
  mask: BlockMask, kv_len: np.ndarray, coarse_tiles: int, shared: bool = False
) -> BlockMask:
  """Moves a table over the full tokens into the packed buffer; coarse query rows list nothing.

  Args:
    mask: lists over full tiles, `[b or 1, h or 1, full_tiles, max_kv]`, NumPy or traced.
    kv_len: of the packed buffer.
    coarse_tiles: number of tiles that come first.
    shared: lets each full row list the coarse tiles too (one softmax over both resolutions).
  """
  xnp = array_module(mask.kv_indices, mask.kv_counts)
  ids = mask.indices() + coarse_tiles
  counts = mask.kv_counts
  if shared:
    check_listed(
      len(kv_len) * (coarse_tiles + ids.shape[-1]),
      "a table of full rows that list all coarse tiles",
    )
    extra = np.broadcast_to(np.arange(coarse_tiles, dtype=np.int32), (*ids.shape[:3], coarse_tiles))
    ids = xnp.concatenate([extra, ids], -1)
    counts = xnp.where(counts > 0, counts + coarse_tiles, 0)
  front = ((0, 0), (0, 0), (coarse_tiles, 0))
  ids = xnp.pad(ids, (*front, (0, 0))).astype(np.int32)
  counts = xnp.pad(counts, front).astype(np.int32)
  return BlockMask(ids, counts, kv_len, None, mask.block_q, mask.block_kv)


def side_by_side(masks: Sequence[BlockMask]) -> BlockMask:
  """Returns the table of several buffers one after the other; none sees another.

  Their lists may be NumPy or traced, `[b or 1, h or 1, tiles, max_kv]`; biases are not kept.
  """
  lists = [mask.indices() for mask in masks]
  counts = [mask.kv_counts for mask in masks]
  xnp = array_module(*lists, *counts)
  lead = np.broadcast_shapes(*(x.shape[:2] for x in counts))
  longest = max(x.shape[-1] for x in lists)
  before = np.cumsum([0, *(mask.kv_tiles for mask in masks)])
  found = []
  for ids, start in zip(lists, before, strict=False):
    filler = ((0, 0),) * 3 + ((0, longest - ids.shape[-1]),)
    ids = xnp.pad(ids + start, filler, mode="edge")
    found.append(xnp.broadcast_to(ids, (*lead, *ids.shape[2:])))
  counts = [xnp.broadcast_to(x, (*lead, x.shape[-1])) for x in counts]
  return BlockMask(
    xnp.concatenate(found, 2).astype(np.int32),
    xnp.concatenate(counts, 2).astype(np.int32),
    xnp.concatenate([xnp.asarray(mask.kv_len) for mask in masks]).astype(np.int32),
    None,
    masks[0].block_q,
    masks[0].block_kv,
  )
