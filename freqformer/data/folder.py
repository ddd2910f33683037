"""Any tree of video files: the first-level subfolder is the class; files at the top belong to a class named after the root."""

import os
import pathlib

from freqformer.config import ConfigError
from freqformer.data.protocol import Clip, DataConfig, Listing, uniforms

EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")


def list_folder(config: DataConfig, split: str) -> Listing:
  """The clips of a split, "train" or "val"; classes in alphabetical order.

  A clip's split follows from the hash of its path inside root, so new clips move no old one; both splits get at least one
  clip. A single clip serves both: the two splits then show different views of the same clip.

  Raises:
    ConfigError: the folder is missing or holds no video file.
  """
  root = pathlib.Path(config.root)
  if not root.is_dir():
    raise ConfigError(
      f"data.root {config.root!r} is not a folder: name one that holds video files, one subfolder per class,"
      " or run `make demo`, which renders a small data set."
    )
  files = _video_files(root)
  if not files:
    raise ConfigError(
      f"data.root {config.root!r} holds no video file; known endings are {', '.join(EXTENSIONS)}."
    )
  top = root.resolve().name or "videos"
  classes = {key: key.split("/")[0] if "/" in key else top for key in files}
  names = sorted(set(classes.values()))
  kept = _split(sorted(files), config, split)
  return Listing([Clip(key, str(root / key), names.index(classes[key])) for key in kept], names)


def _video_files(root: pathlib.Path) -> list[str]:
  """Paths relative to root, with "/"; links to folders are followed once, hidden files and folders are not."""
  found, seen = [], set()
  for folder, subfolders, names in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    if real in seen:
      subfolders.clear()
      continue
    seen.add(real)
    subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
    found += [
      (pathlib.Path(folder) / name).relative_to(root).as_posix()
      for name in names
      if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    ]
  return found


def _split(keys: list[str], config: DataConfig, split: str) -> list[str]:
  """The keys of one split, in order; the lowest hashes are validation."""
  if len(keys) == 1:
    return keys
  ranked = sorted(keys, key=lambda key: _place(config, key))
  count = sum(_place(config, key) < config.val_fraction for key in keys)
  val = set(ranked[: min(max(count, 1), len(keys) - 1)])
  return [key for key in keys if (key in val) == (split == "val")]


def _place(config, key) -> float:
  return uniforms(f"{config.seed}|split|{key}")[0]
