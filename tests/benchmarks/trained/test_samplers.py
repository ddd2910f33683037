"""The benchmark of samplers: budgets are kept, distances are relative."""

import numpy as np
import pytest

from benchmarks.trained.samplers import distances, steps_for
from freqformer.diffusion.sampling import SampleConfig


@pytest.mark.parametrize("sampler, steps", [("euler", 8), ("heun", 4), ("unipc", 8)])
def test_the_most_steps_of_a_budget(sampler, steps):
  assert steps_for(sampler, 8) == steps
  assert len(SampleConfig(sampler=sampler, steps=steps + 1).guided()) > 8


def test_distances_are_relative():
  reference = np.full((2, 1, 1, 1, 2), 2.0)
  moved = reference + np.array([1.0, 0.0]).reshape(2, 1, 1, 1, 1)
  np.testing.assert_allclose(distances(moved, reference), [0.5, 0.0])
