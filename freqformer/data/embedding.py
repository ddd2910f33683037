"""The embedding of a clip: an array that lies beside it, or what a plug-in makes of its caption."""

import io

import numpy as np

from freqformer.config import ConfigError
from freqformer.data import files
from freqformer.data.embedder import make_embedder
from freqformer.data.latents import array_of
from freqformer.data.protocol import EMBEDDING, BrokenClip, Clip, DataConfig


def embed(config: DataConfig, texts: list[str]) -> np.ndarray:
  """Returns the embeddings of texts, float32 `[n, embedding_size]`.

  Raises:
    ConfigError: the embedder gives other arrays.
  """
  found = np.asarray(make_embedder(config.embedder, config.embedder_path)(texts))
  for vector in found:
    if problem := _problem(vector, config.embedding_size):
      raise ConfigError(f"data.embedder={config.embedder!r}: {problem}.")
  return found.astype(np.float32)


def read_embedding(config: DataConfig, clip: Clip) -> np.ndarray:
  """Returns the embedding of a clip, float32 `[embedding_size]`; empty where none conditions.

  Raises:
    BrokenClip: it has none, or one of another length, or with numbers that are not finite.
  """
  if config.condition != "embedding":
    return np.zeros(0, np.float32)
  if config.embedder:
    vector = _of_caption(config, clip)
  elif config.embedding_array:
    vector = array_of(clip, config.embedding_array, "data.embedding_array")
  elif clip.embedding is None:
    raise BrokenClip(clip.key, f"it has no embedding, a file beside it that ends in {EMBEDDING}")
  else:
    vector = _of_file(clip)
  if problem := _problem(vector, config.embedding_size):
    raise BrokenClip(clip.key, problem)
  return vector.astype(np.float32)


def _of_caption(config: DataConfig, clip: Clip) -> np.ndarray:
  if not clip.caption:
    raise BrokenClip(clip.key, "it has no caption, a .txt beside it or a row of captions.csv")
  if "\ufffd" in clip.caption:
    raise BrokenClip(clip.key, "its caption is not in UTF-8")
  return np.asarray(make_embedder(config.embedder, config.embedder_path)([clip.caption]))[0]


def _of_file(clip: Clip) -> np.ndarray:
  try:
    return np.load(io.BytesIO(files.read(clip.embedding)), allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise BrokenClip(clip.key, f"its embedding is not a readable array ({error})") from error


def _problem(vector: np.ndarray, size: int) -> str | None:
  """Returns a clause about a vector that cannot be used, None if it can."""
  if vector.shape != (size,):
    hint = "; sequences of them are not supported" if vector.ndim > 1 else ""
    shape = "x".join(map(str, vector.shape)) or 1
    return f"its embedding has {shape} numbers, data.embedding_size is {size}{hint}"
  if not np.issubdtype(vector.dtype, np.floating):
    return f"its embedding is {vector.dtype}, not a floating-point array"
  if not np.isfinite(vector).all():
    return "its embedding has numbers that are not finite"
  if not np.square(vector, dtype=np.float32).any():
    return "its embedding is zero, which means no condition"
  return None
