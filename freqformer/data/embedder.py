"""Plug-ins that make embeddings of texts; `freqformer/data/text.py` has one."""

import functools

import numpy as np

from freqformer.config import ConfigError, load_class


class Embedder:
  """A map of texts to vectors, which `data.embedder` names as "module:Class". Thread-safe."""

  version = 1  # part of a cache's hash: raise it when the same text gives another vector

  def __init__(self, path: str):
    """Loads what lies at `data.embedder_path`."""

  def __call__(self, texts: list[str]) -> np.ndarray:
    """Returns a vector per text, floating-point `[n, e]`."""
    raise NotImplementedError


def embedder_class(name: str) -> type[Embedder]:
  """Returns the class of an embedder; ConfigError if "module:Class" names none."""
  found = load_class(name, "embedder")
  if not (isinstance(found, type) and issubclass(found, Embedder)):
    raise ConfigError(
      f"embedder {name!r} must be a class that inherits freqformer.data.embedder.Embedder."
    )
  return found


@functools.lru_cache(maxsize=2)
def make_embedder(name: str, path: str) -> Embedder:
  """Returns an embedder; weights are loaded once."""
  return embedder_class(name)(path)
