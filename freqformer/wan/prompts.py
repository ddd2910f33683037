"""Prompts as Wan's condition: cleaned, split into tokens, encoded once and remembered on disk.

A prompt is 512 rows of the text encoder's output (arXiv 2503.20314): those of its tokens and of an
end mark, then zeros, which the transformer sees as well.
"""

import dataclasses
import functools
import hashlib
import html
import importlib
import io
import json
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from absl import logging

from freqformer.config import ConfigError
from freqformer.disk import space_for, write_whole
from freqformer.wan.text_encoder import TextEncoderConfig, encode

MAX_TOKENS = 512  # rows of a prompt, as Wan was trained
_END = "</s>"
_PADDING = 0  # masked: any token would do
_LETTERS = 40  # choice: of a prompt in a message
_VERSION = 1  # of cached embeddings: raise it when the same text gives other numbers


def clean(text: str) -> str:
  """Returns a prompt as Wan was trained to read it.

  Broken encodings are repaired, HTML entities are replaced twice (they come doubly escaped), and
  white space is one space between words.

  Raises:
    ConfigError: the package ftfy is missing.
  """
  repaired = _package("ftfy").fix_text(text)
  unescaped = html.unescape(html.unescape(repaired))
  return re.sub(r"\s+", " ", unescaped).strip()


class Tokenizer:
  """The tokenizer of UMT5, from a local `tokenizer.json`; nothing is looked up on the network."""

  def __init__(self, path: pathlib.Path):
    """Reads the file.

    Raises:
      ConfigError: the package tokenizers is missing, or the file, or it is of another tokenizer.
    """
    library = _package("tokenizers")
    if not pathlib.Path(path).is_file():
      raise ConfigError(
        f"{path} is missing; name the folder of a whole model in diffusers' layout."
      )
    try:
      self._tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no class of its own
      raise ConfigError(f"{path} is not a tokenizer ({error}); download it again.") from error
    # The file may hold another task's settings.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._end = self._tokenizer.token_to_id(_END)
    if self._end is None or self._tokenizer.encode("").ids not in ([], [self._end]):
      raise ConfigError(f"{path} does not end a text by {_END} alone: it is not UMT5's tokenizer.")

  def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask, both int32 `[n, 512]`; the mask is 1 for tokens and the end mark.

    Raises:
      ConfigError: texts are too long; it names each and its length. None is cut.
    """
    # The end mark is ours: a file without the rule that adds it gives the same tokens.
    encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
    rows = [[*each.ids, self._end] for each in encoded]
    too_long = [
      f"{_shortened(text)} has {len(row)} tokens and needs {len(row) - MAX_TOKENS} fewer"
      for text, row in zip(texts, rows, strict=True)
      if len(row) > MAX_TOKENS
    ]
    if too_long:
      raise ConfigError(
        f"prompts may have {MAX_TOKENS} tokens, the end mark included: {'; '.join(too_long)}; "
        "shorten the text, it is not cut silently."
      )
    ids = np.full((len(rows), MAX_TOKENS), _PADDING, np.int32)
    mask = np.zeros((len(rows), MAX_TOKENS), np.int32)
    for i, row in enumerate(rows):
      ids[i, : len(row)] = row
      mask[i, : len(row)] = 1
    return ids, mask


@dataclasses.dataclass(frozen=True)
class TextEncoder:
  """A text encoder with its tokenizer, both of which are opened when a text is encoded.

  Attributes:
    config: sizes.
    tokenizer: path of `tokenizer.json`.
    load: returns parameters, of `text_encoder.stacked`. They are freed after each call.
  """

  config: TextEncoderConfig
  tokenizer: pathlib.Path
  load: Callable[[], Mapping]

  def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the rows of each cleaned text's tokens, float32 `[tokens, d_model]`.

    Texts are encoded one after the other by one program: its scores alone have 67 MB a text.

    Raises:
      ConfigError: of `Tokenizer`, before parameters are loaded; or the tokenizer has tokens that
        the encoder does not know.
    """
    ids, mask = Tokenizer(self.tokenizer)(texts)
    if ids.max(initial=0) >= self.config.vocab_size:
      raise ConfigError(
        f"{self.tokenizer} gives token {ids.max()}, the text encoder knows {self.config.vocab_size}"
        " tokens: they are of two models."
      )
    params = self.load()
    run = jax.jit(functools.partial(encode, self.config))
    found = []
    for i, count in enumerate(mask.sum(1)):
      rows = run(params, ids[i : i + 1], mask[i : i + 1])
      found.append(np.asarray(rows)[0, :count])
    return found


