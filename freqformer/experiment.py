"""A whole run's configuration, validated in one place: what `get_config` feeds."""

import dataclasses
from collections.abc import Mapping

from freqformer.config import ConfigError, build, did_you_mean
from freqformer.data.protocol import DataConfig
from freqformer.model_config import ModelConfig, model_config
from freqformer.sampling import SampleConfig
from freqformer.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Data, model, training and sampling of one run."""

  data: DataConfig
  model: ModelConfig
  train: TrainConfig
  sample: SampleConfig
  seed: int = 0


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
  return Experiment(
    build(DataConfig, values["data"], "data"),
    model_config(values["model"]),
    build(TrainConfig, values["train"], "train"),
    build(SampleConfig, values.get("sample", {}), "sample"),
    int(values.get("seed", 0)),
  )
