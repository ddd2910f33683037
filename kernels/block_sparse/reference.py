"""The oracle: attention with the full n x n matrix, written to be read. Any device, any dtype; small inputs."""

import jax.numpy as jnp


def unsupported(q, k, v, mask, target) -> str | None:
  """The reference runs everything."""
  return None


def _wide(*arrays):
  """At least float32, and float64 where the caller works in float64."""
  return tuple(a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays)


def _scores(q, k, mask, scale):
  """Scaled, biased scores `[b, h, n_q, n_kv]`, -inf where the table hides a pair."""
  seen = jnp.asarray(mask.to_dense())[..., : q.shape[1], : k.shape[1]]
  scores = jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") * scale
  if mask.kv_bias is not None:
    scores += jnp.repeat(jnp.asarray(mask.kv_bias, scores.dtype), mask.block_kv)[: k.shape[1]]
  return jnp.where(seen, scores, -jnp.inf)


def _probabilities(scores, lse):
  """exp(scores - lse), 0 in rows that see nothing."""
  lse = jnp.where(lse > -jnp.inf, lse, 0)[..., None]
  return jnp.exp(scores - lse)


def forward(q, k, v, mask, scale):
  """out `[b, n_q, h, d]` and LSE `[b, h, n_q]`; shapes as in `kernels.block_sparse.api.attention`."""
  wide_q, wide_k, wide_v = _wide(q, k, v)
  scores = _scores(wide_q, wide_k, mask, scale)
  top = scores.max(-1)
  top = jnp.where(top > -jnp.inf, top, 0)
  lse = jnp.log(jnp.exp(scores - top[..., None]).sum(-1)) + top
  out = jnp.einsum("bhij,bjhd->bihd", _probabilities(scores, lse), wide_v, precision="highest")
  return out.astype(q.dtype), lse


def backward(q, k, v, mask, scale, lse, delta, d_out):
  """dq, dk, dv; `delta` [b, h, n_q] = rowsum(dO * O) - dLSE."""
  q, k, v, d_out = _wide(q, k, v, d_out)
  p = _probabilities(_scores(q, k, mask, scale), lse)
  dv = jnp.einsum("bhij,bihd->bjhd", p, d_out, precision="highest")
  ds = p * (jnp.einsum("bihd,bjhd->bhij", d_out, v, precision="highest") - delta[..., None]) * scale
  dq = jnp.einsum("bhij,bjhd->bihd", ds, k, precision="highest")
  dk = jnp.einsum("bhij,bihd->bjhd", ds, q, precision="highest")
  return dq, dk, dv