@dataclasses.dataclass(frozen=True)
class PromptEmbeddings:
  """Embeddings that samples are drawn for.

  Attributes:
    texts: prompts as they were given.
    embeddings: float32 `[n, 512, width]`, zero behind each prompt.
    negative: float32 `[512, width]`, what guidance leads away from; None if it is not known.
  """

  texts: tuple[str, ...]
  embeddings: np.ndarray
  negative: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class EmbeddingCache:
  """Embeddings on disk, a file for each text.

  Attributes:
    folder: made when it is first written to.
    identity: of the weights that make the embeddings, of `weights_identity`.
    width: numbers in a row.
  """

  folder: pathlib.Path
  identity: str
  width: int

  def path(self, text: str) -> pathlib.Path:
    """Returns the file of a cleaned text."""
    key = hashlib.sha256(json.dumps([_VERSION, self.identity, text]).encode())
    return pathlib.Path(self.folder) / f"{key.hexdigest()}.npz"

  def get(self, text: str) -> np.ndarray | None:
    """Returns the rows of a cleaned text; None if it is not there, or its file is damaged."""
    path = self.path(text)
    if not path.exists():
      return None
    try:
      rows = _arrays(path)["rows"]
      _check_rows(rows, self.width, 2)
    except (KeyError, ValueError) as error:
      logging.warning("%s is damaged (%s); the prompt is encoded again", path, error)
      return None
    return rows

  def put(self, text: str, rows: np.ndarray):
    """Writes the rows of a cleaned text, whole or not at all.

    Raises:
      ConfigError: the disk is full.
    """
    with space_for("the embedding of a prompt", self.folder, rows.nbytes):
      pathlib.Path(self.folder).mkdir(parents=True, exist_ok=True)
      write_whole(self.path(text), _npz(rows=rows, text=np.array(text)))


def weights_identity(files: Iterable[pathlib.Path], weights: Iterable[pathlib.Path], dtype) -> str:
  """Returns a hash that tells a text encoder from another one, hex.

  Weights count by name, size and date of change. Hashing them would read 11 GB, which a cache is to
  spare, and parts of them could miss what changed; who replaces a file changes its date. A copy
  with a new date costs no more than encoding again.

  Args:
    files: small ones whose contents count, `config.json` and `tokenizer.json`.
    weights: the safetensors.
    dtype: in which the parameters are used.
  """
  contents = [hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() for path in files]
  listed = []
  for path in sorted(map(pathlib.Path, weights)):
    status = path.stat()
    listed.append([path.name, status.st_size, status.st_mtime_ns])
  told = json.dumps([contents, listed, str(np.dtype(dtype))])
  return hashlib.sha256(told.encode()).hexdigest()


def embed_prompts(
  prompts: Sequence[str],
  negative: str | None,
  encoder: TextEncoder,
  cache: EmbeddingCache | None = None,
) -> PromptEmbeddings:
  """Returns embeddings of prompts; texts that the cache has need neither tokenizer nor weights.

  Args:
    negative: the prompt that guidance leads away from, often ""; None where nothing is guided.

  Raises:
    ConfigError: a text is too long, a package or file is missing, or the disk is full.
  """
  cleaned = [clean(text) for text in prompts]
  against = [] if negative is None else [clean(negative)]
  known = {}
  for text in (*cleaned, *against):
    known[text] = None if cache is None else cache.get(text)
  unknown = [text for text, rows in known.items() if rows is None]
  if unknown:
    for text, rows in zip(unknown, encoder(unknown), strict=True):
      known[text] = rows
      if cache is not None:
        cache.put(text, rows)
  return PromptEmbeddings(
    tuple(prompts),
    np.stack([_padded(known[text]) for text in cleaned]),
    _padded(known[against[0]]) if against else None,
  )


