"""Noise levels at which a sampling run evaluates the model, by the habits of model families."""

import dataclasses
from collections.abc import Callable

import numpy as np

_TRAINED = 1000  # timesteps that Wan's schedule divides t into
_FIRST = 1e-6  # below t = 1, where the solver's log-SNR is finite


@dataclasses.dataclass(frozen=True)
class Levels:
  """A habit.

  Attributes:
    times: boundaries of so many steps under a shift, float64 `[steps + 1]`, falling to 0.
    told: what the model is told a boundary is.
  """

  times: Callable[[int, float], np.ndarray]
  told: Callable[[np.ndarray], np.ndarray]


def shifted(t: np.ndarray, shift: float) -> np.ndarray:
  """Returns `s t / (1 + (s - 1) t)`, which spends more steps at high noise where s is above 1."""
  return shift * t / (1 + (shift - 1) * t)


def _even(steps: int, shift: float) -> np.ndarray:
  return shifted(np.linspace(1, 0, steps + 1), shift)


def _wan(steps: int, shift: float) -> np.ndarray:
  """Returns the levels of diffusers' UniPC with flow sigmas: down to a thousandth, then 0."""
  times = shifted(np.linspace(1, 1 / _TRAINED, steps + 1)[:-1], shift)
  times[0] = min(times[0], 1 - _FIRST)
  return np.append(times, 0.0)


def _thousandths(times: np.ndarray) -> np.ndarray:
  """Returns t as Wan is told it: whole timesteps, truncated."""
  return np.floor(times * _TRAINED) / _TRAINED


LEVELS = {"even": Levels(_even, np.asarray), "wan": Levels(_wan, _thousandths)}
