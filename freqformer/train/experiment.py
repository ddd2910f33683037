"""A whole run's configuration, validated in one place: what `get_config` feeds."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from freqformer.config import ConfigError, build, refusing, require
from freqformer.data.codec import make_codec
from freqformer.data.fields import FieldsConfig
from freqformer.data.protocol import DataConfig
from freqformer.data.sources import data_config
from freqformer.diffusion.sampling import SampleConfig
from freqformer.model.architectures import model_config
from freqformer.model.config import ModelConfig
from freqformer.model.schedule import DenseSchedule
from freqformer.placement import check_context
from freqformer.train.mesh import MeshConfig, make_mesh
from freqformer.train.step import TrainConfig


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One run: its data, model, training, sampling, seed and devices."""

  data: DataConfig | FieldsConfig
  model: ModelConfig
  train: TrainConfig
  sample: SampleConfig = SampleConfig()
  seed: int = 0
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    require(self, "seed", least=0, below=2**32)  # the data loader takes no others
    # Resolved here: what the grid decides is part of the run. What is wrong with it is refused
    # before hours of encoding.
    object.__setattr__(self, "model", self.model.resolved(self.latent_shape))
    if self.train.first_frame:
      self._check_first_frame()

  def _check_first_frame(self):
    """Refuses training with first frames where the model or the data have none to give."""
    given = f"config.train.first_frame={self.train.first_frame}"
    if not self.model.first_frame:
      raise ConfigError(f"{given} needs config.model.first_frame=True.")
    if self.latent_shape[0] < 2:
      raise ConfigError(f"{given} needs two latent frames at least; raise config.data.frames.")
    if isinstance(self.data, DataConfig) and not make_codec(self.data.codec).frames_apart:
      raise ConfigError(
        f"{given} needs latent frames of a few frames each; codec {self.data.codec.name!r} mixes "
        "all frames of a clip. Set config.data.codec.name='dct', or a factor of 1 in time."
      )
    if isinstance(self.data, FieldsConfig) and self.data.target == "posterior":
      raise ConfigError(
        f"{given} cannot learn from config.data.target='posterior', the mean without a given "
        "frame; set config.data.target='velocity'."
      )

  def make_mesh(self) -> Mesh:
    """Returns the mesh of devices to train on.

    Not checked on construction: a run is also read to be sampled, on other devices and grids.

    Raises:
      ConfigError: the devices, the batch or a sample cannot be divided as the config asks for.
    """
    by_tiles = all(method.exchanges_tiles for _, method in self.model.runs())
    dense = self.train.attends_densely or self.model.attention.schedule != DenseSchedule()
    tiles = self.model.layout(self.latent_shape).tiles
    check_context(tiles, 0 if by_tiles and not dense else self.model.heads, self.mesh.context)
    return make_mesh(self.mesh, self.train.batch_size, self.train.accumulate)

  def with_spectrum(self, latents: Iterable[np.ndarray]) -> "Experiment":
    """Returns the experiment with the spectrum of training latents, if its model needs one."""
    return dataclasses.replace(self, model=self.model.with_spectrum(latents))

  def conditioned_on(self, class_names: Sequence[str]) -> dict[str, int]:
    """Returns the arguments of `make_model` that say what clips are conditioned on."""
    # Without classes all labels are those of the null class.
    classes = len(class_names) if self.data.condition == "class" else 0
    return {"classes": classes, "embedding": self.data.embedding_size}

  @property
  def latent_shape(self) -> tuple[int, int, int, int]:
    """(t, y, x, c) of the data's latents."""
    return self.data.latent_shape


_PATHS = ("root", "cache")  # keys of config.data
# What the model did before these keys existed; records of older runs lack them.
_BEFORE = {
  "rope_theta": (10_000.0,),
  "attention": {"qk_gain": 1.0, "freqformer": {"deal": "as_is"}, "sliding_tile": {"deal": "as_is"}},
}


def experiment(config: Mapping, begun: Mapping | None = None) -> Experiment:
  """Builds an experiment from a config; a ConfigError names a key.

  Args:
    config: of a config file.
    begun: the recorded config of the run that goes on: what `config` leaves to the grid stays as it
      was decided then.
  """
  values = _plain(config)
  if begun is not None and isinstance(values.get("model"), Mapping):
    values["model"] = _as_begun(values["model"], _completed(begun)["model"])
  found = _built(values)
  found.model.check_training(found.latent_shape)
  _check_dense_steps(found)
  if found.model.attention.schedule != DenseSchedule():
    found.model.phases(len(found.sample.guided()))
  with refusing("config.sample"):
    check_guidance(found.sample, found.train, found.data.condition)
  return found