def write_embeddings(path: pathlib.Path, embeddings: PromptEmbeddings):
  """Writes a file that `read_embeddings` reads, whole or not at all.

  Raises:
    ConfigError: the disk is full.
  """
  path = pathlib.Path(path)
  arrays = {"embeddings": embeddings.embeddings, "texts": np.array(embeddings.texts)}
  if embeddings.negative is not None:
    arrays["negative"] = embeddings.negative
  with space_for("the embeddings of prompts", path.parent):
    write_whole(path, _npz(**arrays))


def read_embeddings(path: pathlib.Path, width: int) -> PromptEmbeddings:
  """Returns embeddings that were made elsewhere, from an `.npz` file.

  Its arrays are `embeddings`, floating-point `[n, rows, width]` with at most 512 rows, zero behind
  each prompt; `negative` `[rows, width]`, which may be left out; and `texts` `[n]`, which too.

  Raises:
    ConfigError: the file is not there or damaged, or its arrays have other shapes.
  """
  try:
    arrays = _arrays(path)
    if "embeddings" not in arrays:
      raise ValueError(f"it has no array 'embeddings', but {', '.join(arrays) or 'none'}")
    embeddings = arrays["embeddings"]
    _check_rows(embeddings, width, 3)
    if not len(embeddings):
      raise ValueError("it has no prompt")
    negative = arrays.get("negative")
    if negative is not None:
      _check_rows(negative, width, 2)
    numbered = [f"prompt {i + 1}" for i in range(len(embeddings))]
    texts = arrays.get("texts", np.array(numbered))
    if texts.shape != (len(embeddings),):
      raise ValueError(f"it has {len(embeddings)} embeddings and texts of shape {texts.shape}")
  except (OSError, ValueError) as error:
    raise ConfigError(f"prompts: {path} cannot be used: {error}.") from error
  return PromptEmbeddings(
    tuple(map(str, texts)),
    np.stack([_padded(rows) for rows in embeddings]),
    None if negative is None else _padded(negative),
  )


def _padded(rows: np.ndarray) -> np.ndarray:
  """Returns float32 rows, with zeros behind them up to 512."""
  missing = MAX_TOKENS - len(rows)
  return np.pad(np.asarray(rows, np.float32), ((0, missing), (0, 0)))


def _check_rows(array: np.ndarray, width: int, axes: int):
  """Refuses what is not rows of numbers of a width.

  Raises:
    ValueError: a clause about it.
  """
  if not np.issubdtype(array.dtype, np.floating):
    raise ValueError(f"embeddings are {array.dtype}; save them as float32")
  if array.ndim != axes or array.shape[-1] != width or array.shape[-2] > MAX_TOKENS:
    raise ValueError(
      f"embeddings have shape {array.shape}; {axes} axes are needed, the last of {width} numbers "
      f"and the one before it of at most {MAX_TOKENS} rows"
    )
  if not np.isfinite(array).all():
    raise ValueError("embeddings have numbers that are not finite")


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the arrays of an `.npz` file.

  Raises:
    ValueError: it is none, or damaged.
    OSError: it cannot be read.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except (AttributeError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
    # np.load returns a bare array for an `.npy` file, which is no context.
    raise ValueError(f"it is not a whole .npz file ({error})") from error


def _npz(**arrays: np.ndarray) -> bytes:
  """Returns the contents of an `.npz` file."""
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def _package(name: str):
  """Imports a package of the extra `pretrained`.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name != name:
      raise
    raise ConfigError(
      f"prompts need the package {name}, which is not installed; install it by "
      "pip install 'freqformer[pretrained]'."
    ) from error


def _shortened(text: str) -> str:
  """Returns the beginning of a text in quotes."""
  return repr(text if len(text) <= _LETTERS else f"{text[:_LETTERS]}...")
