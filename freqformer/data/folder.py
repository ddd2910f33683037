"""Any tree of video files: the first-level subfolder is the class.

Files at the top belong to a class named after the root.
"""

import os
import pathlib

from freqformer.config import ConfigError
from freqformer.data.protocol import Clip, DataConfig, Listing, uniforms

EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")


def list_folder(config: DataConfig, split: str) -> Listing:
  """Lists the clips of a split; classes are in alphabetical order.

  A clip's split follows from the hash of its path inside root, so new clips move no old one. Both
  splits get at least one clip; a single clip serves both, which then show different views of it.

  Raises:
    ConfigError: the folder is missing or holds no video file.
  """
  root = pathlib.Path(config.root)
  if not root.is_dir():
    raise ConfigError(
      f"data.root {config.root!r} is not a folder: name one that holds video files, one subfolder "
      "per class, or run `make demo`, which renders a small data set."
    )
  keys = sorted(_video_files(root))
  if not keys:
    raise ConfigError(
      f"data.root {config.root!r} holds no video file; known endings are {', '.join(EXTENSIONS)}."
    )
  top = root.resolve().name or "videos"
  classes = {key: key.split("/")[0] if "/" in key else top for key in keys}
  names = sorted(set(classes.values()))
  if len(keys) > 1:
    # The lowest hashes are validation.
    places = {key: uniforms(f"{config.seed}|split|{key}")[0] for key in keys}
    count = sum(place < config.val_fraction for place in places.values())
    val = set(sorted(keys, key=places.get)[: min(max(count, 1), len(keys) - 1)])
    keys = [key for key in keys if (key in val) == (split == "val")]
  return Listing([Clip(key, str(root / key), names.index(classes[key])) for key in keys], names)


def _video_files(root: pathlib.Path) -> list[str]:
  """Returns paths below root; links to folders are followed once, hidden names are not."""
  found = []
  seen = set()
  for folder, subfolders, names in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    if real in seen:
      subfolders.clear()
      continue
    seen.add(real)
    subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    for name in names:
      if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
        found.append((pathlib.Path(folder) / name).relative_to(root).as_posix())
  return found
