"""Rotary tables: the textbook's angles, each axis in its own channels; bases from the grid."""

import numpy as np
import pytest

from freqformer.grid.rotary import (
  REACH,
  angle_tables,
  axis_pairs,
  grid_theta,
  level_theta,
  longer_theta,
)

POSITIONS = np.random.default_rng(0).uniform(0, 30, (7, 3))


@pytest.mark.parametrize("head_dim", [8, 16, 64])
@pytest.mark.parametrize("theta", [100.0, (100.0, 20.0, 7.0)])
def test_angles_are_positions_times_powers_of_theta(head_dim, theta):
  """Channel i of an axis with p pairs turns by position * theta^(-i / p) (arXiv 2104.09864)."""
  bases = np.broadcast_to(theta, 3)
  angles = [
    POSITIONS[:, axis, None] * bases[axis] ** (-np.arange(pairs) / pairs)
    for axis, pairs in enumerate(axis_pairs(head_dim))
  ]
  want = np.concatenate(angles, -1)
  cos, sin = angle_tables(POSITIONS, head_dim, theta)
  np.testing.assert_allclose(cos, np.cos(want), atol=1e-5)
  np.testing.assert_allclose(sin, np.sin(want), atol=1e-5)


def slowest_periods(theta, head_dim):
  """Period in steps of each axis's slowest pair, by the angles at one step."""
  cos, sin = angle_tables(np.eye(3), head_dim, theta)
  last = np.cumsum(axis_pairs(head_dim)) - 1
  return 2 * np.pi / np.arctan2(sin, cos)[range(3), last]


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("grid", [(8, 12, 12), (21, 45, 80)])
def test_the_slowest_period_covers_the_axis(head_dim, grid):
  periods = slowest_periods(grid_theta(grid, head_dim), head_dim)
  np.testing.assert_allclose(periods, REACH * np.array(grid), rtol=1e-3)


def test_a_demo_head_can_be_local():
  """A base of 10,000 leaves 16 channels too few frequencies to find the next token."""
  grid = (8, 12, 12)
  places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
  offsets = places - np.array(grid) // 2
  near = np.abs(offsets).max(-1) <= 1

  def mass(theta):
    cos, _ = angle_tables(offsets, 16, theta)
    logits = np.asarray(cos).sum(-1) * 6 * 16**0.5 / 8  # all pairs alike, gain 6
    weights = np.exp(logits - logits.max())
    return weights[near].sum() / weights.sum()

  assert mass(10_000.0) < 0.4
  assert mass(grid_theta(grid, 16)) > 0.8


def test_an_axis_without_choice_has_base_1():
  assert grid_theta((1, 4, 9), 64)[0] == 1.0  # one token
  assert grid_theta((50, 50, 50), 8)[::2] == (1.0, 1.0)  # one pair: 1 radian a token in any case
  assert grid_theta((50, 50, 50), 2)[0] == 1.0  # no pair


def test_levels_have_the_theta_of_their_own_grid():
  fine = grid_theta((16, 32, 64), 64)
  coarse = level_theta(fine, (2, 4, 4), 64)
  np.testing.assert_allclose(coarse, grid_theta((8, 8, 16), 64))
  assert level_theta(fine, (1, 1, 1), 64) == fine
  assert level_theta(fine, (99, 99, 999), 64) == (1.0, 1.0, 1.0)  # not beyond 1 radian a cell


def test_a_longer_axis_keeps_its_bases_or_its_slowest_turn():
  trained = (8, 12, 12)
  longer = (16, 12, 6)
  theta = grid_theta(trained, 64)
  assert longer_theta(theta, trained, longer, 64, "trained") == theta
  scaled = longer_theta(theta, trained, longer, 64, "ntk")
  assert scaled[1:] == theta[1:]  # the shorter axis, too
  periods = slowest_periods(scaled, 64)
  np.testing.assert_allclose(periods[0], REACH * 16, rtol=1e-3)
