"""The Hopper implementation of attention: Mosaic GPU kernels that walk the table's lists.

Checks need no GPU: `hopper.interpret.interpreted()` runs the kernels on any device, and under an
abstract mesh of an H100 they compile in a process without one.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from freqformer.kernels.block_sparse import hopper_backward, hopper_forward, operands, tuning
from freqformer.kernels.block_sparse.hopper_backward import Inputs, KeyLists
from freqformer.kernels.block_sparse.hopper_forward import QueryLists, Settings
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.core.lists import MAX_TILES
from freqformer.kernels.core.target import Target
from freqformer.kernels.hopper.machine import CAPABILITY, wrong_device
from jax.experimental import pallas as pl

HEAD_DIMS = (32, 64, 128)
BLOCKS = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)


def unsupported(q, k, v, mask: BlockMask, target: Target) -> str | None:
  """Returns all reasons why this call cannot run, as one clause; None if it can."""
  reasons = [*_wrong_target(target)]
  if q.dtype not in DTYPES:
    reasons.append(f"q, k, v are {q.dtype}, it takes bfloat16 or float16")
  if q.shape[-1] not in HEAD_DIMS:
    reasons.append(f"head_dim is {q.shape[-1]}, it takes {_either(HEAD_DIMS)}")
  reasons += _bad_tiles("query", "block_q", mask.block_q, q.shape[1])
  reasons += _bad_tiles("key", "block_kv", mask.block_kv, k.shape[1])
  if mask.kv_tiles > MAX_TILES:
    reasons.append(f"{mask.kv_tiles} key tiles exceed {MAX_TILES}")
  return "; ".join(reasons) or None


def _wrong_target(target: Target) -> Iterator[str]:
  if wrong_device(target) is None:
    return
  if target.platform == "cuda":
    yield (
      f"it needs compute capability {CAPABILITY} (Hopper), the target is {target}; "
      "use implementation='triton' there, or 'xla' where that refuses"
    )
  else:
    yield (
      f"it runs on NVIDIA GPUs of compute capability {CAPABILITY}, the target is {target}; "
      "use implementation='xla' there, or trace inside "
      "kernels.hopper.interpret.interpreted() to check numerics"
    )


def _bad_tiles(what: str, name: str, block: int, rows: int) -> Iterator[str]:
  if block not in BLOCKS:
    yield f"{name} is {block}, it takes {_either(BLOCKS)}"
  elif rows % block:
    yield f"{rows} {what} rows are no multiple of {name}={block}; pad the buffer"


def _either(values) -> str:
  return " or ".join(map(str, values))


def forward(q, k, v, mask: BlockMask, *, scale: float):
  """Returns out and LSE; shapes as in `kernels.block_sparse.api.attention`."""
  walked = QueryLists(*operands.by_query(mask, q.shape[0], q.shape[2]))
  settings = _settings(q, mask, scale, "forward")
  return hopper_forward.forward(q, k, v, walked, operands.tile_bias(mask), settings)


def backward(q, k, v, mask: BlockMask, lse, delta, d_out, *, scale: float):
  """Returns dq by the lists of the table, dk and dv by the transposed ones."""
  inputs = Inputs(q, k, v, d_out.astype(q.dtype), operands.finite_lse(lse), delta)
  b, _, h, _ = q.shape
  bias = operands.tile_bias(mask)
  by_query = QueryLists(*operands.by_query(mask, b, h))
  dq = hopper_backward.dq(inputs, by_query, bias, _settings(q, mask, scale, "dq"))
  by_key = KeyLists(*operands.by_key(mask, b, h))
  dk, dv = hopper_backward.dkv(inputs, by_key, bias, _settings(q, mask, scale, "dkv"))
  return dq, dk, dv


def _settings(q, mask: BlockMask, scale: float, direction: str) -> Settings:
  """Returns how a kernel runs, and its cost."""
  estimate = operands.call_cost(q, mask, direction)
  key = tuning.Key("h100", q.shape[-1], mask.block_q, mask.block_kv, direction)
  return Settings(
    mask.block_q, mask.block_kv, scale, tuning.lookup(key), pl.CostEstimate(**estimate)
  )
