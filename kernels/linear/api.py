"""Linear attention: `out_i = phi(q_i) (sum_j phi(k_j) v_j^T) / (phi(q_i) sum_j phi(k_j))`, the sums over a segment of rows.

Not a softmax and not causal (Katharopoulos et al., arXiv 2006.16236). A segment is any set of rows: a frame, a tile, the
whole buffer. Costs `4 n d (d + 1)` FLOPs per head and memory O(n d); nothing of size n x n exists.

Feature maps (elementwise or over the channels of one token, all >= 0, so that denominators are sums of weights >= 0):

  softmax   over channels (the default of SLA, arXiv 2509.24006)
  elu       elu(x) + 1 (arXiv 2006.16236): strictly positive
  relu      sparse; a row may see nothing, then it counts as empty

A backend is a module `kernels.linear_*` with `unsupported`, `forward` and `backward`; a named one is used or refused, never
silently replaced.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.core.cotangents import no_gradient
from freqformer.kernels.core.dispatch import choose
from freqformer.kernels.core.partition import by_sample_and_head, several_devices
from freqformer.kernels.core.target import Target, current_target
from freqformer.kernels.linear.segments import Segments
from freqformer.kernels.linear.xla import FEATURE_MAPS

# In order of preference: the names that `attention` uses, and their modules.
BACKENDS = {
  "pallas_mgpu": "freqformer.kernels.linear.hopper",
  "xla": "freqformer.kernels.linear.xla",
}

__all__ = ["BACKENDS", "FEATURE_MAPS", "Segments", "choose_backend", "linear_attention"]


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
    q, k, v: `[b, n, h, d]`, one dtype; the three share the rows and their segments. Rows in no segment may hold anything
      finite: nothing depends on them. Features and sums are float32 (float64 for float64 inputs); where inputs have 16
      bits, features and sums are rounded to them as operands of a product, never while they add up.
    segments: which rows are summed together; None: all of them.
    reads: which segments' sums a segment's queries read, bool or weights >= 0 `[b or 1, h or 1, segments, segments]`,
      not differentiated; None: their own.
    feature_map: a name of `FEATURE_MAPS`.
    heads: bool `[b or 1, h or 1]`, which heads take part; the others read nothing, and a GPU kernel moves nothing for them.
      None: all. A NumPy array `[1, h]` is known before tracing: then XLA, too, computes nothing for them.
    into: `[b, n, h, d]` in q's dtype, the output of the heads that take no part; it may be overwritten in place. None: 0.
    implementation: a name of `BACKENDS`, or None for the first that supports the call.

  Returns:
    out `[b, n, h, d]` in q's dtype, and the natural log of each row's denominator `[b, h, n]`, float32 (float64). Rows that
    read nothing (no segment, an empty one, or a denominator below 1e-18) give 0, -inf and no gradient. Both results are
    differentiable in q, k, v, the first in `into`, too.

  Raises:
    ValueError: for an unknown feature map or implementation, or shapes that contradict each other.
    NotImplementedError: if the named implementation does not support the call, with every reason.
  """
  segments = Segments.whole(q.shape[1]) if segments is None else segments
  _validate(q, k, v, segments, reads, feature_map, heads, into)
  name = choose_backend(q, segments, implementation)
  if name == "xla" and isinstance(heads, np.ndarray) and heads.shape == (1, q.shape[2]):
    return _on_known_heads(
      functools.partial(_linear, name, feature_map),
      q,
      k,
      v,
      segments,
      reads,
      np.flatnonzero(heads),
      into,
    )
  return _linear(name, feature_map, q, k, v, segments, reads, heads, into)


def choose_backend(
  q, segments: Segments, implementation: str | None = None, target: Target | None = None
) -> str:
  """The name of the backend that `linear_attention` would run; raises as it does."""
  if implementation not in (None, *BACKENDS):
    raise ValueError(
      f"{implementation=} is unknown; choose one of {', '.join(BACKENDS)} or None for automatic choice."
    )
  target = current_target() if target is None else target

  def refused(name):
    return _backend(name).unsupported(q, segments, target)

  return choose("linear attention", BACKENDS, refused, implementation, target)


