"""Noise levels at which a sampling run evaluates the model, by the habits of model families."""

import dataclasses
from collections.abc import Callable

import numpy as np

from freqformer.wan.levels import LevelSchedule


@dataclasses.dataclass(frozen=True)
class Levels:
  """Levels of a run.

  Attributes:
    times: boundaries of the steps, float64 `[steps + 1]`, from about 1 down to 0.
    told: what the model is told t is at a boundary, all of them or some.
  """

  times: np.ndarray
  told: Callable[[np.ndarray], np.ndarray] = np.asarray


def shifted(t: np.ndarray, shift: float) -> np.ndarray:
  """Returns `s t / (1 + (s - 1) t)`, which spends more steps at high noise where s is above 1."""
  return shift * t / (1 + (shift - 1) * t)


def _even(steps: int, shift: float) -> Levels:
  return Levels(shifted(np.linspace(1, 0, steps + 1), shift))


def _wan(steps: int, shift: float) -> Levels:
  """Returns the levels of Wan, which is told whole timesteps."""
  schedule = LevelSchedule(shift)
  found = schedule.levels(steps)
  timesteps = dict(zip(found.sigmas, found.timesteps, strict=False))

  def told(times):
    return np.asarray([timesteps[time] for time in times]) / schedule.train_steps

  return Levels(found.sigmas, told)


LEVELS: dict[str, Callable[[int, float], Levels]] = {"even": _even, "wan": _wan}
