"""The sources of data: the config that each `data.source` has, and the splits that it opens.

Every config has `latent_shape`, `fps`, `facts()` (lines of text for people) and `decode(latents,
statistics)`. Every split has a length, records by number (`{"latent", "label", "index"}`), `hash`,
`latent_shape`, `video_shape`, `class_names`, `statistics`, and two posteriors, each of which may be
None: `reference`, the exact answer that validation compares with, and `target`, which training
regresses on instead of the velocity.
"""

from collections.abc import Mapping

from freqformer.config import ConfigError, build, did_you_mean
from freqformer.data import cache
from freqformer.data.clips import list_clips
from freqformer.data.fields import Fields, FieldsConfig
from freqformer.data.protocol import DataConfig

SOURCES = {"ucf101": DataConfig, "folder": DataConfig, "fields": FieldsConfig}


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


def open_split(config: DataConfig | FieldsConfig, split: str) -> cache.LatentCache | Fields:
  """Opens "train" or "val"; video files are encoded first if their latents are not there yet.

  Raises:
    ConfigError: as `cache.prepare` does.
  """
  return Fields(config, split) if isinstance(config, FieldsConfig) else cache.prepare(config, split)


def class_names(config: DataConfig | FieldsConfig) -> list[str]:
  """Returns the names of the classes; a ConfigError says that the data are not there."""
  if isinstance(config, FieldsConfig):
    return config.class_names
  return list_clips(config, "train").class_names
