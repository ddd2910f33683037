"""The Hopper backend: Pallas Mosaic GPU kernels, forward and backward, that walk the table's lists. One launch for all heads.

Nothing here needs a GPU to be checked: `parts.interpreted()` runs the kernels on any device, and under an abstract
mesh of an H100 they compile in a process without one.
"""

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse import cost, hopper_backward, hopper_forward, tuning
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.core import lists
from freqformer.kernels.core.lists import MAX_TILES
from freqformer.kernels.hopper import parts
from jax.experimental import pallas as pl

HEAD_DIMS = (32, 64, 128)
BLOCKS = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)


def unsupported(q, k, v, mask: BlockMask, target) -> str | None:
  """Why this call cannot run, all reasons at once; None if it can."""
  reasons = [*_wrong_target(target)]
  if q.dtype not in DTYPES:
    reasons.append(f"q, k, v are {q.dtype}, it takes bfloat16 or float16")
  if q.shape[-1] not in HEAD_DIMS:
    reasons.append(f"head_dim is {q.shape[-1]}, it takes {_either(HEAD_DIMS)}")
  for what, block, rows in (("q", mask.block_q, q.shape[1]), ("kv", mask.block_kv, k.shape[1])):
    if block not in BLOCKS:
      reasons.append(f"block_{what} is {block}, it takes {_either(BLOCKS)}")
    elif rows % block:
      reasons.append(
        f"{rows} {'query' if what == 'q' else 'key'} rows are no multiple of block_{what}={block}; pad the buffer"
      )
  if mask.kv_tiles > MAX_TILES:
    reasons.append(f"{mask.kv_tiles} key tiles exceed {MAX_TILES}")
  return "; ".join(reasons) or None


def _wrong_target(target):
  if parts.is_interpreted():
    return
  if target.platform != "cuda":
    yield (
      f"it runs on NVIDIA GPUs of compute capability 9.0, the target is {target}; use implementation='xla' there, or trace "
      "inside kernels.hopper.parts.interpreted() to check numerics"
    )
  elif target.capability != parts.CAPABILITY:
    yield f"it needs compute capability 9.0 (Hopper), the target is {target}; use implementation='xla' there"


def _either(values):
  return " or ".join(map(str, values))


def forward(q, k, v, mask, *, scale):
  """Shapes as in `kernels.block_sparse.api.attention`."""
  data, walked = (q, k, v), _by_query(mask, q.shape[0], q.shape[2])
  return hopper_forward.forward(
    data, walked, _bias(mask), _blocks(mask), scale, *_config(q, mask, "forward")
  )


def backward(q, k, v, mask, lse, delta, d_out, *, scale):
  """dQ by the lists, dK and dV by the transposed ones."""
  # A row that sees nothing: an LSE so large that every P is 0.
  lse = jnp.where(lse > -jnp.inf, lse * parts.LOG2E, 1e30)
  data = (q, k, v, d_out.astype(q.dtype), lse, delta)
  bias, blocks = _bias(mask), _blocks(mask)
  walked = _by_query(mask, q.shape[0], q.shape[2])
  dq = hopper_backward.dq(data, walked, bias, blocks, scale, *_config(q, mask, "dq"))
  walked = _by_key(mask, q.shape[0], q.shape[2])
  dk, dv = hopper_backward.dkv(data, walked, bias, blocks, scale, *_config(q, mask, "dkv"))
  return dq, dk, dv


def _config(q, mask, direction):
  """How the kernel runs, and what it costs: exactly where the table was NumPy, else as if all lists were full."""
  b, _, h, d = q.shape
  estimate = cost.expected(mask, d, b * h).estimate(q.dtype.itemsize, direction)
  return tuning.lookup(
    tuning.Key("h100", d, mask.block_q, mask.block_kv, direction)
  ), pl.CostEstimate(**estimate)


def _blocks(mask):
  return mask.block_q, mask.block_kv


def _bias(mask):
  return None if mask.kv_bias is None else jnp.maximum(jnp.asarray(mask.kv_bias), parts.HIDDEN)


def _by_query(mask, b, h):
  """Returns `lists.by_query` of the table, stored or made here, with the order of the call's heads."""
  codes, counts, order = mask.launch.by_query if mask.launch else lists.by_query(mask)
  order = lists.order_of_call(counts, order, b, h)
  return jax.tree.map(jnp.asarray, (codes, counts, order))


def _by_key(mask, b, h):
  """Returns `lists.by_key` of the table, stored or made here, with the order of the call's heads.

  Valid rows per key tile stand before the order.
  """
  starts, counts, readers, order = mask.launch.by_key if mask.launch else lists.by_key(mask)
  order = lists.order_of_call(counts, order, b, h)
  kv_len = mask.kv_len.reshape(-1, mask.kv_tiles)
  return jax.tree.map(jnp.asarray, (starts, counts, readers, kv_len, order))
