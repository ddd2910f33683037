"""Linear attention on Hopper: three kernels forward and back.

XLA sums chunks and what segments read of each other. The forward reads q, k and v and writes the
output once, besides a segment's sums (d (d + 1) numbers per chunk of up to 2,048 rows). Nothing
moves for heads that take no part. Operands of products are bfloat16, sums float32.
"""

import jax
import jax.numpy as jnp
from freqformer.kernels.core.target import Target
from freqformer.kernels.hopper.machine import wrong_device
from freqformer.kernels.linear import hopper_kernels as kernels
from freqformer.kernels.linear.hopper_kernels import LinearCall
from freqformer.kernels.linear.segments import Segments, Work

HEAD_DIMS = (64, 128)
# Sums larger than this share of q are computed again in the backward instead of kept.  # choice
_KEPT_SHARE = 1 / 4


def unsupported(q, segments: Segments, target: Target) -> str | None:
  """Returns all reasons why this call cannot run, as one clause; None if it can."""
  reasons = [wrong_device(target)]
  if q.dtype != jnp.bfloat16:
    reasons.append(f"q, k, v are {q.dtype}, it takes bfloat16")
  if q.shape[-1] not in HEAD_DIMS:
    reasons.append(f"head_dim is {q.shape[-1]}, it takes {' or '.join(map(str, HEAD_DIMS))}")
  if segments.work is None:
    reasons.append(
      "the buffer has no multiple of 8 rows, tiles no multiple of 64, or segments run on for "
      "a few rows only"
    )
  return "; ".join(filter(None, reasons)) or None


def forward(q, k, v, segments: Segments, reads, heads, into, *, feature_map: str):
  """Returns out, log_den and what the backward needs; shapes as in `linear_attention`."""
  call = _call(feature_map, segments, heads)
  work = segments.work
  sums = _sums(call, segments, k, v, jnp.asarray(work.fresh)[None, None], None)
  sums = _read_sums(reads, *sums)
  valid = jnp.asarray(work.valid)[None, None]
  if heads is None or work.mixed:
    out, log_den = kernels.read(call, q, *sums, valid, None)
    out = _in_place(work, heads, out, into)
  else:
    target = jnp.zeros(q.shape, q.dtype) if into is None else into
    out, log_den = kernels.read(call, q, *sums, valid, target)
  log_den = work.buffer_rows(log_den)
  if heads is not None:
    log_den = jnp.where(heads[..., None], log_den, -jnp.inf)
  keep = segments.count * q.shape[-1] <= _KEPT_SHARE * q.shape[1]
  return out, log_den, sums if keep else None


def backward(
  q, k, v, segments: Segments, reads, heads, sums, log_den, delta, d_out, *, feature_map: str
):
  """Returns dq, dk and dv.

  Args:
    sums: third result of `forward`.
    log_den, delta: float32 `[b, h, n]`; delta is `rowsum(d_out * out) - d_log_den`, 0 in rows that
      read nothing, as is d_out `[b, n, h, d]`.
  """
  call = _call(feature_map, segments, heads)
  work = segments.work
  if sums is None:
    sums = _sums(call, segments, k, v, jnp.asarray(work.fresh)[None, None], None)
    sums = _read_sums(reads, *sums)
  some = log_den > -jnp.inf
  inverse = jnp.where(some, jnp.exp(-jnp.where(some, log_den, 0)), 0)
  d_den = jnp.where(some, -delta * inverse, 0)
  inverse = work.stage_rows(inverse)
  d_den = work.stage_rows(d_den)
  dq = kernels.dq(call, q, d_out, inverse, d_den, *sums)
  d_sums = _sums(call, segments, q, d_out, inverse * work.fresh, d_den * work.fresh)
  d_sums = _read_sums(None if reads is None else reads.swapaxes(2, 3), *d_sums)
  dk, dv = kernels.dkv(call, k, v, jnp.asarray(work.valid)[None, None], *d_sums)
  return tuple(_in_place(work, heads, x, None) for x in (dq, dk, dv))


def _call(feature_map, segments: Segments, heads) -> LinearCall:
  heads = None if heads is None else heads.astype(jnp.int32)
  return LinearCall(segments.work, heads, feature_map)


def _in_place(work: Work, heads, x: jax.Array, others) -> jax.Array:
  """Returns a kernel's rows in the order of the buffer, and `others` (None: 0) for other heads."""
  if work.mixed:
    x = jnp.take(x, jnp.asarray(work.back), axis=1, mode="clip")
  if heads is None:
    return x
  return jnp.where(heads[:, None, :, None], x, 0 if others is None else others)


def _sums(call: LinearCall, segments: Segments, x, y, weights, others):
  """Returns each segment's `phi(x)^T diag(weights) y` `[b, h, segments, d, d]` in the inputs' type,
  and float32 `phi(x)^T others` `[b, h, segments, d]`; arguments as in `hopper_kernels.states`.
  """
  per_segment = call.work.per_segment
  dtype = jnp.float32 if per_segment > 1 else x.dtype
  state, total = kernels.states(call, x, y, weights, others, segments.count, dtype)
  if per_segment > 1:
    b, h, _, d = total.shape
    state = state.reshape(b, h, -1, per_segment, d, d).sum(3).astype(x.dtype)
    total = total.reshape(b, h, -1, per_segment, d).sum(3)
  return state, total


def _read_sums(reads, state, total):
  """Returns what each segment's queries read of all segments' sums; None: their own."""
  if reads is None:
    return state, total
  b, h, segments = total.shape[:3]
  reads = jnp.broadcast_to(reads, (b, h, segments, segments))

  def dot(x, **options):
    return jnp.einsum("bhij,bhj...->bhi...", reads.astype(x.dtype), x, **options)

  read_state = dot(state, preferred_element_type=jnp.float32).astype(state.dtype)
  return read_state, dot(total, precision="highest")
