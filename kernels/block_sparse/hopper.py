"""The Hopper implementation of attention: Mosaic GPU kernels that walk the table's lists.

Checks need no GPU: `hopper.interpret.interpreted()` runs the kernels on any device, and under an
abstract mesh of an H100 they compile in a process without one.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse import cost, hopper_backward, hopper_forward, tuning
from freqformer.kernels.block_sparse.hopper_backward import Inputs, KeyLists
from freqformer.kernels.block_sparse.hopper_forward import QueryLists, Settings
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.core import lists
from freqformer.kernels.core.lists import MAX_TILES
from freqformer.kernels.core.target import Target
from freqformer.kernels.hopper.machine import CAPABILITY, wrong_device
from freqformer.kernels.hopper.softmax import HIDDEN, LOG2E
from jax.experimental import pallas as pl

HEAD_DIMS = (32, 64, 128)
BLOCKS = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
# LSE of a row that sees nothing, in the backward: so large that every probability is 0.
_LSE_OF_EMPTY_ROWS = 1e30


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
      "use implementation='xla' there"
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
  walked = _by_query(mask, q.shape[0], q.shape[2])
  return hopper_forward.forward(q, k, v, walked, _bias(mask), _settings(q, mask, scale, "forward"))


def backward(q, k, v, mask: BlockMask, lse, delta, d_out, *, scale: float):
  """Returns dq by the lists of the table, dk and dv by the transposed ones."""
  lse = jnp.where(lse > -jnp.inf, lse * LOG2E, _LSE_OF_EMPTY_ROWS)
  inputs = Inputs(q, k, v, d_out.astype(q.dtype), lse, delta)
  b, _, h, _ = q.shape
  bias = _bias(mask)
  dq = hopper_backward.dq(inputs, _by_query(mask, b, h), bias, _settings(q, mask, scale, "dq"))
  dk, dv = hopper_backward.dkv(inputs, _by_key(mask, b, h), bias, _settings(q, mask, scale, "dkv"))
  return dq, dk, dv


def _settings(q, mask: BlockMask, scale: float, direction: str) -> Settings:
  """Returns how a kernel runs and its cost, exact for NumPy tables, else that of full lists."""
  b, _, h, d = q.shape
  estimate = cost.expected(mask, d, b * h).estimate(q.dtype.itemsize, direction)
  key = tuning.Key("h100", d, mask.block_q, mask.block_kv, direction)
  return Settings(
    mask.block_q, mask.block_kv, scale, tuning.lookup(key), pl.CostEstimate(**estimate)
  )


def _bias(mask: BlockMask):
  return None if mask.kv_bias is None else jnp.maximum(jnp.asarray(mask.kv_bias), HIDDEN)


def _by_query(mask: BlockMask, b: int, h: int) -> QueryLists:
  """Returns the table's lists by query tile, stored or made here, with the order of the heads."""
  codes, counts, order = mask.launch.by_query if mask.launch else lists.by_query(mask)
  order = lists.order_of_call(counts, order, b, h)
  return jax.tree.map(jnp.asarray, QueryLists(codes, counts, order))


def _by_key(mask: BlockMask, b: int, h: int) -> KeyLists:
  """Returns the table's lists by key tile, stored or made here, with the order of the heads."""
  starts, counts, readers, order = mask.launch.by_key if mask.launch else lists.by_key(mask)
  order = lists.order_of_call(counts, order, b, h)
  kv_len = mask.kv_len.reshape(-1, mask.kv_tiles)
  return jax.tree.map(jnp.asarray, KeyLists(starts, counts, readers, kv_len, order))
