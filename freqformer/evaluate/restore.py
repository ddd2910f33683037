"""Loads a trained model from a run's folder, also under another attention method."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from absl import logging
from flax import nnx

from freqformer.config import ConfigError
from freqformer.data.codec import LatentStatistics
from freqformer.model.architectures import make_model
from freqformer.model.stack import LayerStack
from freqformer.placement import everywhere
from freqformer.train.checkpoint import Checkpoints, Gone, Mismatch
from freqformer.train.experiment import Experiment, of_record

_TRIES = 5  # to read the newest checkpoint; each fails only where training saved one meanwhile


@dataclasses.dataclass(frozen=True)
class Conditions:
  """Embeddings that samples are drawn for, in the place of classes.

  Attributes:
    names: of their folders, each once.
    texts: prompts or captions.
    embeddings: float32 `[k, e]`.
  """

  names: tuple[str, ...]
  texts: tuple[str, ...]
  embeddings: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model and what its checkpoint knows about it.

  Attributes:
    model: the abstract model, without arrays: for its config, tables and schedule.
    params: its parameters.
    experiment: the configuration that it was trained with.
    record: the checkpoint's JSON record.
    conditions: of a run conditioned on embeddings those that are sampled, see `conditioned`.
  """

  model: LayerStack
  params: nnx.State
  experiment: Experiment
  record: dict[str, Any]
  conditions: Conditions | None = None
  low: ClassVar[None] = None  # one model for all noise, see `PretrainedRun`

  @property
  def step(self) -> int:
    """Training step of the checkpoint."""
    return self.record["step"]

  @property
  def class_names(self) -> list[str]:
    """Names of the classes, or of the conditions; the index is the label."""
    if self.conditions is not None:
      return list(self.conditions.names)
    return self.record["class_names"]

  @property
  def trained_classes(self) -> list[str]:
    """Names of the classes that had training clips."""
    if self.conditions is not None:
      return self.class_names
    counts = self.record.get("class_counts") or [1] * len(self.class_names)
    return [name for name, count in zip(self.class_names, counts, strict=True) if count]

  def inputs(self, labels: np.ndarray) -> np.ndarray:
    """Returns what the model takes for labels, int `[n]`: themselves, or embeddings `[n, e]`."""
    if self.experiment.data.condition != "embedding":
      return labels
    if self.conditions is None:
      raise ConfigError(
        "this run is conditioned on embeddings: name prompts or clips, by "
        "freqformer.evaluate.conditions.conditioned, before samples are drawn."
      )
    return self.conditions.embeddings[labels]

  @property
  def latent_shape(self) -> tuple[int, ...]:
    """Shape (t, y, x, c) of a latent."""
    return tuple(self.record["latent_shape"])

  @property
  def fps(self) -> float:
    """Frames per second of decoded videos, those of the clips that it was trained on."""
    return self.record.get("fps") or self.experiment.data.shown_fps()

  def decode(self, latents) -> np.ndarray:
    """Decodes normalised latents `[b, t, y, x, c]` to video, uint8 `[b, t, y, x, 3]`."""
    statistics = LatentStatistics.from_json(self.record["statistics"])
    return self.experiment.data.decode(latents, statistics)


def load_run(
  workdir,
  *,
  step: int | None = None,
  method: str | None = None,
  raw: bool = False,
  schedule: str | None = None,
) -> Run:
  """Loads a trained model from a run's folder, also while training goes on there.

  Args:
    step: training step of the checkpoint; None takes the newest.
    method: attention method to run in every layer instead of the trained one, as
      "radial(decay=0.5)"; parameters that it does not have (a router's) are dropped.
    raw: take the raw weights instead of their average.
    schedule: dense evaluations and layers, as "dense_first=0.1", instead of the trained config's;
      "" for none.

  Raises:
    ConfigError: there is no checkpoint, it is damaged, or it lacks parameters that the method
      needs (names two of them).
  """
  for _ in range(_TRIES - 1):
    try:
      return _load(workdir, step, method, raw, schedule)
    except (Gone, FileNotFoundError):  # the latter while Orbax lists the folder
      if step is not None:
        raise
      logging.info("training deleted the checkpoint that was read; the newest one is read instead")
  return _load(workdir, step, method, raw, schedule)


def _load(
  workdir, step: int | None, method: str | None, raw: bool, schedule: str | None = None
) -> Run:
  """Loads a model; arguments and errors as of `load_run`.

  Raises:
    Gone: training deleted the checkpoint meanwhile.
  """
  checkpoints = Checkpoints(workdir, create=False)
  record = checkpoints.record(step)
  trained = of_record(record["config"])
  config = trained.model if method is None else trained.model.with_method(method)
  if schedule is not None:
    config = config.with_schedule(schedule)
  shape = tuple(record["latent_shape"])
  condition = trained.conditioned_on(record["class_names"])
  model = nnx.eval_shape(lambda: make_model(config, shape, nnx.Rngs(0), **condition))
  group = "params" if raw else "ema"
  try:
    wanted = everywhere({group: nnx.state(model)})
    tree = checkpoints.restore(wanted, record["step"], ignore_extra=True)
  except Mismatch as error:
    if method is None or not error.missing:
      raise
    examples = " and ".join(name.removeprefix(f"{group}/") for name in error.missing[:2])
    raise ConfigError(
      f"method {method} needs parameters that this checkpoint lacks ({len(error.missing)}, e.g. "
      f"{examples}); train with it: --config.model.attention.method={config.attention.method}."
    ) from error
  checkpoints.close()
  params = jax.tree.map(jax.numpy.asarray, tree[group])
  return Run(model, params, trained, record)
