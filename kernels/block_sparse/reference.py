"""The definition of attention: the full n x n matrix, for any device and dtype and small inputs."""

import jax.numpy as jnp

SECOND_DERIVATIVES = ("forward", "reverse")


def forward(q, k, v, mask, *, scale):
  """Returns out and LSE, with shapes as in `kernels.block_sparse.api.attention`."""
  wide_q, wide_k, wide_v = _wide(q, k, v)
  scores = _scores(wide_q, wide_k, mask, scale)
  top = scores.max(-1)
  top = jnp.where(top > -jnp.inf, top, 0)
  lse = jnp.log(jnp.exp(scores - top[..., None]).sum(-1)) + top
  out = jnp.einsum("bhij,bjhd->bihd", _probabilities(scores, lse), wide_v, precision="highest")
  return out.astype(q.dtype), lse


def backward(q, k, v, mask, lse, delta, d_out, *, scale):
  """Returns dq, dk, dv; `delta` `[b, h, n_q]` is rowsum(dO * O) - dLSE."""
  q, k, v, d_out = _wide(q, k, v, d_out)
  p = _probabilities(_scores(q, k, mask, scale), lse)
  dv = jnp.einsum("bhij,bihd->bjhd", p, d_out, precision="highest")
  dp = jnp.einsum("bihd,bjhd->bhij", d_out, v, precision="highest")
  ds = p * (dp - delta[..., None]) * scale
  dq = jnp.einsum("bhij,bjhd->bihd", ds, k, precision="highest")
  dk = jnp.einsum("bhij,bihd->bjhd", ds, q, precision="highest")
  return dq, dk, dv


def _wide(*arrays):
  """Returns the arrays in at least float32, and in float64 where the caller works in float64."""
  return tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays)


def _scores(q, k, mask, scale):
  """Returns scaled, biased scores `[b, h, n_q, n_kv]`, -inf where the table hides a pair."""
  seen = jnp.asarray(mask.to_dense())[..., : q.shape[1], : k.shape[1]]
  scores = jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") * scale
  if mask.kv_bias is not None:
    scores += jnp.repeat(jnp.asarray(mask.kv_bias, scores.dtype), mask.block_kv)[: k.shape[1]]
  return jnp.where(seen, scores, -jnp.inf)


def _probabilities(scores, lse):
  """Returns exp(scores - lse), 0 in rows that see nothing."""
  lse = jnp.where(lse > -jnp.inf, lse, 0)[..., None]
  return jnp.exp(scores - lse)
