"""The Triton implementation of attention, through jax-triton, for NVIDIA GPUs from Ampere on.

On Hopper it takes what the Hopper kernels refuse. Checks need no GPU:
`kernels.triton.interpret.interpreted()` runs the kernels on any device, and under an abstract mesh
of a GPU they compile in a process without one.
"""

import math

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse import operands, triton_tuning
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.core.lists import MAX_TILES
from freqformer.kernels.core.log2 import in_log2, split_scale
from freqformer.kernels.core.target import Target, current_target
from freqformer.kernels.triton.interpret import is_interpreted
from freqformer.kernels.triton.machine import device_class, wrong_device

HEAD_DIMS = (16, 32, 64, 128, 256)
BLOCKS = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
# Of a GPU that nobody named, where kernels are interpreted: cuts differ, numbers do not.
INTERPRETED = "sm80"


def unsupported(q, k, v, mask: BlockMask, target: Target) -> str | None:
  """Returns all reasons why this call cannot run, as one clause; None if it can."""
  reasons = []
  if (wrong := wrong_device(target)) is not None:
    reasons.append(wrong)
  # In float32 products would be those of XLA, which needs no kernel; the interpreter is exact.
  if q.dtype not in DTYPES and not (is_interpreted() and q.dtype == jnp.float32):
    reasons.append(f"q, k, v are {q.dtype}, it takes bfloat16 or float16")
  if q.shape[-1] not in HEAD_DIMS:
    reasons.append(f"head_dim is {q.shape[-1]}, it takes one of {HEAD_DIMS}")
  for what, name, block, rows in (
    ("query", "block_q", mask.block_q, q.shape[1]),
    ("key", "block_kv", mask.block_kv, k.shape[1]),
  ):
    if block not in BLOCKS:
      reasons.append(f"{name} is {block}, it takes one of {BLOCKS}")
    elif rows % block:
      reasons.append(f"{rows} {what} rows are no multiple of {name}={block}; pad the buffer")
  if mask.kv_tiles > MAX_TILES:
    reasons.append(f"{mask.kv_tiles} key tiles exceed {MAX_TILES}")
  return "; ".join(reasons) or None


def forward(q, k, v, mask: BlockMask, *, scale: float):
  """Returns out and LSE; shapes as in `kernels.block_sparse.api.attention`."""
  from freqformer.kernels.block_sparse.triton_kernels import attention_forward

  b, n, h, _ = q.shape
  codes, counts, order = operands.by_query(mask, b, h)
  out_type = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, n), jnp.float32))
  arrays = (q, k, v, codes, counts, _or_nothing(order), _bias(mask))
  constants = _sizes(q, k, mask, scale, order) | _of_lists(codes, counts)
  return tuple(_run("forward", attention_forward, arrays, out_type, constants, q, mask))


def backward(q, k, v, mask: BlockMask, lse, delta, d_out, *, scale: float):
  """Returns dq by the lists of the table, dk and dv by the transposed ones."""
  from freqformer.kernels.block_sparse.triton_kernels import attention_dkv, attention_dq

  b, _, h, _ = q.shape
  rows = (q, k, v, d_out.astype(q.dtype), operands.finite_lse(lse), delta)
  bias = _bias(mask)

  codes, counts, order = operands.by_query(mask, b, h)
  arrays = (*rows, codes, counts, _or_nothing(order), bias)
  constants = _sizes(q, k, mask, scale, order) | _of_lists(codes, counts) | {"scale": scale}
  kind = jax.ShapeDtypeStruct(q.shape, q.dtype)
  (dq,) = _run("dq", attention_dq, arrays, (kind,), constants, q, mask)

  starts, counts, readers, kv_len, order = operands.by_key(mask, b, h)
  arrays = (*rows, starts, counts, readers, kv_len, _or_nothing(order), bias)
  strides = {
    "readers_b": _stride(readers, 0),
    "readers_h": _stride(readers, 1),
    "counts_b": _stride(counts, 0),
    "counts_h": _stride(counts, 1),
    "lengths_b": _stride(kv_len, 0),
  }
  constants = _sizes(q, k, mask, scale, order) | strides | {"scale": scale}
  kinds = (jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2
  dk, dv = _run("dkv", attention_dkv, arrays, kinds, constants, q, mask)
  return dq, dk, dv


def current_class() -> str:
  """Returns the class of GPUs that a call is traced for."""
  return INTERPRETED if is_interpreted() else device_class(current_target().capability)


def _run(direction, kernel, arrays, out_type, constants, q, mask: BlockMask) -> list[jax.Array]:
  """Launches a kernel in its configuration."""
  from freqformer.kernels.triton.triton_launch import launch

  b, n_kv = q.shape[0], constants["n_kv"]
  key = triton_tuning.Key(current_class(), q.shape[-1], mask.block_q, mask.block_kv, direction)
  config = triton_tuning.lookup(key)
  rows = n_kv if direction == "dkv" else q.shape[1]
  return launch(
    kernel,
    arrays,
    out_type,
    constants | {"ROWS": config.rows, "STEP": config.step, "HALVES": config.halves},
    blocks=b * q.shape[2] * (rows // config.rows),
    warps=config.warps,
    stages=config.stages,
    cost=operands.call_cost(q, mask, direction),
  )


def _sizes(q, k, mask: BlockMask, scale: float, order) -> dict:
  """Returns the constants that all three kernels have."""
  sign, factor = split_scale(scale)
  return {
    "factor": factor,
    "sign": sign,
    "BIASED": mask.kv_bias is not None,
    "ORDERED": order is not None,
    "h": q.shape[2],
    "n_q": q.shape[1],
    "n_kv": k.shape[1],
    "D": q.shape[3],
    "block_q": mask.block_q,
    "block_kv": mask.block_kv,
  }


def _of_lists(codes, counts) -> dict:
  """Returns the steps through lists by query tile."""
  return {
    "codes_b": _stride(codes, 0),
    "codes_h": _stride(codes, 1),
    "codes_tile": _stride(codes, 2),
    "counts_b": _stride(counts, 0),
    "counts_h": _stride(counts, 1),
  }


def _stride(x, axis: int) -> int:
  """Returns the numbers from one index to the next; 0 where all indices share one."""
  return 0 if x.shape[axis] == 1 else math.prod(x.shape[axis + 1 :])


def _bias(mask: BlockMask):
  return _or_nothing(in_log2(operands.tile_bias(mask)), jnp.float32)


def _or_nothing(x, dtype=jnp.int32):
  """Returns an array, or one that stands in its place and is not read."""
  return jnp.zeros(1, dtype) if x is None else x
