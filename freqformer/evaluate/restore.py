"""A model from a checkpoint, ready to sample: also under another attention method, as long as its parameters are there."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from freqformer.config import ConfigError
from freqformer.data.codec import make_codec
from freqformer.model.dit import VideoDiT
from freqformer.train.checkpoint import Checkpoints, Mismatch
from freqformer.train.experiment import Experiment, experiment


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint knows beside its weights."""

  experiment: Experiment
  record: dict[str, Any]

  @property
  def step(self) -> int:
    return self.record["step"]

  @property
  def class_names(self) -> list[str]:
    return self.record["class_names"]

  @property
  def latent_shape(self) -> tuple[int, ...]:
    return tuple(self.record["latent_shape"])

  def decode(self, latents) -> np.ndarray:
    """Normalised latents `[b, t, y, x, c]` -> video uint8 `[b, t, y, x, 3]`, by the checkpoint's own statistics."""
    mean, std = (np.asarray(self.record["statistics"][n], np.float32) for n in ("mean", "std"))
    frames, rows, cols = self.record["video_shape"][:3]
    return make_codec(self.experiment.data.codec).decode(
      np.asarray(latents) * std + mean, (frames, rows, cols)
    )


def restore_model(
  workdir, *, step: int | None = None, method: str | None = None, raw: bool = False
):
  """Loads a model.

  Args:
    workdir: of the run; step: of the checkpoint, default the newest.
    method: run this method in every layer instead; parameters that it lacks (a router's) are dropped.
    raw: the raw weights instead of their average.

  Returns:
    The model (abstract: for its config and tables), its parameters and what else the checkpoint knows.

  Raises:
    ConfigError: no checkpoint, a damaged one, or parameters that the method needs are not in it (names two of them).
  """
  checkpoints = Checkpoints(workdir, create=False)
  record = checkpoints.record(step)
  restored = Restored(experiment(record["config"]), record)
  config = (
    restored.experiment.model if method is None else restored.experiment.model.with_method(method)
  )
  model = nnx.eval_shape(
    lambda: VideoDiT(config, restored.latent_shape, len(restored.class_names), nnx.Rngs(0))
  )
  group = "params" if raw else "ema"
  try:
    tree = checkpoints.restore({group: nnx.state(model)}, record["step"], ignore_extra=True)
  except Mismatch as error:
    if method is None or not error.missing:
      raise
    examples = " and ".join(name.removeprefix(f"{group}/") for name in error.missing[:2])
    raise ConfigError(
      f"method {method} needs parameters that this checkpoint lacks ({len(error.missing)}, e.g. {examples}); "
      f"train with it: --config.model.attention.method={config.attention.method}."
    ) from error
  checkpoints.close()
  return model, jax.tree.map(jax.numpy.asarray, tree[group]), restored
