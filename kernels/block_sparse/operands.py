"""Operands of GPU kernels of attention beside the rows: lists of tiles, biases, LSE; and costs."""

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse import cost
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.core import lists
from freqformer.kernels.core.log2 import HIDDEN, LOG2E

# LSE of a row that sees nothing, in the backward: so large that every probability is 0.
_LSE_OF_EMPTY_ROWS = 1e30


def by_query(mask: BlockMask, b: int, h: int) -> tuple:
  """Returns what the forward and dQ walk, stored in the table or made here.

  Returns:
    codes: int32 `[b or 1, h or 1, q_tiles or 1, list]`, entries of `lists.encode`.
    counts: int32 `[b or 1, h or 1, q_tiles]`.
    order: int32 `[b * h]`, `lists.order_of_call`; None for heads as they are numbered.
  """
  codes, counts, order = mask.launch.by_query if mask.launch else lists.by_query(mask)
  return jax.tree.map(jnp.asarray, (codes, counts, lists.order_of_call(counts, order, b, h)))


def by_key(mask: BlockMask, b: int, h: int) -> tuple:
  """Returns what dK and dV walk, stored in the table or made here.

  Returns:
    starts: int32 `[b or 1, h or 1, kv_tiles]`.
    counts: likewise.
    readers: int32 `[b or 1, h or 1, list]`, query tiles that read a key tile.
    kv_len: int32 `[b or 1, kv_tiles]`, valid rows.
    order: as of `by_query`.
  """
  starts, counts, readers, order = mask.launch.by_key if mask.launch else lists.by_key(mask)
  order = lists.order_of_call(counts, order, b, h)
  kv_len = mask.kv_len.reshape(-1, mask.kv_tiles)
  return jax.tree.map(jnp.asarray, (starts, counts, readers, kv_len, order))


def tile_bias(mask: BlockMask):
  """Returns the bias of each key tile's scores, float32 `[kv_tiles]` and finite; None if none."""
  return None if mask.kv_bias is None else jnp.maximum(jnp.asarray(mask.kv_bias), HIDDEN)


def finite_lse(lse):
  """Returns LSE in log2 units, where -inf became so large that no probability is left."""
  return jnp.where(lse > -jnp.inf, lse * LOG2E, _LSE_OF_EMPTY_ROWS)


def call_cost(q, mask: BlockMask, direction: str) -> dict:
  """Returns the cost of a launch, exact for NumPy tables, else that of full lists."""
  b, _, h, d = q.shape
  return cost.expected(mask, d, b * h).estimate(q.dtype.itemsize, direction)
