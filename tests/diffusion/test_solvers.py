"""Solvers: orders of convergence where the flow is known, exact ends, published formulas."""

import itertools

import numpy as np
import pytest

from freqformer.diffusion.sampling import SampleConfig
from freqformer.diffusion.solvers import OTHER_EQUATIONS, SOLVERS

# Data N(MEAN, SPREAD^2): the flow takes noise z to MEAN + SPREAD z.
MEAN = 0.7
SPREAD = 0.4
NOISE = np.random.default_rng(0).standard_normal(200)


def velocity(x, t):
  """E[eps - x_0 | x_t] of the Gaussian."""
  variance = (1 - t) ** 2 * SPREAD**2 + t**2
  return (t - (1 - t) * SPREAD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def solve(table, velocity=velocity):
  points = [NOISE] * table.weights.shape[1]
  for t, weights in zip(table.times, table.weights, strict=True):
    points = weights @ np.stack([*points, velocity(points[0], t)])
  return points[0]


def error(sampler, steps, shift=1.0):
  table = SampleConfig(steps=steps, sampler=sampler, shift=shift).table()
  return np.sqrt(np.mean((solve(table) - (MEAN + SPREAD * NOISE)) ** 2))


@pytest.mark.parametrize(
  "sampler, order", [("euler", 1), ("heun", 2), ("dpm++2m", 2), ("unipc", 2)]
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_convergence(sampler, order, shift):
  """Errors fall by 2 or 4 where steps double.

  Steps of lambda do not become equal at the ends, where both multistep solvers therefore lose a
  factor of log(steps).
  """
  errors = [error(sampler, steps, shift) for steps in (512, 1024, 2048)]
  assert errors[-1] < (2e-3 if order == 1 else 3e-5)
  for coarse, fine in itertools.pairwise(errors):
    assert 1.8 ** (order - 0.05) < coarse / fine < 2.2**order


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_what_every_solver_keeps(sampler, steps):
  """A still point stays, and straight paths end where they lead, by so many evaluations."""
  table = SampleConfig(steps=steps, sampler=sampler).table()
  assert np.isfinite(table.weights).all() and table.times[0] == 1
  evaluations = 2 * steps - 1 if sampler == "heun" else steps
  assert len(table.times) == len(table.weights) == evaluations
  np.testing.assert_allclose(solve(table, lambda x, t: 0 * x), NOISE, atol=1e-12)
  np.testing.assert_allclose(solve(table, lambda x, t: (x - 2) / t), 2, atol=1e-12)


def published(sampler, times):
  """Returns the last predicted point by the papers' own formulas in lambda.

  All steps are of order 2: the first two data predictions are both those of the noise. UniPC solves
  `R rho = b` (arXiv 2302.04867, eq. 7, data prediction) for its correction.
  """
  lam = np.log((1 - times) / times)
  x = NOISE
  data = [x - t * velocity(x, t) for t in times[:2]]
  for i in range(1, len(times) - 1):
    h = lam[i + 1] - lam[i]
    ratio = (lam[i - 1] - lam[i]) / h
    alpha = 1 - times[i + 1]
    spread = np.expm1(-h)
    base = times[i + 1] / times[i] * x - alpha * spread * data[-1]
    slope = (data[-2] - data[-1]) / ratio
    predicted = base - alpha * spread * slope / 2
    new = predicted - times[i + 1] * velocity(predicted, times[i + 1])
    x = predicted
    if sampler == "unipc":
      phi = spread / -h - 1
      rho = np.linalg.solve([[1, 1], [ratio, 1]], [phi / spread, (phi / -h - 0.5) * 2 / spread])
      x = base - alpha * spread * (rho[0] * slope + rho[1] * (new - data[-1]))
    data.append(new)
  return predicted


@pytest.mark.parametrize("sampler", ["dpm++2m", "unipc"])
def test_published_formulas(sampler):
  times = np.array([0.9, 0.8, 0.55, 0.4, 0.22, 0.1])
  table = SOLVERS[sampler](times)
  points = [NOISE] * table.weights.shape[1]
  points[-1] = NOISE - times[0] * velocity(NOISE, times[0])
  if sampler == "unipc":  # what is still to be corrected, so that the noise is the corrected point
    share = (1 - times[1] / times[0]) / 2
    points[1] = NOISE - share * (NOISE - times[1] * velocity(NOISE, times[1]))
  for t, weights in zip(table.times[1:], table.weights[1:], strict=True):
    points = weights @ np.stack([*points, velocity(points[0], t)])
  np.testing.assert_allclose(points[0], published(sampler, times), rtol=1e-10)


@pytest.mark.parametrize("sampler", [*OTHER_EQUATIONS, "heum"])
def test_other_samplers_are_refused(sampler):
  with pytest.raises(ValueError, match="euler, heun") as refused:
    SampleConfig(sampler=sampler)
  if sampler in OTHER_EQUATIONS:
    assert "rectified flow" in str(refused.value)
