"""Linear attention: `out_i = phi(q_i) (sum_j phi(k_j) v_j^T) / (phi(q_i) sum_j phi(k_j))`, the sums over a segment of rows.

Not a softmax and not causal (Katharopoulos et al., arXiv 2006.16236). A segment is any set of rows: a frame, a tile, the
whole buffer. Costs `4 n d (d + 1)` FLOPs per head and memory O(n d); nothing of size n x n exists.

Feature maps (elementwise or over the channels of one token, all >= 0, so that denominators are sums of weights >= 0):

  softmax   over channels (the default of SLA, arXiv 2509.24006)
  elu       elu(x) + 1 (arXiv 2006.16236): strictly positive
  relu      sparse; a row may see nothing, then it counts as empty
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_mask import Array

FEATURE_MAPS = {"softmax": jax.nn.softmax, "elu": lambda x: jax.nn.elu(x) + 1, "relu": jax.nn.relu}
# A denominator below this is no denominator: its inverse, squared in the backward, would leave float32.
_TINY = 1e-18
_COLUMNS = 8  # what is appended to d for the denominator


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
  """Which rows of a buffer are summed together; a row is in one segment or in none.

  Attributes:
    rows: int32 `[segments, size]`, buffer rows of each segment, valid ones first; None: the buffer itself, in order,
      `segments * size` rows.
    place: int32 `[n]`, where each buffer row stands in `rows` (out of bounds: in none); None where `rows` is.
    length: int32 `[segments]`, rows of each segment, 0..size.
    size: static, rows of the longest segment. Memory is `segments * size * d`: near n where segments are equal.
  """

  rows: Array | None
  place: Array | None
  length: Array
  size: int = dataclasses.field(metadata={"static": True})

  @classmethod
  def of_ids(cls, ids: np.ndarray) -> "Segments":
    """From the segment of every buffer row, int `[n]`, -1 for none; ids that do not occur are empty segments."""
    ids = np.asarray(ids)
    order = np.argsort(ids, kind="stable")
    order = order[ids[order] >= 0].astype(np.int32)
    length = np.bincount(ids[order], minlength=1).astype(np.int32)
    size = max(1, int(length.max()))
    column = np.arange(len(order)) - np.repeat(np.cumsum(length) - length, length)
    at = (ids[order] * size + column).astype(np.int32)
    rows, place = np.zeros(len(length) * size, np.int32), np.full(len(ids), len(length) * size, np.int32)
    rows[at], place[order] = order, at
    return cls(rows.reshape(-1, size), place, length, size)

  @classmethod
  def of_tiles(cls, kv_len: Array, block: int) -> "Segments":
    """One segment per tile of `block` rows, of which the first `kv_len` `[tiles]` are valid."""
    return cls(None, None, kv_len, block)

  @classmethod
  def whole(cls, n: int) -> "Segments":
    """One segment: all n rows."""
    return cls(None, None, np.full(1, n, np.int32), n)

  def gather(self, x: jax.Array) -> jax.Array:
    """`[b, n, h, d] -> [b, segments, h, size, d]`, zeros where there is no row."""
    if self.rows is not None:
      x = jnp.take(x, jnp.asarray(self.rows).reshape(-1), axis=1, mode="clip")
    x = x.reshape(x.shape[0], -1, self.size, *x.shape[2:]).swapaxes(2, 3)
    return jnp.where(self.valid(), x, 0)

  def scatter(self, x: jax.Array, fill=0) -> jax.Array:
    """The inverse of `gather`, `fill` in rows without a segment."""
    x = jnp.where(self.valid(), x, fill).swapaxes(2, 3)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return x if self.place is None else jnp.take(x, self.place, axis=1, mode="fill", fill_value=fill)

  def valid(self) -> jax.Array:
    """bool `[segments, 1, size, 1]`: which gathered rows are rows."""
    return (jnp.arange(self.size) < jnp.asarray(self.length)[:, None])[:, None, :, None]


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: Segments | None = None,
  *,
  reads: jax.Array | None = None,
  feature_map: str = "softmax",
) -> tuple[jax.Array, jax.Array]:
  """Linear attention within segments, or from each segment to a set of segments.

  Args:
    q, k, v: `[b, n, h, d]`, one dtype; the three share the rows and their segments. Rows in no segment may hold anything
      finite: nothing depends on them. Features and sums are float32 (float64 for float64 inputs); where inputs have 16
      bits, features and sums are rounded to them as operands of a product, never while they add up.
    segments: which rows are summed together; None: all of them.
    reads: which segments' sums a segment's queries read, bool or weights >= 0 `[b or 1, h or 1, segments, segments]`,
      not differentiated; None: their own.
    feature_map: a name of `FEATURE_MAPS`.

  Returns:
    out `[b, n, h, d]` in q's dtype, and the natural log of each row's denominator `[b, h, n]`, float32 (float64). Rows that
    read nothing (no segment, an empty one, or a denominator below 1e-18) give 0, -inf and no gradient. Both results are
    differentiable in q, k, v.

  Raises:
    ValueError: for an unknown feature map, or shapes that contradict each other.
  """
  if feature_map not in FEATURE_MAPS:
    raise ValueError(f"{feature_map=} is unknown; choose one of {', '.join(FEATURE_MAPS)}.")
  if q.ndim != 4 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
    shapes = ", ".join(f"{x.dtype} {x.shape}" for x in (q, k, v))
    raise ValueError(f"linear_attention takes q, k, v [b, n, h, d] of one shape and dtype; got {shapes}.")
  segments = Segments.whole(q.shape[1]) if segments is None else segments
  count = segments.length.shape[0]
  rows = count * segments.size if segments.place is None else segments.place.shape[0]
  if rows != q.shape[1]:
    raise ValueError(f"the segments describe {rows} rows, the input has {q.shape[1]}; build them for this buffer.")
  if reads is not None:
    if reads.ndim != 4 or reads.shape[0] not in (1, q.shape[0]) or reads.shape[1] not in (1, q.shape[2]):
      raise ValueError(f"reads must be [b or 1, h or 1, segments, segments], got {reads.shape} for {q.shape=}.")
    if reads.shape[2:] != (count, count):
      raise ValueError(f"reads must be over {count} x {count} segments, got {reads.shape}.")
  return _linear(feature_map, q, k, v, segments, reads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(feature_map, q, k, v, segments, reads):
  return _forward(feature_map, q, k, v, segments, reads)


def _forward(feature_map, q, k, v, segments, reads):
  dot, phi = _product(q.dtype), FEATURE_MAPS[feature_map]
  queries, keys = phi(_wide(segments.gather(q))), _keys(phi, segments, _wide(segments.gather(k)))
  state = _read(dot, reads, dot("bshlm,bshld->bshmd", keys, _append(_wide(segments.gather(v)), 1)))
  num, den = jnp.split(dot("bshlm,bshmd->bshld", queries, state)[..., : 1 - _COLUMNS], [v.shape[-1]], -1)
  some = den > _TINY
  den = jnp.where(some, den, 1)
  out, log_den = jnp.where(some, num / den, 0), jnp.where(some, jnp.log(den), -jnp.inf)
  return segments.scatter(out.astype(q.dtype)), segments.scatter(log_den, -jnp.inf)[..., 0].transpose(0, 2, 1)


def _forward_rule(feature_map, q, k, v, segments, reads):
  out, log_den = _forward(feature_map, q, k, v, segments, reads)
  return (out, log_den), (q, k, v, segments, reads, out, log_den)


def _backward_rule(feature_map, residuals, cotangents):
  """With [num, den] = phi(q) S: dnum = dO / den and dden = (dlog_den - dO . O) / den; the rest is linear.

  S is computed again: keeping it would save one product of seven, and cost as much memory as q where segments are as short
  as d.
  """
  q, k, v, segments, reads, out, log_den = residuals
  dot, phi = _product(q.dtype), FEATURE_MAPS[feature_map]
  log_den, d_log = (segments.gather(x.transpose(0, 2, 1)[..., None]) for x in (log_den, cotangents[1]))
  some = (log_den > -jnp.inf) & segments.valid()  # who reads nothing has no gradient, whatever the cotangents hold
  inverse = jnp.where(some, jnp.exp(-jnp.where(some, log_den, 0)), 0)
  d_out = jnp.where(some, _wide(segments.gather(cotangents[0])), 0)
  d_den = jnp.where(some, d_log, 0) - (d_out * segments.gather(out)).sum(-1, keepdims=True)
  d_num = _append(d_out * inverse, d_den * inverse)

  queries, q_rule = jax.vjp(phi, _wide(segments.gather(q)))
  keys, k_rule = jax.vjp(functools.partial(_keys, phi, segments), _wide(segments.gather(k)))
  values = _append(_wide(segments.gather(v)), 1)
  state = _read(dot, reads, dot("bshlm,bshld->bshmd", keys, values))
  (d_queries,) = q_rule(dot("bshld,bshmd->bshlm", d_num, state))
  back = None if reads is None else reads.swapaxes(2, 3)
  d_state = _read(dot, back, dot("bshlm,bshld->bshmd", queries, d_num))
  (d_keys,) = k_rule(dot("bshld,bshmd->bshlm", values, d_state))
  d_values = dot("bshlm,bshmd->bshld", keys, d_state[..., :-_COLUMNS])
  grads = (segments.scatter(g).astype(x.dtype) for g, x in zip((d_queries, d_keys, d_values), (q, k, v), strict=True))
  return *grads, jax.tree.map(_no_gradient, segments), jax.tree.map(_no_gradient, reads)


_linear.defvjp(_forward_rule, _backward_rule)


def _wide(x):
  """At least float32."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _product(dtype):
  """Einsum for inputs of `dtype`: bfloat16 operands on tensor cores, adding up in float32; float32 exactly.

  float16 has no range for sums over a segment: its operands are float32, at the device's default (fast) precision.
  """
  if dtype != jnp.bfloat16:
    return functools.partial(jnp.einsum, precision="default" if dtype == jnp.float16 else "highest")
  return lambda equation, x, y: jnp.einsum(equation, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


def _keys(phi, segments, k):
  """phi of gathered keys, 0 where there is no row: phi(0) is not 0."""
  return jnp.where(segments.valid(), phi(k), 0)


def _append(x, last):
  """`[..., d]` and one more column `[..., 1]`, in rows of 16 aligned bytes: numerator and denominator are one product."""
  zeros = jnp.zeros((*x.shape[:-1], _COLUMNS - 1), x.dtype)
  return jnp.concatenate([x, jnp.broadcast_to(last, (*x.shape[:-1], 1)).astype(x.dtype), zeros], -1)


def _read(dot, reads, state):
  """What each segment's queries read of all segments' states; their own where `reads` is None."""
  if reads is None:
    return state
  reads = jnp.broadcast_to(reads, (state.shape[0], state.shape[2], *reads.shape[2:])).astype(state.dtype)
  return dot("bhij,bjhmd->bihmd", reads, state)


def _no_gradient(x):
  x = jnp.asarray(x)
  return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape, jax.dtypes.float0)
