"""A learned gate that starts at 0: whatever is added through it leaves a fresh or restored model as it was."""

import jax
import jax.numpy as jnp
from flax import nnx


class QueryGate(nnx.Module):
  """Per head a linear map of the token's query to one factor per channel: `[b, n, h, d] -> [b, n, h, d]`; 0 at the start."""

  def __init__(self, heads: int, head_dim: int):
    self.kernel = nnx.Param(jnp.zeros((heads, head_dim, head_dim)))
    self.bias = nnx.Param(jnp.zeros((heads, head_dim)))

  def __call__(self, q: jax.Array) -> jax.Array:
    return jnp.einsum("bnhd,hde->bnhe", q, self.kernel[...].astype(q.dtype)) + self.bias[
      ...
    ].astype(q.dtype)
