"""Rotary tables: the textbook's angles, each axis in its own channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqformer.grid.rotary import angle_tables, axis_pairs, rotate

POSITIONS = np.random.default_rng(0).uniform(0, 30, (7, 3))


@pytest.mark.parametrize("head_dim", [8, 16, 64])
def test_angles_are_positions_times_powers_of_theta(head_dim):
  """Channel i of an axis with p pairs turns by position * theta^(-i / p) (arXiv 2104.09864)."""
  angles = [
    POSITIONS[:, axis, None] * 100.0 ** (-np.arange(pairs) / pairs)
    for axis, pairs in enumerate(axis_pairs(head_dim))
  ]
  want = np.concatenate(angles, -1)
  cos, sin = angle_tables(POSITIONS, head_dim, theta=100.0)
  np.testing.assert_allclose(cos, np.cos(want), atol=1e-5)
  np.testing.assert_allclose(sin, np.sin(want), atol=1e-5)


def test_scores_depend_on_differences_of_positions():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 7, 1, 16))

  def scores(positions):
    turned = (rotate(x, positions)[0, :, 0] for x in (q, k))
    return jnp.einsum("id,jd->ij", *turned, precision="highest")

  moved = scores(POSITIONS + np.array([3.0, -5.0, 8.0]))
  np.testing.assert_allclose(scores(POSITIONS), moved, atol=1e-4)
