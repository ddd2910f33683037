"""Prompts as a user writes them: a file with one in each line."""

import pathlib
from collections.abc import Iterable

from freqformer.config import ConfigError


def read_prompts(path) -> list[str]:
  """Returns the lines of a text file in UTF-8, with or without a byte order mark.

  Raises:
    ConfigError: the file is in another encoding.
    OSError: it cannot be read.
  """
  try:
    return pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
  except UnicodeDecodeError as error:
    raise ConfigError(f"prompts: {path} is not in UTF-8; save it in that encoding.") from error


def without_blank(prompts: Iterable[str]) -> list[str]:
  """Returns prompts without white space around them, and without those that are nothing else.

  Raises:
    ConfigError: none is left.
  """
  texts = [text.strip() for text in prompts if text.strip()]
  if not texts:
    raise ConfigError("prompts: there is no text among them; give one at least.")
  return texts