def _check_dense_steps(exp: Experiment):
  """Refuses dense training steps of a method that cannot be dense attention for a while."""
  if not (exp.train.dense_steps or exp.train.dense_fall):
    return
  for _, method in exp.model.runs():
    reason = method.refuses_dense("")
    if reason is not None:
      raise ConfigError(
        f"config.train.dense_steps={exp.train.dense_steps} and dense_fall={exp.train.dense_fall} "
        f"make layers of {type(method).__name__} dense, which they cannot be: {reason}; set both "
        "to 0, or change the method."
      )


def check_guidance(sample: SampleConfig, train: TrainConfig, condition: str):
  """Refuses to sample with a class embedding that training never moves.

  Args:
    condition: of `DataConfig`.

  Raises:
    ValueError: says what to set.
  """
  free = any(sample.unconditional())
  guided = any(sample.guided())
  if condition == "none":
    if free or guided:
      raise ValueError(
        f"guidance={sample.guidance:g} needs a condition that can be left out, and "
        "data.condition='none' has none; set guidance=1."
      )
    return
  if train.label_dropout == 0 and (free or guided):
    raise ValueError(
      f"guidance={sample.guidance:g} needs the null class, which train.label_dropout=0 never "
      "trains; set guidance=1, or train with a greater label_dropout."
    )
  if train.label_dropout == 1 and not all(sample.unconditional()):
    raise ValueError(
      f"guidance={sample.guidance:g} needs the classes, which train.label_dropout=1 never trains; "
      "set guidance=0 and guidance_interval=(0, 1), or train with a smaller label_dropout."
    )


def of_record(config: Mapping) -> Experiment:
  """Builds the experiment of a checkpoint's recorded config or of a run's config.json.

  In a config file an absent key takes its default; in a record, what runs did before it existed.

  Raises:
    ConfigError: names a key.
  """
  return _built(_completed(config))


def home_expanded(data: Mapping) -> dict:
  """Returns keys of `config.data` with `~` in its paths as the user's home."""
  return {
    key: os.path.expanduser(value) if key in _PATHS and isinstance(value, str) else value
    for key, value in data.items()
  }


def _built(values: dict) -> Experiment:
  """Builds the groups, each by its own class, and the whole."""
  if isinstance(values.get("data"), Mapping):
    values = {**values, "data": home_expanded(values["data"])}
  makers = {"model": model_config, "data": data_config}
  made = {
    name: make(values[name])
    for name, make in makers.items()
    if isinstance(values.get(name), Mapping)
  }
  return build(Experiment, {**values, **made})


def recorded(config: Mapping, exp: Experiment) -> ConfigDict:
  """Returns the config as a run records it: with what grid and data decided for `exp`."""
  decided = {
    "rope_theta": exp.model.rope_theta,
    "attention": {"qk_gain": exp.model.attention.qk_gain},
  }
  if exp.model.spectrum:
    decided["spectrum"] = exp.model.spectrum
  return ConfigDict(_merged(_plain(config), {"model": decided}))


def _as_begun(model: Mapping, old: Mapping) -> dict:
  """Returns the model's keys with `old`'s numbers where they leave them to the grid."""
  attention = dict(model.get("attention", {}))
  attention["qk_gain"] = attention.get("qk_gain") or old["attention"]["qk_gain"]
  theta = model.get("rope_theta") or old["rope_theta"]
  found = {**model, "rope_theta": theta, "attention": attention}
  if model.get("precondition") and "spectrum" in old:
    found["spectrum"] = model.get("spectrum") or old["spectrum"]
  return found


def _completed(config: Mapping) -> dict:
  """Returns a recorded config with the keys that did not exist when it was written."""
  return _merged({"model": _BEFORE}, _plain(config))


def _merged(under: Mapping, over: Mapping) -> dict:
  """Returns the keys of both; `over` wins, groups are merged."""
  merged = {**under, **over}
  for key in under.keys() & over.keys():
    if isinstance(under[key], Mapping) and isinstance(over[key], Mapping):
      merged[key] = _merged(under[key], over[key])
  return merged


def _plain(config: Mapping) -> dict:
  return config.to_dict() if hasattr(config, "to_dict") else dict(config)
