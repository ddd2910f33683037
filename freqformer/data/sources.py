"""The sources of data: the config that each `data.source` has, and the splits that it opens.

Every config has `latent_shape`, `fps`, `facts()` (lines of text for people) and `decode(latents,
statistics)`; every split is a `Split`.
"""

import ast
import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from freqformer.config import ConfigError, build, did_you_mean
from freqformer.data.clips import list_clips, survey
from freqformer.data.codec import LatentStatistics
from freqformer.data.fields import Fields, FieldsConfig
from freqformer.data.protocol import DataConfig
from freqformer.diffusion.posterior import Posterior

SOURCES = {
  "ucf101": DataConfig,
  "folder": DataConfig,
  "latents": DataConfig,
  "fields": FieldsConfig,
}
# Keys that decide which files are validation clips.
_HELD_OUT_BY = ("source", "split", "seed", "val_fraction")


class Split(Protocol):
  """The clips of "train" or "val" as normalised latents, by number.

  Attributes:
    hash: of all that decides which latents come out.
    latent_shape: (t, y, x, c).
    video_shape: (frames, rows, cols) of decoded videos.
    class_names: index = label.
    class_counts: clips of each class; None where every class has some.
    fps: of decoded videos.
    statistics: of the training latents before they were normalised.
    reference: the exact posterior mean, which validation compares with; None where it is not known.
    target: what training regresses on instead of the velocity of the draw, or None.
  """

  hash: str
  latent_shape: tuple[int, int, int, int]
  video_shape: tuple[int, int, int]
  class_names: list[str]
  class_counts: list[int] | None
  fps: float
  statistics: LatentStatistics
  reference: Posterior | None
  target: Posterior | None

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns `{"latent": float32 [t, y, x, c], "label": int32 or float32 [e], "index": int32}`."""


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


def data_keys() -> list[str]:
  """Returns the keys of all sources' configs, a group's as `codec.channels`."""
  keys = {}
  for cls in SOURCES.values():
    for name, hint in typing.get_type_hints(cls).items():
      group = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ()
      keys |= dict.fromkeys([f"{name}.{field.name}" for field in group] or [name])
  return list(keys)


def other_clips(
  config: DataConfig | FieldsConfig, given: Mapping[str, str]
) -> tuple[DataConfig | FieldsConfig, str]:
  """Returns the data that a model trained on `config` is validated on, and which split of them.

  Of another folder every clip is taken, because none was trained on; with `val_fraction` those that
  training left out, if this is the run's own folder in another place.

  Args:
    given: values of `data_keys`, as text; the others stay as in training.

  Raises:
    ConfigError: a value is wrong, the latents are not of the kind that the model takes, or clips
      that it was trained on would be among them.
  """
  source = given.get("source", config.source)
  if source in SOURCES and SOURCES[source] is not type(config):
    raise ConfigError(
      f"config.data.source={source!r}: a model trained on {config.source!r} knows no such latents; "
      "random fields and videos cannot stand in for each other."
    )
  values = flatten_dict(dataclasses.asdict(config), sep=".")
  texts = {key: _value(text, values.get(key)) for key, text in given.items()}
  other = data_config(unflatten_dict(values | texts, sep="."))
  changed = [key for key in texts if key.startswith("codec.") and texts[key] != values[key]]
  if changed:
    raise ConfigError(
      f"config.data.{changed[0]}={texts[changed[0]]!r}: the model takes latents of the codec that "
      f"it was trained with ({changed[0]}={values[changed[0]]!r}); leave config.data.codec out."
    )
  for key in ("condition", "embedding_size", "embedder"):
    if texts.get(key, values.get(key)) != values.get(key):
      raise ConfigError(
        f"config.data.{key}={texts[key]!r}: the model was trained with {values[key]!r}; leave "
        f"config.data.{key} out."
      )
  if other.latent_shape[-1] != config.latent_shape[-1]:
    raise ConfigError(
      f"the clips have {other.latent_shape[-1]} channels, the model takes "
      f"{config.latent_shape[-1]}; leave config.data.channels out."
    )
  if isinstance(other, FieldsConfig):
    return other, "val"
  own = os.path.realpath(other.root) == os.path.realpath(config.root)
  for key in _HELD_OUT_BY if own else ():
    if getattr(other, key) != getattr(config, key):
      raise ConfigError(
        f"config.data.{key} decides which clips of {config.root} the model was not trained on; "
        "leave it out, or name another config.data.root."
      )
  return other, "val" if own or source == "ucf101" or "val_fraction" in given else "all"


def _value(text: str, old):
  """Returns a Python value for a key whose value is `old`; what is none stays text."""
  if isinstance(old, str):
    return text
  try:
    return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
  except (ValueError, SyntaxError):
    return text


def open_split(
  config: DataConfig | FieldsConfig, split: str, statistics: LatentStatistics | None = None
) -> Split:
  """Opens a split; video files are encoded first if their latents are not there yet.

  Args:
    split: "train", "val", or of a folder "all", see `list_clips`.
    statistics: of a model that was trained on other clips, to normalise with; None: those of
      "train". Random fields are normalised by themselves.

  Raises:
    ConfigError: as `cache.prepare` does.
  """
  if isinstance(config, FieldsConfig):
    return Fields(config, split)
  from freqformer.data.cache import prepare  # only video files need av, the package of an extra

  return prepare(config, split, statistics)


def open_splits(config: DataConfig | FieldsConfig) -> tuple[Split, Split]:
  """Opens "train" and "val" as `open_split` does; both are listed before either is encoded.

  Logs what was taken for the data set, and what looks wrong with it.
  """
  if not isinstance(config, FieldsConfig):
    try:
      survey(config)
    except ConfigError:
      from freqformer.data.cache import is_cached

      if not all(is_cached(config, split) for split in ("train", "val")):
        raise
  return open_split(config, "train"), open_split(config, "val")


def class_names(config: DataConfig | FieldsConfig) -> list[str]:
  """Returns the names of the classes; a ConfigError says that the data are not there."""
  if isinstance(config, FieldsConfig):
    return config.class_names
  return list_clips(config, "train").class_names
