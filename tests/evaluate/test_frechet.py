"""Distances of Gaussians are those that are known in closed form."""

import numpy as np
import pytest
from scipy import linalg

from freqformer.config import ConfigError
from freqformer.evaluate.frechet import frechet, kernel

RNG = np.random.default_rng(0)


def test_frechet_is_the_closed_form():
  # Means 3 and deviations 2 apart on one axis of independent ones: 3^2 + (3 - 1)^2.
  a = RNG.normal(size=(40_000, 3))
  b = RNG.normal(size=(40_000, 3)) * [1, 3, 1] + [3, 0, 0]
  assert frechet(a, b) == pytest.approx(13, rel=0.03)
  assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)
  assert abs(frechet(a, a)) < 1e-9


def test_frechet_is_that_of_a_general_root():
  a = RNG.normal(size=(60, 12)) @ RNG.normal(size=(12, 12))
  b = RNG.normal(size=(80, 12)) @ RNG.normal(size=(12, 12)) + 1
  s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * linalg.sqrtm(s @ t).real)
  assert frechet(a, b) == pytest.approx(expected, rel=1e-6)


def test_too_few_samples_are_refused():
  a = RNG.normal(size=(12, 12))
  with pytest.raises(ConfigError, match="needs at least 13 clips on either side, got 12 and 12"):
    frechet(a, a)
  with pytest.raises(ConfigError, match="two clips"):
    kernel(a[:1], a)


def test_the_kernel_distance_is_unbiased_and_sees_a_shift():
  same = [kernel(*RNG.normal(size=(2, 10, 4))) for _ in range(400)]
  assert abs(np.mean(same)) < 4 * np.std(same) / 20
  assert kernel(RNG.normal(size=(50, 4)), RNG.normal(size=(50, 4)) + 1) > 5 * np.std(same)


def test_the_kernel_distance_is_the_definition():
  x, y = RNG.normal(size=(2, 3, 2))

  def k(a, b):
    return (a @ b / 2 + 1) ** 3

  within = [np.mean([k(s[i], s[j]) for i in range(3) for j in range(3) if i != j]) for s in (x, y)]
  between = np.mean([k(a, b) for a in x for b in y])
  assert kernel(x, y) == pytest.approx(sum(within) - 2 * between)
