"""The definition of linear attention, in plain XLA: any device, any dtype, any segments.

Rows are gathered segment by segment. Heads that take no part are computed and thrown away.
"""

import functools

import jax
import jax.numpy as jnp
from freqformer.kernels.linear.segments import TINY


def _elu(x):
  return jax.nn.elu(x) + 1


FEATURE_MAPS = {"softmax": jax.nn.softmax, "elu": _elu, "relu": jax.nn.relu}
_COLUMNS = 8  # appended to d for the denominator


def forward(q, k, v, segments, reads, heads, into, *, feature_map):
  """Returns out and log_den as `kernels.linear.api.linear_attention`; keeps nothing."""
  dot = _product(q.dtype)
  phi = FEATURE_MAPS[feature_map]
  queries = phi(_wide(segments.gather(q)))
  keys = _keys(phi, segments, _wide(segments.gather(k)))
  values = _append(_wide(segments.gather(v)), 1)
  state = _read(dot, reads, dot("bshlm,bshld->bshmd", keys, values))
  sums = dot("bshlm,bshmd->bshld", queries, state)[..., : 1 - _COLUMNS]
  num, den = jnp.split(sums, [v.shape[-1]], -1)
  some = den > TINY
  den = jnp.where(some, den, 1)
  out = segments.scatter(jnp.where(some, num / den, 0).astype(q.dtype))
  log_den = segments.scatter(jnp.where(some, jnp.log(den), -jnp.inf), -jnp.inf)
  log_den = log_den[..., 0].transpose(0, 2, 1)
  if heads is not None:
    out = jnp.where(heads[:, None, :, None], out, 0 if into is None else into)
    log_den = jnp.where(heads[..., None], log_den, -jnp.inf)
  return out, log_den, None


def backward(q, k, v, segments, reads, heads, kept, log_den, delta, d_out, *, feature_map):
  """Returns dq, dk, dv.

  With [num, den] = phi(q) S: dnum = dO / den and dden = -delta / den; the rest is linear. S is
  computed again: keeping it saves one product of seven, and can cost as much memory as q. A head
  that takes no part has log_den = -inf: it reads nothing, and nothing reads it.
  """
  del heads, kept
  dot = _product(q.dtype)
  phi = FEATURE_MAPS[feature_map]
  log_den, delta = (segments.gather(x.transpose(0, 2, 1)[..., None]) for x in (log_den, delta))
  # A row that reads nothing has no gradient, whatever the cotangents hold.
  some = (log_den > -jnp.inf) & segments.valid()
  inverse = jnp.where(some, jnp.exp(-jnp.where(some, log_den, 0)), 0)
  d_den = jnp.where(some, -delta, 0) * inverse
  d_num = _append(_wide(segments.gather(d_out)) * inverse, d_den)

  queries, q_rule = jax.vjp(phi, _wide(segments.gather(q)))
  keys, k_rule = jax.vjp(functools.partial(_keys, phi, segments), _wide(segments.gather(k)))
  values = _append(_wide(segments.gather(v)), 1)
  state = _read(dot, reads, dot("bshlm,bshld->bshmd", keys, values))
  (d_queries,) = q_rule(dot("bshld,bshmd->bshlm", d_num, state))
  readers = None if reads is None else reads.swapaxes(2, 3)
  d_state = _read(dot, readers, dot("bshlm,bshld->bshmd", queries, d_num))
  (d_keys,) = k_rule(dot("bshld,bshmd->bshlm", values, d_state))
  d_values = dot("bshlm,bshmd->bshld", keys, d_state[..., :-_COLUMNS])
  return tuple(segments.scatter(g) for g in (d_queries, d_keys, d_values))


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _product(dtype):
  """Returns the einsum for `dtype`: bfloat16 adds up in float32 on tensor cores, float32 is exact,
  float16 (no range for sums) becomes float32 at the device's default, fast precision.
  """
  if dtype != jnp.bfloat16:
    return functools.partial(jnp.einsum, precision="default" if dtype == jnp.float16 else "highest")

  def product(equation, x, y):
    x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

  return product


def _keys(phi, segments, k):
  """Returns phi of gathered keys, 0 where there is no row: phi(0) is not 0."""
  return jnp.where(segments.valid(), phi(k), 0)


def _append(x, last):
  """Appends `[..., 1]` to `[..., d]` (both sums in one product) and zeros up to 16 bytes."""
  zeros = jnp.zeros((*x.shape[:-1], _COLUMNS - 1), x.dtype)
  return jnp.concatenate([x, jnp.broadcast_to(last, (*x.shape[:-1], 1)).astype(x.dtype), zeros], -1)


def _read(dot, reads, state):
  """Returns what each segment's queries read of all states; their own where `reads` is None."""
  if reads is None:
    return state
  shape = (state.shape[0], state.shape[2], *reads.shape[2:])
  return dot("bhij,bjhmd->bihmd", jnp.broadcast_to(reads, shape).astype(state.dtype), state)
