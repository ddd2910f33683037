"""The sources of data: the config that each `data.source` has, and the splits that it opens.

Every config has `latent_shape`, `fps`, `facts()` (lines of text for people) and `decode(latents,
statistics)`; every split is a `Split`.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from freqformer.config import ConfigError, build, did_you_mean
from freqformer.data.clips import list_clips
from freqformer.data.codec import LatentStatistics
from freqformer.data.fields import Fields, FieldsConfig
from freqformer.data.protocol import DataConfig
from freqformer.diffusion.posterior import Posterior

SOURCES = {"ucf101": DataConfig, "folder": DataConfig, "fields": FieldsConfig}


class Split(Protocol):
  """The clips of "train" or "val" as normalised latents, by number.

  Attributes:
    hash: of all that decides which latents come out.
    latent_shape: (t, y, x, c).
    video_shape: (frames, rows, cols) of decoded videos.
    class_names: index = label.
    statistics: of the training latents before they were normalised.
    reference: the exact posterior mean, which validation compares with; None where it is not known.
    target: what training regresses on instead of the velocity of the draw, or None.
  """

  hash: str
  latent_shape: tuple[int, int, int, int]
  video_shape: tuple[int, int, int]
  class_names: list[str]
  statistics: LatentStatistics
  reference: Posterior | None
  target: Posterior | None

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns `{"latent": float32 [t, y, x, c], "label": int32, "index": int32}`."""


def config_class(values: Mapping) -> type[DataConfig] | type[FieldsConfig]:
  """Returns the dataclass of a config's keys; that of video files if the source is not known."""
  return SOURCES.get(values.get("source"), DataConfig)


def data_config(values: Mapping) -> DataConfig | FieldsConfig:
  """Builds the config of the source that `values["source"]` names; a ConfigError names a key."""
  source = values.get("source")
  if source is not None and source not in SOURCES:
    hint = did_you_mean(str(source), SOURCES)
    raise ConfigError(f"config.data.source={source!r} is unknown; {hint}")
  return build(config_class(values), values, "data")


def open_split(config: DataConfig | FieldsConfig, split: str) -> Split:
  """Opens "train" or "val"; video files are encoded first if their latents are not there yet.

  Raises:
    ConfigError: as `cache.prepare` does.
  """
  if isinstance(config, FieldsConfig):
    return Fields(config, split)
  from freqformer.data.cache import prepare  # only video files need av, the package of an extra

  return prepare(config, split)


def class_names(config: DataConfig | FieldsConfig) -> list[str]:
  """Returns the names of the classes; a ConfigError says that the data are not there."""
  if isinstance(config, FieldsConfig):
    return config.class_names
  return list_clips(config, "train").class_names
