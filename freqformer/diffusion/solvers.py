"""Solvers of the sampling equation as tables of coefficients: a step is a matrix, not code.

A sample follows `dx/dt = v(x, t)` from noise at t = 1 to data at t = 0. On the path of
`freqformer.diffusion.flow` the velocity predicts the data too, `D = x - t v`, and the published
formulas in data prediction hold with alpha = 1 - t, sigma = t and log-SNR `lambda = log((1 - t) /
t)`. Their factor `alpha (1 - e^-h)` of D is `1 - s / t` for a step from t to s, which is exact at
both ends, where lambda is infinite.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class SolverTable:
  """Evaluations of the velocity in order, and what is done with each.

  The sampler carries k points, all equal to the noise at first. The model is evaluated at point 0,
  and `weights @ [points..., velocity]` are the next points. Point 0 is the sample in the end.

  Attributes:
    times: float64 `[evaluations]`, t of each evaluation, never rising.
    weights: float64 `[evaluations, k, k + 1]`.
  """

  times: np.ndarray
  weights: np.ndarray


def euler(times: np.ndarray) -> SolverTable:
  """Returns Euler's method: order 1, an evaluation a step."""
  x, v = np.eye(2)
  weights = [[x + (s - t) * v] for t, s in zip(times[:-1], times[1:], strict=True)]
  return SolverTable(times[:-1], np.asarray(weights))


def heun(times: np.ndarray) -> SolverTable:
  """Returns Heun's method: order 2, two evaluations a step, one in the last (arXiv 2206.00364).

  The last step is Euler's: its second evaluation would be at t = 0, where nothing is left to do.
  """
  x, base, v = np.eye(3)
  at = []
  weights = []
  for t, s in zip(times[:-1], times[1:], strict=True):
    at.append(t)
    weights.append([x + (s - t) * v, x + (s - t) / 2 * v])
    if s > 0:
      corrected = base + (s - t) / 2 * v
      at.append(s)
      weights.append([corrected, corrected])
  return SolverTable(np.asarray(at), np.asarray(weights))


def dpm_solver_pp_2m(times: np.ndarray) -> SolverTable:
  """Returns DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): order 2, an evaluation a step.

  The data are extrapolated from two predictions. The first step has one only, and from t = 1 the
  second one's distance in lambda is infinite: both are of order 1, as is the last step.
  """
  x, before, v = np.eye(3)
  weights = []
  for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
    data = x - t * v
    slope = _extrapolation(times, i)
    weights.append([_step(t, s, x, data + slope * (data - before)), data])
  return SolverTable(times[:-1], np.asarray(weights))


def unipc(times: np.ndarray) -> SolverTable:
  """Returns UniPC of order 2, B(h) = e^h - 1 (arXiv 2302.04867): an evaluation a step.

  The predictor is DPM-Solver++(2M). The data that are predicted at its point then also correct this
  point (UniC-2), so that correcting costs no evaluation; the last point is not corrected.
  """
  x, partial, before, v = np.eye(4)
  weights = []
  share = 0.0  # of the next data prediction in the point that it corrects
  for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
    data = x - t * v
    point = partial + share * data if i else x
    slope = _extrapolation(times, i)
    predicted = _step(t, s, point, data + slope * (data - before))
    new, old = _correction(times, i)
    known = (1 - new - old) * data + old * before
    weights.append([predicted, _step(t, s, point, known), data])
    share = (1 - s / t) * new
  return SolverTable(times[:-1], np.asarray(weights))


SOLVERS: dict[str, Callable[[np.ndarray], SolverTable]] = {
  "euler": euler,
  "heun": heun,
  "dpm++2m": dpm_solver_pp_2m,
  "unipc": unipc,
}
# Samplers by name that solve another equation than that of this model's velocity.
OTHER_EQUATIONS = {
  "ddpm": "a stochastic process that is reversed in noise prediction on a fixed table of betas",
  "ddim": "a variance-preserving path in noise prediction",
  "pndm": "a variance-preserving path in noise prediction",
  "edm": "a variance-exploding path, sigma from 80 to 0.002, with a preconditioned denoiser",
  "euler_a": "a variance-exploding path with new noise in every step",
  "lcm": "a consistency model, which is distilled for it",
}


def _step(t: float, s: float, point, data):
  """Returns the point at s for constant data: `sigma_s / sigma_t x + alpha_s (1 - e^-h) D`."""
  return s / t * point + (1 - s / t) * data


def _log_snr(times: np.ndarray) -> np.ndarray:
  """Returns lambda; minus infinity at t = 1, infinity at t = 0."""
  with np.errstate(divide="ignore"):
    return np.log1p(-times) - np.log(times)


def _extrapolation(times: np.ndarray, i: int) -> float:
  """Returns `1 / (2 r)`, r the last step of lambda over step i; 0 where step i is of order 1."""
  if i == 0 or times[i + 1] == 0:
    return 0.0
  before, here, after = _log_snr(times[i - 1 : i + 2])
  return (after - here) / (2 * (here - before))


def _correction(times: np.ndarray, i: int) -> tuple[float, float]:
  """Returns UniC's weights of the data at the end of step i and before its start.

  The third one, of the data at its start, makes the sum 1. With h the step of lambda, r = -(last
  step) / h and `b_k = k! phi_(k+1)(-h) / phi_1(-h)`, they solve `new + p = b_1`, `new + r p = b_2`
  for p = old r. The first step has no earlier data: its new weight is 1/2.
  """
  if i == 0:
    return 0.5, 0.0
  if times[i + 1] == 0:
    return 0.0, 0.0  # no evaluation follows
  before, here, after = _log_snr(times[i - 1 : i + 2])
  h = after - here
  if np.isinf(before):
    ratio = -np.inf
  else:
    ratio = (before - here) / h
  whole = np.expm1(-h)
  phi_2 = whole / -h - 1
  phi_3 = phi_2 / -h - 0.5
  b_1 = phi_2 / whole
  b_2 = 2 * phi_3 / whole
  part = (b_1 - b_2) / (1 - ratio)
  return b_1 - part, part / ratio