def _backend(name):
  return importlib.import_module(BACKENDS[name])


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
      f"the segments describe {segments.buffer} rows, the input has {q.shape[1]}; build them for this buffer."
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
      f"into must come with heads and be {q.dtype} {q.shape}, got {into.dtype} {into.shape} and {heads=}."
    )


def _on_known_heads(run, q, k, v, segments, reads, own, into):
  """XLA's shapes are static: `run` on the heads that take part, cut out and put back."""
  into = jnp.zeros(q.shape, q.dtype) if into is None else into
  empty = jnp.full(
    (q.shape[0], *q.shape[2:0:-1]), -jnp.inf, jnp.promote_types(q.dtype, jnp.float32)
  )
  if not len(own):
    return into, empty

  def cut(x, axis):
    return jnp.take(x, own, axis=axis, unique_indices=True, indices_are_sorted=True)

  reads = reads if reads is None or reads.shape[1] == 1 else cut(reads, 1)
  out, log_den = run(cut(q, 2), cut(k, 2), cut(v, 2), segments, reads, None, None)
  return into.at[:, :, own].set(out, unique_indices=True), empty.at[:, own].set(
    log_den, unique_indices=True
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(name, feature_map, *operands):
  return _forward(name, feature_map, *operands)[:2]


def _forward(name, feature_map, q, k, v, segments, reads, heads, into):
  run, operands = (
    functools.partial(_backend(name).forward, feature_map),
    (q, k, v, segments, reads, heads, into),
  )
  if name == "xla" or not several_devices():
    return run(*operands)
  dims = [
    *_dims(q, segments),
    *_lead(q, reads, "bh.."),
    *_lead(q, heads, "bh"),
    *_lead(q, into, "b.h."),
  ]
  kept = None if jax.eval_shape(run, *operands)[2] is None else ("bh...", "bh..")
  return by_sample_and_head(run, operands, dims, ("b.h.", "bh.", kept))


def _backward(name, feature_map, q, k, v, segments, reads, heads, sums, rows):
  run, operands = (
    functools.partial(_backend(name).backward, feature_map),
    (q, k, v, segments, reads, heads, sums, rows),
  )
  if name == "xla" or not several_devices():
    return run(*operands)
  dims = [*_dims(q, segments), *_lead(q, reads, "bh.."), *_lead(q, heads, "bh")]
  dims += ["bh...", "bh.."] * (sums is not None) + ["bh."] * 3 + ["b.h."]
  return by_sample_and_head(run, operands, dims, ("b.h.",) * 3)


def _dims(q, segments):
  """For `by_sample_and_head`: which dimensions of q, k, v and the segments' leaves are samples and heads."""
  return ["b.h."] * 3 + ["." * np.ndim(x) for x in jax.tree.leaves(segments)]


def _lead(q, x, dims):
  """The same of an array that may serve all samples or heads (size 1), or be None."""
  size = {"b": q.shape[0], "h": q.shape[2]}
  return (
    []
    if x is None
    else ["".join(d if x.shape[i] == size.get(d) else "." for i, d in enumerate(dims))]
  )


def _forward_rule(name, feature_map, q, k, v, segments, reads, heads, into):
  out, log_den, kept = _forward(name, feature_map, q, k, v, segments, reads, heads, into)
  others = None if into is None else ~heads  # whose output is `into`
  return (out, log_den), (q, k, v, segments, reads, heads, others, out, log_den, kept)


def _backward_rule(name, feature_map, residuals, cotangents):
  """What concerns rows alone: who reads nothing has no gradient, whatever its cotangents hold; delta = sum(dO * O)."""
  q, k, v, segments, reads, heads, others, out, log_den, kept = residuals
  d_out, d_log = cotangents
  d_into = None if others is None else jnp.where(others[:, None, :, None], d_out, 0)
  some = log_den > -jnp.inf
  d_out = jnp.where(some.transpose(0, 2, 1)[..., None], d_out, 0)
  delta = (d_out.astype(log_den.dtype) * out.astype(log_den.dtype)).sum(-1).transpose(0, 2, 1)
  d_log = jnp.where(some, d_log, 0)
  grads = _backward(
    name, feature_map, q, k, v, segments, reads, heads, kept, (log_den, d_log, delta, d_out)
  )
  grads = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
  return *grads, *(jax.tree.map(no_gradient, x) for x in (segments, reads, heads)), d_into


_linear.defvjp(_forward_rule, _backward_rule)
