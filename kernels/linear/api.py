"""Linear attention: `out_i = phi(q_i) (sum_j phi(k_j) v_j^T) / (phi(q_i) sum_j phi(k_j))`.

Sums run over a segment of rows, not causal (arXiv 2006.16236): `4 n d (d + 1)` FLOPs per head.
Features are >= 0: softmax over channels (SLA's default, arXiv 2509.24006), elu(x) + 1, relu.

An implementation is a module with `unsupported(q, segments, target) -> str | None`, `forward(q, k,
v, segments, reads, heads, into, *, feature_map) -> (out, log_den, kept)` and `backward(q, k, v,
segments, reads, heads, kept, log_den, delta, d_out, *, feature_map)`; kept is a tree or None.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.core.cotangents import no_gradient, of_weighted_means
from freqformer.kernels.core.op import Op, Split
from freqformer.kernels.linear.segments import Segments
from freqformer.kernels.linear.xla import FEATURE_MAPS

__all__ = ["FEATURE_MAPS", "LINEAR_ATTENTION", "Segments", "linear_attention"]

_INPUTS = ("b.h.", "b.h.", "b.h.", ".", "bh..", "bh")  # q, k, v, segments, reads, heads
LINEAR_ATTENTION = Op(
  name="linear attention",
  implementations={"hopper": "linear.hopper", "xla": "linear.xla"},
  forward=Split((*_INPUTS, "b.h."), ("b.h.", "bh.", "bh")),
  backward=Split((*_INPUTS, "bh", "bh.", "bh.", "b.h."), "b.h."),
)


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: Segments | None = None,
  *,
  reads: jax.Array | None = None,
  feature_map: str = "softmax",
  heads: jax.Array | None = None,
  into: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Linear attention within segments, or over the segments that each one reads.

  Args:
    q, k, v: `[b, n, h, d]`, one dtype. Rows in no segment may hold anything finite: nothing depends
      on them. Features and sums are float32 (float64 for float64 inputs); 16-bit inputs round them
      as operands of a product, never while they add up.
    segments: which rows are summed together; None: all of them.
    reads: which segments' sums a segment's queries read, bool or weights >= 0
      `[b or 1, h or 1, segments, segments]`, not differentiated; None: their own.
    feature_map: a name of `FEATURE_MAPS`.
    heads: bool `[b or 1, h or 1]`, which heads take part; the others read nothing, and a GPU kernel
      moves nothing for them. None: all. XLA, too, computes nothing for heads that a NumPy array
      `[1, h]` excludes.
    into: `[b, n, h, d]` in q's dtype, the output of the heads that take no part; it may be
      overwritten in place. None: 0.
    implementation: of `LINEAR_ATTENTION.implementations`; None: the first that supports the call.

  Returns:
    out `[b, n, h, d]` in q's dtype, and the natural log of each row's denominator `[b, h, n]`,
    float32 (float64). Rows that read nothing (no segment, an empty one, or a denominator below
    1e-18) give 0, -inf and no gradient. Both results are differentiable in q, k, v, the first in
    `into`, too.

  Raises:
    ValueError: for an unknown feature map or implementation, or shapes that contradict each other.
    NotImplementedError: if the named implementation does not support the call, with every reason.
  """
  segments = Segments.whole(q.shape[1]) if segments is None else segments
  _validate(q, k, v, segments, reads, feature_map, heads, into)
  name = LINEAR_ATTENTION.choose(q, segments, implementation=implementation)
  run = functools.partial(_linear, name, feature_map)
  if name == "xla" and isinstance(heads, np.ndarray) and heads.shape == (1, q.shape[2]):
    return _on_known_heads(run, q, k, v, segments, reads, np.flatnonzero(heads), into)
  return run(q, k, v, segments, reads, heads, into)


def _validate(q, k, v, segments, reads, feature_map, heads, into):
  if feature_map not in FEATURE_MAPS:
    raise ValueError(f"{feature_map=} is unknown; choose one of {', '.join(FEATURE_MAPS)}.")
  if q.ndim != 4 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
    shapes = ", ".join(f"{x.dtype} {x.shape}" for x in (q, k, v))
    raise ValueError(
      f"linear_attention takes q, k, v [b, n, h, d] of one shape and dtype; got {shapes}."
    )
  if segments.buffer != q.shape[1]:
    raise ValueError(
      f"the segments describe {segments.buffer} rows, the input has {q.shape[1]}; build them for "
      "this buffer."
    )

  def lead(x):
    return x.shape[0] in (1, q.shape[0]) and x.shape[1] in (1, q.shape[2])

  if reads is not None:
    if reads.ndim != 4 or not lead(reads):
      raise ValueError(
        f"reads must be [b or 1, h or 1, segments, segments], got {reads.shape} for {q.shape=}."
      )
    if reads.shape[2:] != (segments.count, segments.count):
      raise ValueError(
        f"reads must be over {segments.count} x {segments.count} segments, got {reads.shape}."
      )
  if heads is not None and (heads.ndim != 2 or not lead(heads) or heads.dtype != bool):
    raise ValueError(
      f"heads must be bool [b or 1, h or 1], got {heads.dtype} {heads.shape} for {q.shape=}."
    )
  if into is not None and (heads is None or into.shape != q.shape or into.dtype != q.dtype):
    raise ValueError(
      f"into must come with heads and be {q.dtype} {q.shape}, got {into.dtype} {into.shape} and "
      f"{heads=}."
    )


def _on_known_heads(run, q, k, v, segments, reads, own, into):
  """Runs the heads that take part, cut out and put back: XLA's shapes are static."""
  into = jnp.zeros(q.shape, q.dtype) if into is None else into
  b, n, h, _ = q.shape
  empty = jnp.full((b, h, n), -jnp.inf, jnp.promote_types(q.dtype, jnp.float32))
  if not len(own):
    return into, empty

  def cut(x, axis):
    return jnp.take(x, own, axis=axis, unique_indices=True, indices_are_sorted=True)

  reads = reads if reads is None or reads.shape[1] == 1 else cut(reads, 1)
  out, log_den = run(cut(q, 2), cut(k, 2), cut(v, 2), segments, reads, None, None)
  out = into.at[:, :, own].set(out, unique_indices=True)
  return out, empty.at[:, own].set(log_den, unique_indices=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(name, feature_map, *operands):
  return LINEAR_ATTENTION.run(name, operands, feature_map=feature_map)[:2]


def _linear_fwd(name, feature_map, q, k, v, segments, reads, heads, into):
  operands = (q, k, v, segments, reads, heads, into)
  out, log_den, kept = LINEAR_ATTENTION.run(name, operands, feature_map=feature_map)
  others = None if into is None else ~heads  # whose output is `into`
  return (out, log_den), (q, k, v, segments, reads, heads, others, out, log_den, kept)


def _linear_bwd(name, feature_map, residuals, cotangents):
  q, k, v, segments, reads, heads, others, out, log_den, kept = residuals
  d_into = None if others is None else jnp.where(others[:, None, :, None], cotangents[0], 0)
  d_out, delta = of_weighted_means(out, log_den, *cotangents)
  operands = (q, k, v, segments, reads, heads, kept, log_den, delta, d_out)
  dq, dk, dv = LINEAR_ATTENTION.run(name, operands, "backward", feature_map=feature_map)
  grads = (dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype))
  return *grads, *(jax.tree.map(no_gradient, x) for x in (segments, reads, heads)), d_into


_linear.defvjp(_linear_fwd, _linear_bwd)
