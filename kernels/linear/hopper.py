"""Linear attention on Hopper: three kernels forward and back, sums of chunks and what segments read of each other in XLA.

Forward reads q, k, v and writes the output once, beside a segment's sums (d (d + 1) numbers per chunk of up to 2,048 rows).
Nothing is moved for heads that take no part. The products' operands are bfloat16, sums and denominators float32.
"""

import jax.numpy as jnp
from freqformer.kernels.core.target import Target
from freqformer.kernels.hopper import parts
from freqformer.kernels.linear import hopper_kernels as kernels
from freqformer.kernels.linear.hopper_kernels import Walk

HEAD_DIMS = (64, 128)


def unsupported(q, segments, target: Target) -> str | None:
  """Why this call cannot run, all reasons at once; None if it can."""
  reasons = [reason for reason in [parts.wrong_device(target)] if reason]
  if q.dtype != jnp.bfloat16:
    reasons.append(f"q, k, v are {q.dtype}, it takes bfloat16")
  if q.shape[-1] not in HEAD_DIMS:
    reasons.append(f"head_dim is {q.shape[-1]}, it takes {' or '.join(map(str, HEAD_DIMS))}")
  if segments.work is None:
    reasons.append(
      "the buffer has no multiple of 8 rows, tiles no multiple of 64, or segments run on for a few rows only"
    )
  return "; ".join(reasons) or None


def forward(q, k, v, segments, reads, heads, into, *, feature_map):
  """Shapes as in `kernels.linear.api.linear_attention`; the third result is for the backward."""
  walk = _walk(feature_map, segments, heads)
  sums = _sums(walk, segments, k, v, jnp.asarray(segments.work.fresh)[None, None], None)
  sums = _read_sums(reads, *sums)
  valid = jnp.asarray(segments.work.valid)[None, None]
  if heads is None or segments.work.mixed:
    out, log_den = kernels.read(walk, q, *sums, valid, None)
    out = _in_place(segments.work, heads, out, into)
  else:
    out, log_den = kernels.read(
      walk, q, *sums, valid, jnp.zeros(q.shape, q.dtype) if into is None else into
    )
  log_den = segments.work.buffer_rows(log_den)
  if heads is not None:
    log_den = jnp.where(heads[..., None], log_den, -jnp.inf)
  # Sums that are larger than a quarter of q are computed again instead.
  return out, log_den, sums if 4 * segments.count * q.shape[-1] <= q.shape[1] else None


def backward(q, k, v, segments, reads, heads, sums, log_den, delta, d_out, *, feature_map):
  """dq, dk, dv.

  Args:
    sums: of `forward`, or None.
    log_den: float32 `[b, h, n]`.
    delta: float32 `[b, h, n]`, `rowsum(d_out * out) - d_log_den`, 0 in rows that read nothing.
    d_out: 0 in rows that read nothing.
  """
  walk, work = _walk(feature_map, segments, heads), segments.work
  if sums is None:
    sums = _read_sums(
      reads, *_sums(walk, segments, k, v, jnp.asarray(work.fresh)[None, None], None)
    )
  some = log_den > -jnp.inf
  inverse = jnp.where(some, jnp.exp(-jnp.where(some, log_den, 0)), 0)
  d_den = jnp.where(some, -delta * inverse, 0)
  inverse, d_den = work.stage_rows(inverse), work.stage_rows(d_den)
  dq = kernels.dq(walk, q, d_out, inverse, d_den, *sums)
  d_sums = _sums(walk, segments, q, d_out, inverse * work.fresh, d_den * work.fresh)
  d_sums = _read_sums(None if reads is None else reads.swapaxes(2, 3), *d_sums)
  dk, dv = kernels.dkv(walk, k, v, jnp.asarray(work.valid)[None, None], *d_sums)
  return tuple(_in_place(work, heads, x, None) for x in (dq, dk, dv))


def _in_place(work, heads, x, others):
  """A kernel's rows, in the order of the buffer, beside those of the other heads (None: 0)."""
  if work.mixed:
    x = jnp.take(x, jnp.asarray(work.back), axis=1, mode="clip")
  return (
    x if heads is None else jnp.where(heads[:, None, :, None], x, 0 if others is None else others)
  )


def _walk(feature_map, segments, heads):
  return Walk(segments.work, None if heads is None else heads.astype(jnp.int32), feature_map)


def _sums(walk, segments, x, y, weights, others):
  """A segment's `phi(x)^T diag(weights) y` in the inputs' type, and `phi(x)^T others` in float32."""
  per = walk.work.per_segment
  state, total = kernels.states(
    walk, x, y, weights, others, segments.count, jnp.float32 if per > 1 else x.dtype
  )
  if per > 1:
    b, h, _, d = total.shape
    state, total = (
      state.reshape(b, h, -1, per, d, d).sum(3).astype(x.dtype),
      total.reshape(b, h, -1, per, d).sum(3),
    )
  return state, total


def _read_sums(reads, state, total):
  """What each segment's queries read of all segments' sums; their own where `reads` is None."""
  if reads is None:
    return state, total
  b, h, segments = total.shape[:3]
  reads = jnp.broadcast_to(reads, (b, h, segments, segments))

  def dot(x, **how):
    return jnp.einsum("bhij,bhj...->bhi...", reads.astype(x.dtype), x, **how)

  return dot(state, preferred_element_type=jnp.float32).astype(state.dtype), dot(
    total, precision="highest"
  )
