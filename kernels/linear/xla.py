"""Linear attention in plain XLA: any device, any dtype, any segments; also what the GPU kernels are checked against.

Rows are gathered segment by segment; heads that take no part are computed and thrown away.
"""

import functools

import jax
import jax.numpy as jnp
from freqformer.kernels.linear.segments import TINY

FEATURE_MAPS = {"softmax": jax.nn.softmax, "elu": lambda x: jax.nn.elu(x) + 1, "relu": jax.nn.relu}
_COLUMNS = 8  # what is appended to d for the denominator


def unsupported(q, segments, target) -> None:
  """Nothing is."""
  del q, segments, target


def forward(feature_map, q, k, v, segments, reads, heads, into):
  """Shapes as in `kernels.linear.api.linear_attention`; nothing is kept for the backward."""
  dot, phi = _product(q.dtype), FEATURE_MAPS[feature_map]
  queries, keys = phi(_wide(segments.gather(q))), _keys(phi, segments, _wide(segments.gather(k)))
  state = _read(dot, reads, dot("bshlm,bshld->bshmd", keys, _append(_wide(segments.gather(v)), 1)))
  num, den = jnp.split(
    dot("bshlm,bshmd->bshld", queries, state)[..., : 1 - _COLUMNS], [v.shape[-1]], -1
  )
  some = den > TINY
  den = jnp.where(some, den, 1)
  out, log_den = jnp.where(some, num / den, 0), jnp.where(some, jnp.log(den), -jnp.inf)
  out = segments.scatter(out.astype(q.dtype))
  log_den = segments.scatter(log_den, -jnp.inf)[..., 0].transpose(0, 2, 1)
  if heads is not None:
    out = jnp.where(heads[:, None, :, None], out, 0 if into is None else into)
    log_den = jnp.where(heads[..., None], log_den, -jnp.inf)
  return out, log_den, None


def backward(feature_map, q, k, v, segments, reads, heads, sums, rows):
  """With [num, den] = phi(q) S: dnum = dO / den and dden = (dlog_den - dO . O) / den; the rest is linear.

  S is computed again: keeping it would save one product of seven, and cost as much memory as q where segments are as short
  as d.
  """
  del (
    heads,
    sums,
  )  # a head that takes no part has log_den = -inf: it reads nothing, and nothing reads it
  dot, phi = _product(q.dtype), FEATURE_MAPS[feature_map]
  *numbers, d_out = rows
  log_den, d_log, delta = (segments.gather(x.transpose(0, 2, 1)[..., None]) for x in numbers)
  some = (
    log_den > -jnp.inf
  ) & segments.valid()  # who reads nothing has no gradient, whatever the cotangents hold
  inverse = jnp.where(some, jnp.exp(-jnp.where(some, log_den, 0)), 0)
  d_num = _append(
    _wide(segments.gather(d_out)) * inverse, jnp.where(some, d_log - delta, 0) * inverse
  )

  queries, q_rule = jax.vjp(phi, _wide(segments.gather(q)))
  keys, k_rule = jax.vjp(functools.partial(_keys, phi, segments), _wide(segments.gather(k)))
  values = _append(_wide(segments.gather(v)), 1)
  state = _read(dot, reads, dot("bshlm,bshld->bshmd", keys, values))
  (d_queries,) = q_rule(dot("bshld,bshmd->bshlm", d_num, state))
  back = None if reads is None else reads.swapaxes(2, 3)
  d_state = _read(dot, back, dot("bshlm,bshld->bshmd", queries, d_num))
  (d_keys,) = k_rule(dot("bshld,bshmd->bshlm", values, d_state))
  d_values = dot("bshlm,bshmd->bshld", keys, d_state[..., :-_COLUMNS])
  return tuple(segments.scatter(g) for g in (d_queries, d_keys, d_values))


def _wide(x):
  """At least float32."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _product(dtype):
  """Einsum for inputs of `dtype`: bfloat16 operands on tensor cores, adding up in float32; float32 exactly.

  float16 has no range for sums over a segment: its operands are float32, at the device's default (fast) precision.
  """
  if dtype != jnp.bfloat16:
    return functools.partial(jnp.einsum, precision="default" if dtype == jnp.float16 else "highest")
  return lambda equation, x, y: jnp.einsum(
    equation, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
  )


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
  reads = jnp.broadcast_to(reads, (state.shape[0], state.shape[2], *reads.shape[2:])).astype(
    state.dtype
  )
  return dot("bhij,bjhmd->bihmd", reads, state)
