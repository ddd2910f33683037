"""Lists of tiles as GPU kernels read them: entries with valid rows, and heads by falling cost.

A static table stores them (`BlockMask.with_launch`); for others they are made before each call.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# An entry is `tile << 8 | valid rows`: a consumer needs one scalar read per tile.
_LENGTH_BITS = 8
MAX_TILES = 1 << (31 - _LENGTH_BITS)


def array_module(*arrays):
  """Returns NumPy while every input is concrete NumPy, jax.numpy as soon as one is not."""
  return np if all(a is None or isinstance(a, np.ndarray | np.generic) for a in arrays) else jnp


# ---- of one table --------------------------------------------------------------------------------


def by_query(mask) -> tuple:
  """Returns what the forward and dQ walk; a table without lists gets one list of all tiles.

  Returns:
    codes: int32 `[b or 1, h or 1, q_tiles or 1, list]`, see `encode`.
    counts: int32 `[b or 1, h or 1, q_tiles]`.
    order: see `costliest_first`.
  """
  indices = mask.kv_indices
  if indices is None:
    indices = np.arange(mask.kv_tiles, dtype=np.int32)[None, None, None]
  return encode(indices, mask.kv_len), mask.kv_counts, costliest_first(mask.kv_counts)


def by_key(mask) -> tuple:
  """Returns what dK and dV walk: `readers[starts[j] : starts[j] + counts[j]]` read key tile j.

  Returns:
    starts, counts: int32 `[b or 1, h or 1, kv_tiles]`.
    readers: int32 `[b or 1, h or 1, list]`.
    order: see `costliest_first`.
  """
  xnp = array_module(mask.kv_indices, mask.kv_counts)
  if mask.kv_indices is None:
    # Row i reads the first counts[i] tiles: by falling count, a key tile's readers come first.
    rows = xnp.asarray(mask.kv_counts)
    readers = xnp.argsort(-rows, axis=-1, stable=True).astype(np.int32)
    fewer = search(xnp.sort(rows, axis=-1), np.arange(mask.kv_tiles, dtype=np.int32), "right")
    counts = mask.q_tiles - fewer
    starts = xnp.zeros_like(counts)
  else:
    table = mask.transpose()
    starts, readers = table.offsets[..., :-1], table.q_indices
    counts = table.offsets[..., 1:] - starts
  return starts, counts, readers, costliest_first(counts)


def search(rows, values: np.ndarray, side: str):
  """Returns NumPy's `searchsorted` of `[k]` values in sorted rows `[..., m]`, int32 `[..., k]`."""
  flat = rows.reshape(-1, rows.shape[-1])
  if isinstance(rows, np.ndarray):
    found = np.stack([np.searchsorted(row, values, side=side) for row in flat])
  else:
    found = jax.vmap(lambda row: jnp.searchsorted(row, values, side=side))(flat)
  return found.reshape(*rows.shape[:-1], -1).astype(np.int32)


# ---- entries and order ---------------------------------------------------------------------------


def encode(indices, lengths):
  """Returns int32 list entries, `indices` `[b or 1, h or 1, tiles or 1, list]` with valid rows.

  `lengths` are int32 `[tiles]` or `[b, tiles]`.
  """
  xnp = array_module(indices, lengths)
  indices, lengths = xnp.asarray(indices), xnp.asarray(lengths)
  if lengths.ndim == 1:
    picked = lengths[indices]
  elif xnp is np:
    shape = (len(lengths), *indices.shape[1:])
    pairs = zip(lengths, np.broadcast_to(indices, shape), strict=True)
    picked = np.stack([own[ids] for own, ids in pairs])
  else:
    shape = (lengths.shape[0], *indices.shape[1:])
    picked = jax.vmap(lambda own, ids: own[ids])(lengths, jnp.broadcast_to(indices, shape))
  return (indices << _LENGTH_BITS | picked).astype(np.int32)


def decode(code):
  """Returns the tile of an entry and its valid rows."""
  rows = lax.bitwise_and(code, jnp.int32((1 << _LENGTH_BITS) - 1))
  return lax.shift_right_logical(code, jnp.int32(_LENGTH_BITS)), rows


def costliest_first(counts):
  """Returns a table's heads by falling cost, or None where one list of counts serves all of them.

  Thread blocks start in the order of the grid: long ones first leave short ones to fill the end.

  Args:
    counts: int32 `[b or 1, h or 1, tiles]`, tiles listed.

  Returns:
    int32 `[(b or 1) * (h or 1)]`, numbers of (sample, head) by falling total count, or None.
  """
  if counts.shape[:2] == (1, 1):
    return None
  total = counts.astype(np.float32).sum(-1).reshape(-1)
  return array_module(counts).argsort(-total, stable=True).astype(np.int32)


def order_of_call(counts, order, b: int, h: int):
  """Returns the order in which the heads of a call start.

  Args:
    counts: int32 `[b or 1, h or 1, tiles]`, the table's.
    order: what `costliest_first` gave for them, or None: then it is asked here.

  Returns:
    int32 `[b * h]`, `sample * h + head`; None for heads as they are numbered.
  """
  lead = counts.shape[:2]
  if order is None:
    order = costliest_first(counts)
  if order is None or lead == (b, h):
    return order
  if lead[0] == 1:
    return (order[:, None] + np.arange(b, dtype=np.int32) * h).reshape(-1)
  return (order[:, None] * h + np.arange(h, dtype=np.int32)).reshape(-1)
