"""Noise levels at which Wan is sampled, and the time that the model is told at each.

They are those of the UniPC scheduler that diffusers' files of Wan name, with "flow sigmas". On the
path of `freqformer.diffusion.flow` a level sigma is the time t itself, so that
`freqformer.diffusion.solvers.unipc(levels.sigmas)` is the table of Wan's sampler.
"""

import dataclasses
import pathlib

import numpy as np

from freqformer.config import ConfigError, require
from freqformer.wan.json_file import read_object

_BELOW_ONE = 1e-6  # of the first level: at 1 itself the log-SNR is infinite
# Keys of scheduler_config.json that change what is computed: the value of a file that lacks the
# key, as diffusers takes it, and the value that is computed here.
_SUPPORTED = {
  "_class_name": (None, "UniPCMultistepScheduler"),
  "prediction_type": ("epsilon", "flow_prediction"),
  "use_flow_sigmas": (False, True),
  "solver_order": (2, 2),
  "solver_type": ("bh2", "bh2"),
  "predict_x0": (True, True),
  "lower_order_final": (True, True),
  "final_sigmas_type": ("zero", "zero"),
  "disable_corrector": ([], []),
  "solver_p": (None, None),
  "thresholding": (False, False),
  "use_karras_sigmas": (False, False),
  "use_exponential_sigmas": (False, False),
  "use_beta_sigmas": (False, False),
  "use_dynamic_shifting": (False, False),
  "shift_terminal": (None, None),
}


@dataclasses.dataclass(frozen=True)
class LevelSchedule:
  """A rule that gives the levels of any number of steps.

  Attributes:
    shift: s of `sigma -> s sigma / (1 + (s - 1) sigma)`; above 1 more steps are at high noise.
    train_steps: time that the model is told at level 1.
  """

  shift: float = 1.0
  train_steps: int = 1000

  def __post_init__(self):
    require(self, "shift", above=0)
    require(self, "train_steps", least=1)

  def levels(self, steps: int) -> "Levels":
    """Returns the levels of a number of steps.

    Raises:
      ValueError: there is less than one step.
    """
    if steps < 1:
      raise ValueError(f"{steps=} must be at least 1.")
    # The last of these points would be the level of time 1 before the shift; 0 takes its place.
    even = np.linspace(1, 1 / self.train_steps, steps + 1)[:-1]
    sigmas = self.shift * even / (1 + (self.shift - 1) * even)
    sigmas[0] = 1 - _BELOW_ONE
    timesteps = (sigmas * self.train_steps).astype(np.int64)
    # diffusers keeps float32 levels, and the distance of the first one from 1 is 1.3 % more there.
    rounded = np.append(sigmas, 0).astype(np.float32)
    return Levels(rounded.astype(np.float64), timesteps)


@dataclasses.dataclass(frozen=True)
class Levels:
  """Levels of a run.

  Attributes:
    sigmas: float64 `[steps + 1]`, numbers of float32, from just below 1 down to 0.
    timesteps: int64 `[steps]`, what the model is told at each: 1000 sigma without its fraction.
  """

  sigmas: np.ndarray
  timesteps: np.ndarray


def read_schedule(path: pathlib.Path) -> LevelSchedule:
  """Returns the rule that a scheduler_config.json describes.

  Raises:
    ConfigError: the file is not there or damaged, or describes another scheduler; it names all keys
      that are not supported.
  """
  values = read_object(path)
  others = [
    f"{key}={values.get(key, default)!r} instead of {supported!r}"
    for key, (default, supported) in _SUPPORTED.items()
    if values.get(key, default) != supported
  ]
  if others:
    raise ConfigError(
      f"{path} describes a scheduler that is not supported: {', '.join(others)}. UniPC of order 2 "
      "on flow sigmas is, as Wan's files have it."
    )
  try:
    return LevelSchedule(values.get("flow_shift", 1.0), values.get("num_train_timesteps", 1000))
  except (TypeError, ValueError) as error:
    raise ConfigError(f"{path}: {error}") from error
