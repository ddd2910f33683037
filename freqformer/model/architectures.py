"""Models by the name that `config.model.architecture` gives them, made from config files."""

import dataclasses
from collections.abc import Mapping

from flax import nnx

from freqformer.config import ConfigError, build, did_you_mean
from freqformer.methods.base import Method
from freqformer.methods.registry import METHODS, method_class, parse_method, with_fields
from freqformer.model.config import AttentionConfig, ModelConfig
from freqformer.model.dit import VideoDiT
from freqformer.model.stack import LayerStack
from freqformer.model.wan import WanConfig, WanDiT

# The first one is meant where a config names none.
ARCHITECTURES = {"dit": (ModelConfig, VideoDiT), "wan": (WanConfig, WanDiT)}
_KEY = "architecture"


def make_model(
  config: ModelConfig, latent_shape, rngs: nnx.Rngs, *, classes: int = 0, embedding: int = 0
) -> LayerStack:
  """Returns a model with random weights, of the class that the config is of.

  Args:
    latent_shape: `(t, y, x, c)` in training; other grids work with tables of their own.
    classes: number of classes; label `classes` is the null class of guidance.
    embedding: numbers of the embedding that is a clip's label in the place of a class; 0: classes.
  """
  model = next(model for own, model in ARCHITECTURES.values() if type(config) is own)
  return model(config, latent_shape, rngs=rngs, classes=classes, embedding=embedding)


def config_class(values: Mapping) -> type[ModelConfig]:
  """Returns the class of the config that `config.model` gives; raises ConfigError for none."""
  name = values.get(_KEY, next(iter(ARCHITECTURES)))
  if name not in ARCHITECTURES:
    raise ConfigError(f"config.model.{_KEY}={name!r}; {did_you_mean(name, ARCHITECTURES)}")
  return ARCHITECTURES[name][0]


def model_config(values: Mapping) -> ModelConfig:
  """Builds the config from `config.model`, where methods' groups are keys of `attention`.

  Raises:
    ConfigError: names a key.
  """
  cls = config_class(values)
  values = {key: value for key, value in values.items() if key != _KEY}
  attention = dict(values.get("attention", {}))
  methods = {
    name: build(method_class(name), attention.pop(name), f"model.attention.{name}")
    for name in METHODS
    if name in attention
  }
  known = {field.name for field in dataclasses.fields(AttentionConfig)} | set(METHODS)
  for key in attention:
    if key not in known:
      raise ConfigError(f"config.model.attention has no key {key!r}; {did_you_mean(key, known)}")
  attention = build(AttentionConfig, _plain_names(attention, methods), "model.attention")
  return build(cls, {**values, "attention": attention}, "model")


def _plain_names(attention: dict, methods: dict[str, Method]) -> dict:
  """Returns the keys of `AttentionConfig`; fields written behind a name go to its method."""
  given = {}

  def plain(text):
    if not isinstance(text, str):
      return text  # `build` refuses it
    name, fields = parse_method(text)
    if fields and given.setdefault(name, fields) != fields:
      raise ConfigError(
        f"config.model.attention sets {name} twice: {given[name]} and {fields}; a model has one of "
        "each method."
      )
    if fields:
      method = methods.get(name) or method_class(name)()
      methods[name] = with_fields(method, fields, f"model.attention.{name}")
    return name

  attention = dict(attention)
  if "method" in attention:
    attention["method"] = plain(attention["method"])
  layers = attention.get("layers", ())
  if isinstance(layers, list | tuple):
    attention["layers"] = tuple(
      (*run[:2], plain(run[2])) if isinstance(run, list | tuple) and len(run) == 3 else run
      for run in layers
    )
  return attention | {"methods": tuple(methods.items())}
