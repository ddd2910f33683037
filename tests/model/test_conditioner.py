"""What stands for no condition is the learned null; embeddings count by direction alone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from freqformer.model.conditioner import ClassConditioner, EmbeddingConditioner

WIDTH = 64
ROWS = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)


def test_the_null_class_is_the_last_one():
  conditioner = ClassConditioner(3, WIDTH, nnx.Rngs(0))
  assert conditioner.null(2).tolist() == [3, 3] and conditioner.null(2).dtype == np.int32
  plain = nnx.Embed(4, WIDTH, embedding_init=nnx.initializers.normal(0.02), rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(conditioner(np.arange(4)), plain.embedding[...])
  # Without classes every label is the null.
  assert ClassConditioner(0, WIDTH, nnx.Rngs(0)).null(1).tolist() == [0]


def test_an_embedding_is_mapped_by_its_direction():
  conditioner = EmbeddingConditioner(16, WIDTH, nnx.Rngs(0))
  found = conditioner(ROWS)
  for scale in (1e-4, 1e4):
    np.testing.assert_allclose(conditioner(scale * ROWS), found, rtol=1e-4, atol=1e-6)
  assert np.abs(conditioner(-ROWS) + found).max() < 1e-6
  # As large as a class's vector.
  assert 0.015 < np.std(found) < 0.025


def test_rows_of_no_condition_are_the_learned_null_and_train_it_alone():
  conditioner = EmbeddingConditioner(16, WIDTH, nnx.Rngs(0))
  rows = jnp.concatenate([ROWS, conditioner.null(2)])
  found = conditioner(rows)
  np.testing.assert_array_equal(found[5], conditioner.nothing[...])
  np.testing.assert_array_equal(found[5], found[6])
  assert np.abs(found[:5] - found[5]).max(-1).min() > 0.01

  def total(conditioner, rows):
    return conditioner(rows).sum()

  of_null = nnx.grad(total)(conditioner, rows[5:])
  assert not of_null.linear.kernel[...].any() and (of_null.nothing[...] == 2).all()
  of_rows = nnx.grad(total)(conditioner, rows[:5])
  assert of_rows.linear.kernel[...].any() and not of_rows.nothing[...].any()
  assert np.isfinite(jax.grad(lambda x: conditioner(x).sum())(rows)).all()
