"""Rotary tables: the textbook's angles, each axis in its own channels."""

import numpy as np
import pytest

from freqformer.grid.rotary import angle_tables, axis_pairs

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
