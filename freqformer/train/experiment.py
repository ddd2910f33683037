"""A whole run's configuration, validated in one place: what `get_config` feeds."""

import dataclasses
from collections.abc import Mapping

from freqformer.config import ConfigError, build, did_you_mean, refusing, require
from freqformer.data.codec import make_codec
from freqformer.data.protocol import DataConfig
from freqformer.diffusion.sampling import SampleConfig
from freqformer.model.config import ModelConfig, model_config
from freqformer.train.step import TrainConfig


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Data, model, training and sampling of one run."""

  data: DataConfig
  model: ModelConfig
  train: TrainConfig
  sample: SampleConfig
  seed: int = 0

  def __post_init__(self):
    require(self, "seed", least=0, below=2**32)  # what the data loader takes
    self.model.layout(self.latent_shape)  # refused here, before hours of encoding

  @property
  def latent_shape(self) -> tuple[int, int, int, int]:
    """(t, y, x, c) of the latents that the codec makes of the data's views."""
    return make_codec(self.data.codec).latent_shape(*self.data.video_shape)


def experiment(config: Mapping) -> Experiment:
  """Builds an experiment from a config dict (or the plain dict that a checkpoint holds).

  Raises:
    ConfigError: one sentence that names the key.
  """
  values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
  known = [f.name for f in dataclasses.fields(Experiment)]
  for name in values:
    if name not in known:
      raise ConfigError(f"config has no key {name!r}; {did_you_mean(name, known)}")
  for name in ("data", "model", "train"):
    if name not in values:
      raise ConfigError(f"config lacks {name!r}; set it in get_config.")
  seed = values.get("seed", 0)
  if not isinstance(seed, int) or isinstance(seed, bool):
    raise ConfigError(f"config.seed must be int, got {seed!r}.")
  parts = (
    build(DataConfig, values["data"], "data"),
    model_config(values["model"]),
    build(TrainConfig, values["train"], "train"),
    build(SampleConfig, values.get("sample", {}), "sample"),
  )
  with refusing("config"):
    return Experiment(*parts, seed)
