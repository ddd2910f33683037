"""Conditioners: they make a vector of the model's width of what a clip is conditioned on.

A conditioner takes the batch's `label`, any array with a row per clip, and `null(count)` is what
stands there for clips without a condition: where guidance or `train.label_dropout` leaves it out.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_STD = 0.02  # of DiT's class vectors


class ClassConditioner(nnx.Embed):
  """A learned vector per class, and a last one for the null class: `[b] -> [b, width]`."""

  def __init__(self, classes: int, width: int, rngs: nnx.Rngs):
    normal = nnx.initializers.normal(_STD)
    super().__init__(classes + 1, width, embedding_init=normal, rngs=rngs)

  def null(self, count: int) -> np.ndarray:
    """Returns the label of the null class, int32 `[count]`."""
    return np.full(count, self.num_embeddings - 1, np.int32)


class EmbeddingConditioner(nnx.Module):
  """A linear map of embeddings, and a learned null vector: `[b, size] -> [b, width]`.

  Embeddings are divided by their root mean square, as encoders differ in scale. A row of zeros,
  which has no direction, is the null.
  """

  def __init__(self, size: int, width: int, rngs: nnx.Rngs):
    self.size = size
    # choice: at the start a condition is as large as a class's vector.
    normal = nnx.initializers.normal(_STD / size**0.5)
    self.linear = nnx.Linear(size, width, use_bias=False, kernel_init=normal, rngs=rngs)
    self.nothing = nnx.Param(nnx.initializers.normal(_STD)(rngs.params(), (width,)))

  def __call__(self, embedding: jax.Array) -> jax.Array:
    power = jnp.mean(jnp.square(embedding), -1, keepdims=True)
    unit = embedding * jax.lax.rsqrt(jnp.where(power > 0, power, 1))
    return self.linear(unit) + jnp.where(power > 0, 0, self.nothing[...])

  def null(self, count: int) -> np.ndarray:
    """Returns embeddings that mean none, float32 `[count, size]`."""
    return np.zeros((count, self.size), np.float32)
