"""Cotangents that the ops' backward passes have in common."""

import jax
import jax.numpy as jnp
import numpy as np


def no_gradient(x: jax.typing.ArrayLike) -> jax.Array | np.ndarray:
  """Returns a zero cotangent of `x`: of its own dtype, or float0 for integers and booleans."""
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.zeros_like(x)
  return np.zeros(x.shape, jax.dtypes.float0)


def of_weighted_means(
  out: jax.Array, log_sum: jax.Array, d_out: jax.Array, d_log_sum: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns what the backward of `out_i = sum_j w_ij v_j / sum_j w_ij` needs of its two cotangents.

  The weights' cotangent is `(dO V^T - delta) w / sum w`. Rows without weights have no gradient.

  Args:
    out, d_out: `[b, n, h, d]`.
    log_sum, d_log_sum: `[b, h, n]`, log of each row's sum of weights; -inf in rows without any.

  Returns:
    d_out, and `delta = rowsum(dO * O) - d_log_sum` `[b, h, n]`; both 0 in rows without weights.
  """
  alive = log_sum > -jnp.inf
  d_out = jnp.where(alive.transpose(0, 2, 1)[..., None], d_out, 0)
  # Not an einsum, which would copy both operands, transposed and widened.
  delta = (d_out.astype(log_sum.dtype) * out.astype(log_sum.dtype)).sum(-1).transpose(0, 2, 1)
  return d_out, jnp.where(alive, delta - d_log_sum, 0)
