"""The configuration of learning on a pretrained model, which `configs/wan.py` feeds."""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from freqformer.config import ConfigError, build, require
from freqformer.train.distil import DistilConfig


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
  """The model, and the method whose own parameters learn on it.

  Attributes:
    pretrained: folder as downloaded.
    method: attention method, e.g. "freqformer(router=dict(budget=0.1))".
    block: rows of a tile.
  """

  pretrained: str = ""
  method: str = "freqformer"
  block: int = 128

  def __post_init__(self):
    require(self, "block", least=1)


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
  """Prompts and sizes of the videos that the dense model samples.

  Attributes:
    prompts: texts with ";" between them, or a file of them: text, or `.npz` of embeddings.
    negative: prompt that guidance leads away from.
    frames: 4 k + 1; 0: as usual for the model.
    size: (rows, cols) in pixels; empty: as usual for the model.
  """

  prompts: str = "prompts.txt"
  negative: str = ""
  frames: int = 0
  size: tuple[int, ...] = ()

  def __post_init__(self):
    require(self, "frames", least=0)
    if len(self.size) not in (0, 2):
      raise ValueError(f"size={self.size} must be empty or (rows, cols) in pixels.")


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig:
  """Settings of the dense model's sampling.

  Attributes:
    steps: of UniPC; each is a step of the optimizer.
    guidance: scale, as the method shall sample; 1 runs the conditional half alone.
    shift: of the noise levels; 0: the model's.
  """

  steps: int = 50
  guidance: float = 5.0
  shift: float = 0.0

  def __post_init__(self):
    require(self, "steps", least=1)
    require(self, "guidance shift", least=0)


@dataclasses.dataclass(frozen=True)
class Learning:
  """One run: the model, its prompts, how it samples, how a method learns from that."""

  model: PretrainedConfig
  data: PromptsConfig = PromptsConfig()
  sample: TrajectoryConfig = TrajectoryConfig()
  train: DistilConfig = DistilConfig()
  seed: int = 0

  def __post_init__(self):
    require(self, "seed", least=0, below=2**32)


def is_learning(config: Mapping) -> bool:
  """Tells whether a config, of `get_config`, is one of `Learning`: its model is pretrained."""
  model = config.get("model", {})
  return isinstance(model, Mapping | ConfigDict) and "pretrained" in model


def learning(config: Mapping) -> Learning:
  """Builds a run's configuration; a ConfigError names a key."""
  found = build(Learning, config)
  if not found.model.pretrained:
    raise ConfigError(
      "config.model.pretrained is empty: name a downloaded folder, "
      "--config.model.pretrained=DIR (docs/pretrained.md)."
    )
  return found
