"""Triton's implementation of `prepare`: refuses a call, or lays out what the kernel reads.

It takes GPUs from Ampere on, and of Hopper's calls those that the Hopper kernel refuses. As there,
a norm over heads gets its inverses, and rows ahead of the tokens are copied to their place.
"""

import math

import jax
import jax.numpy as jnp
from freqformer.kernels.around.prepare import MAX_CELLS, Cells, Prepared
from freqformer.kernels.core.target import Target
from freqformer.kernels.triton.interpret import is_interpreted
from freqformer.kernels.triton.machine import wrong_device

HEAD_DIMS = (32, 64, 128, 256)
BLOCKS = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
# choice: numbers of an array that a program works on at once: 16 registers of each of 128 threads,
# and of a product 32.
_AT_ONCE = 2048
_PRODUCT = 4096
_CHUNK = 32  # choice: rows of a tile in a step of a product
_WARPS = 4
_STAGES = 2
_LEAST = 16  # rows of a product on tensor cores


def unsupported(joint, lengths, cells: Cells | None, target: Target) -> str | None:
  """Returns why the kernel cannot run a call, all reasons at once; None if it can."""
  reasons = [reason for reason in [wrong_device(target)] if reason]
  # In float32 its products would be of three terms; the interpreter is exact.
  if joint.dtype not in DTYPES and not (is_interpreted() and joint.dtype == jnp.float32):
    reasons.append(f"the tokens are {joint.dtype}, it takes bfloat16 or float16")
  if joint.shape[-1] not in HEAD_DIMS:
    reasons.append(f"head_dim is {joint.shape[-1]}, it takes one of {HEAD_DIMS}")
  block = joint.shape[1] // len(lengths)
  if block not in BLOCKS:
    reasons.append(f"a tile has {block} rows, it takes one of {BLOCKS}")
  count = 0 if cells is None else cells.per_tile
  if count is None:
    reasons.append("the transform leaves the tile")
  elif count > MAX_CELLS:
    reasons.append(f"a tile has {count} coarse tokens, it takes at most {MAX_CELLS}")
  return "; ".join(reasons) or None


@jax.named_scope("prepare")
def forward(
  joint,
  bias,
  gains,
  tables,
  lengths,
  cells,
  bands,
  ahead,
  inverses,
  *,
  filtered,
  pooled,
  over_heads,
) -> Prepared:
  """Runs the kernel and places rows before the tokens that it did not place itself.

  `inverses`: of a norm over heads, float32 `[b, 2, n]` of tokens and `[b, 2, n_coarse]` of coarse
  ones (None without cells); otherwise None.
  """
  from freqformer.kernels.around import triton_prepare
  from freqformer.kernels.triton.triton_launch import launch

  b, n, _, h, d = joint.shape
  tiles = len(lengths)
  block = n // tiles
  front = 0
  placed = 0  # rows before the tokens that the kernel writes
  if cells is not None:
    front = cells.front
    placed = cells.cos.shape[0]
  elif ahead is not None:
    front = ahead[0].shape[1]
  arrays = (
    joint,
    _numbers(bias),
    jnp.stack([_numbers(gain) for gain in gains]),
    *map(_numbers, tables),
    jnp.asarray(lengths, jnp.int32),
    _numbers(inverses and inverses[0]),
    *_of_cells(cells, tiles),
    _numbers(inverses and inverses[1]),
    _numbers(cells.filters if filtered else None),
    jnp.asarray(bands, jnp.int32) if filtered else jnp.zeros(1, jnp.int32),
  )
  packed = jax.ShapeDtypeStruct((b, front + n, h, d), joint.dtype)
  pool = jax.ShapeDtypeStruct((b, h, tiles, d), jnp.float32)
  nothing = jax.ShapeDtypeStruct((1,), jnp.float32)  # in the place of a result, never written
  count = 0 if cells is None else cells.per_tile
  constants = {
    "n": n,
    "h": h,
    "D": d,
    "block": block,
    "front": front,
    "coarse": placed,
    "cells": count,
    "CELLS": min(max(_LEAST, 1 << max(count - 1, 0).bit_length()), _PRODUCT // d),
    "bands_of_class": cells.filters.shape[1] if filtered else 0,
    "FILTER_QK": filtered == "qkv",
    "FILTER_V": filtered in ("v", "qkv"),
    "POOLED": pooled,
    "OVER_HEADS": over_heads,
    "ROWS": min(block, _AT_ONCE // d),
    "FILTERED": min(block, _PRODUCT // d),
    "CHUNK": min(block, _CHUNK),
  }
  results = (packed, packed, packed if front else nothing, *((pool if pooled else nothing,) * 2))
  found = launch(
    triton_prepare.prepare,
    arrays,
    results,
    constants,
    blocks=b * tiles * h,
    warps=_WARPS,
    stages=_STAGES,
    cost=_cost(arrays, results, 3 * 2 * b * n * h * d * (count + block * bool(filtered))),
  )
  # The barrier: XLA would fuse the kernel with the update of its own result, and find a cycle.
  *found, q_pool, k_pool = jax.lax.optimization_barrier(found)
  if placed < front:
    first = (jnp.zeros((), joint.dtype),) * 3 if ahead is None else ahead
    found = [x.at[:, placed:front].set(row) for x, row in zip(found, first, strict=True)]
  q, k, v = found
  return Prepared(q, k, v if front else None, *((q_pool, k_pool) if pooled else ()))


def _of_cells(cells: Cells | None, tiles: int) -> tuple[jax.Array, ...]:
  """Returns matrices, classes, the coarse token of each cell of each tile or -1, cos and sin."""
  if cells is None:
    return _numbers(None), *(jnp.zeros(1, jnp.int32),) * 2, *(_numbers(None),) * 2
  places = jnp.arange(tiles * cells.per_tile, dtype=jnp.int32)
  if cells.rows is not None:
    count = len(cells.rows)
    places = jnp.full_like(places, -1).at[jnp.asarray(cells.rows)].set(places[:count])
  classes = jnp.asarray(cells.classes, jnp.int32)
  return _numbers(cells.matrices), classes, places, _numbers(cells.cos), _numbers(cells.sin)


def _numbers(x) -> jax.Array:
  """Returns an array in float32; of None one that stands in its place and is not read."""
  return jnp.zeros(1, jnp.float32) if x is None else jnp.asarray(x, jnp.float32)


def _cost(operands, results, flops: int) -> dict:
  """Returns the cost of a kernel that reads every operand and writes every result once."""
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *results))
  return {"flops": flops, "bytes_accessed": moved, "transcendentals": 0}
