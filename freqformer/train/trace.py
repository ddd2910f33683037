"""A profiler's trace of a few steps of a run, for xprof or Perfetto."""

import pathlib
import re

import jax
from absl import logging

from freqformer.config import ConfigError


class Trace:
  """Traces steps `first` to `last`, both included, into `<workdir>/profile`; by default none.

  Attributes:
    text: `first:last`, as `--profile` has it, or None.
  """

  def __init__(self, text: str | None = None):
    """Reads the steps; raises ConfigError if they are not two rising numbers."""
    self.text = text
    self._steps = None
    self._runs = False
    if text is None:
      return
    match = re.fullmatch(r"(\d+):(\d+)", text)
    self._steps = match and (int(match[1]), int(match[2]))
    if not match or self._steps[0] > self._steps[1]:
      raise ConfigError(f"--profile={text} must be two steps, the first and the last: 10:20, say.")

  def check(self, done: int, steps: int):
    """Raises ConfigError if the run does not make these steps: `done` it has, of `steps`."""
    if self._steps and not done < self._steps[0] <= self._steps[1] <= steps:
      raise ConfigError(
        f"--profile={self.text} lies outside the run, which makes steps {done + 1} to {steps}."
      )

  def before(self, step: int, workdir: pathlib.Path):
    """Begins before the first step."""
    if self._steps and step == self._steps[0] and not self._runs:
      jax.profiler.start_trace(workdir / "profile")
      self._runs = True

  def after(self, step: int, values):
    """Ends behind the last step, once the device has computed what it returned."""
    if self._runs and step >= self._steps[1]:
      jax.block_until_ready(values)
      jax.profiler.stop_trace()
      self._runs = False
      logging.info("steps %s are traced in <workdir>/profile (xprof reads it)", self.text)
