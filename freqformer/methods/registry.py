"""From a method's name to its config dataclass: the only place that lists methods."""

import importlib

from freqformer.config import ConfigError, did_you_mean

METHODS = {
  "dense": "Dense",
  "freqformer": "FreqFormer",
  "sparseflow": "SparseFlow",
  "sparse_linear": "SparseLinear",
  "sliding_tile": "SlidingTile",
  "radial": "Radial",
  "block_topk": "BlockTopK",
  "spatial_temporal": "SpatialTemporal",
}


def method_class(name: str):
  """The dataclass of a method.

  Raises:
    ConfigError: for an unknown name.
  """
  if name not in METHODS:
    raise ConfigError(f"attention method {name!r} is unknown; {did_you_mean(name, METHODS)}")
  return getattr(importlib.import_module(f"freqformer.methods.{name}"), METHODS[name])
