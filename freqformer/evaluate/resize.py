"""Trained runs at other lengths and frame sizes than they were trained on.

The model runs on any grid with tables of its own, and latents are normalised per channel; so a run
at another size is the same weights with other data settings. Nothing is learned anew: beyond about
twice the trained lengths nobody has measured it.
"""

import dataclasses
import re
from collections.abc import Sequence

from flax import nnx

from freqformer.config import ConfigError, did_you_mean
from freqformer.data.codec import make_codec
from freqformer.data.fields import PIXELS, FieldsConfig
from freqformer.evaluate.restore import Run
from freqformer.grid.rotary import ROPE_RULES, longer_theta
from freqformer.model.architectures import make_model

_AXES = ("frames", "rows", "cols")
_TRIALS = 16  # sizes that are tried to name one that works


def parse_size(text: str) -> tuple[int, int]:
  """Returns (rows, cols) of "ROWSxCOLS"; a ConfigError for anything else."""
  found = re.fullmatch(r"(\d+)x(\d+)", text)
  if not found:
    raise ConfigError(f"size={text!r} must be ROWSxCOLS in pixels, e.g. 96x128.")
  return int(found[1]), int(found[2])


def video_shape(run: Run) -> tuple[int, int, int]:
  """Returns (frames, rows, cols) of a run's decoded videos."""
  data = run.experiment.data
  if isinstance(data, FieldsConfig):
    return data.grid[0], PIXELS * data.grid[1], PIXELS * data.grid[2]
  return data.video_shape


def resized(
  run: Run, frames: int | None = None, size: Sequence[int] | None = None, rope: str = "trained"
) -> Run:
  """Returns the run with videos of another length or frame size; None keeps the trained one.

  Args:
    frames: of a video.
    size: (rows, cols) in pixels.
    rope: rule of rotary positions on a longer axis, of `rotary.ROPE_RULES`.

  Raises:
    ConfigError: the codec, the patches or a method's tiles cannot have the size; it names near ones
      that they can.
  """
  if rope not in ROPE_RULES:
    raise ConfigError(f"rope={rope!r} is unknown; {did_you_mean(rope, ROPE_RULES)}")
  if size is not None and len(size) != 2:
    raise ConfigError(f"size={size!r} must be (rows, cols) in pixels.")
  trained = video_shape(run)
  wanted = tuple(
    old if new is None else int(new)
    for old, new in zip(trained, (frames, *(size or (None, None))), strict=True)
  )
  if wanted == trained:
    return run
  steps = _steps(run)
  for axis in range(3):
    if wanted[axis] != trained[axis]:
      _check_axis(_AXES[axis], wanted[axis], steps[axis], _short(run) if axis == 0 else 0)
  try:
    return _at(run, wanted, rope)
  except ConfigError as error:
    raise ConfigError(f"{error} {_next_served(run, wanted, trained, steps, rope)}") from error


def _steps(run: Run) -> tuple[int, int, int]:
  """Returns the pixels of a token along (frames, rows, cols), in which sizes may grow."""
  data = run.experiment.data
  factor = (1, PIXELS, PIXELS) if isinstance(data, FieldsConfig) else data.codec.factor
  return tuple(f * p for f, p in zip(factor, run.model.config.patch, strict=True))


def _short(run: Run) -> int:
  """Returns how many frames fewer the first latent frame shows than the others."""
  data = run.experiment.data
  if isinstance(data, FieldsConfig):
    return 0
  return data.codec.factor[0] - make_codec(data.codec).first_frames


def _check_axis(name: str, given: int, step: int, short: int):
  """Refuses a length that would cut a token: no such one was seen in training.

  Args:
    short: pixels that the first cell lacks.
  """
  if given + short >= step and (given + short) % step == 0:
    return
  below = (given + short) // step * step - short
  near = f"{below} and {below + step} are" if below > 0 else f"{step - short} is the smallest"
  less = f" less {short}" if short else ""
  raise ConfigError(
    f"{name}={given} must be a multiple of {step}{less}, the {name} of a token (codec times "
    f"patch); {near}."
  )


def _at(run: Run, wanted: Sequence[int], rope: str) -> Run:
  """Returns the run at (frames, rows, cols); a ConfigError if its method cannot serve the grid."""
  data = run.experiment.data
  if isinstance(data, FieldsConfig):
    steps = (1, PIXELS, PIXELS)
    grid = tuple(size // step for size, step in zip(wanted, steps, strict=True))
    data = dataclasses.replace(data, grid=grid)
  else:
    data = dataclasses.replace(data, frames=wanted[0], resolution=tuple(wanted[1:]))
  shape = data.latent_shape
  config = run.model.config
  old = config.layout(run.latent_shape).grid
  new = config.resolved(shape).layout(shape).grid
  theta = longer_theta(config.rope_theta, old, new, config.dims.head_dim, rope)
  config = dataclasses.replace(config, rope_theta=theta)
  # Of the trained shape: parameters that follow a grid were learned there.
  condition = run.experiment.conditioned_on(run.record["class_names"])
  model = nnx.eval_shape(lambda: make_model(config, run.latent_shape, nnx.Rngs(0), **condition))
  experiment = dataclasses.replace(run.experiment, data=data, model=config)
  record = run.record | {"latent_shape": shape}
  return dataclasses.replace(run, model=model, experiment=experiment, record=record)


def _next_served(run, wanted, trained, steps, rope) -> str:
  """Returns a sentence with the next larger size whose grid the method serves, if one is near."""
  changed = [new != old for new, old in zip(wanted, trained, strict=True)]
  for more in range(1, _TRIALS + 1):
    larger = tuple(
      size + more * step * grows for size, step, grows in zip(wanted, steps, changed, strict=True)
    )
    try:
      _at(run, larger, rope)
    except ConfigError:
      continue
    frames, rows, cols = larger
    return f"The next larger size that it serves is frames={frames}, size={rows}x{cols}."
  frames, rows, cols = trained
  return f"It was trained at frames={frames}, size={rows}x{cols}."
