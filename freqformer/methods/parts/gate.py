"""A learned gate that starts at 0: what is added through it leaves a new model as it was."""

import jax
import jax.numpy as jnp
from flax import nnx


class QueryGate(nnx.Module):
  """A linear map per head from queries `[b, n, h, d]` to a factor per channel; 0 at the start."""

  def __init__(self, heads: int, head_dim: int):
    self.kernel = nnx.Param(jnp.zeros((heads, head_dim, head_dim)))
    self.bias = nnx.Param(jnp.zeros((heads, head_dim)))

  def __call__(self, q: jax.Array) -> jax.Array:
    kernel = self.kernel[...].astype(q.dtype)
    return jnp.einsum("bnhd,hde->bnhe", q, kernel) + self.bias[...].astype(q.dtype)
