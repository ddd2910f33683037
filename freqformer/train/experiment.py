"""A whole run's configuration, validated in one place: what `get_config` feeds."""

import dataclasses
from collections.abc import Mapping

from freqformer.config import build, require
from freqformer.data.fields import FieldsConfig
from freqformer.data.protocol import DataConfig
from freqformer.data.sources import data_config
from freqformer.diffusion.sampling import SampleConfig
from freqformer.model.config import ModelConfig, model_config
from freqformer.train.step import TrainConfig


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One run: its data, model, training, sampling and seed."""

  data: DataConfig | FieldsConfig
  model: ModelConfig
  train: TrainConfig
  sample: SampleConfig = SampleConfig()
  seed: int = 0

  def __post_init__(self):
    require(self, "seed", least=0, below=2**32)  # the data loader takes no others
    self.model.layout(self.latent_shape)  # refused here, before hours of encoding

  @property
  def latent_shape(self) -> tuple[int, int, int, int]:
    """(t, y, x, c) of the data's latents."""
    return self.data.latent_shape


def experiment(config: Mapping) -> Experiment:
  """Builds an experiment from a config or the dict of a checkpoint; a ConfigError names a key."""
  values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
  if isinstance(values.get("model"), Mapping):
    values["model"] = model_config(values["model"])
  if isinstance(values.get("data"), Mapping):
    values["data"] = data_config(values["data"])
  return build(Experiment, values)
