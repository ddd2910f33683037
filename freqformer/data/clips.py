"""The list of a split's clips, from any source."""

import collections
import dataclasses
import os
import pathlib

from freqformer.config import ConfigError
from freqformer.data.protocol import Clip, DataConfig, Listing, uniforms
from freqformer.data.ucf101 import list_ucf101

EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")


def list_clips(config: DataConfig, split: str) -> Listing:
  """Lists the clips of a split, class names, and clips listed but missing.

  Args:
    split: "train", "val", or of a folder "all", for models that were trained on other clips.

  Raises:
    ConfigError: the data set is missing, empty or contradicts itself.
  """
  list_source = list_ucf101 if config.source == "ucf101" else list_folder
  listing = list_source(config, split)
  if not config.max_clips:
    return listing
  # Round-robin over the classes, by hash inside each: a small set still has every class that fits.
  shuffled = sorted(listing.clips, key=lambda clip: uniforms(f"{config.seed}|max|{clip.key}"))
  rounds = {}
  seen = collections.Counter()
  for clip in shuffled:
    rounds[clip] = seen[clip.label]
    seen[clip.label] += 1
  kept = set(sorted(shuffled, key=rounds.get)[: config.max_clips])
  return dataclasses.replace(listing, clips=[clip for clip in listing.clips if clip in kept])


def list_folder(config: DataConfig, split: str) -> Listing:
  """Lists the clips of any tree of video files; the first-level subfolder is the class.

  Files at the top belong to a class named after the root. Classes are in alphabetical order.

  If all clips lie below root/train and root/val, and both have some, these are the splits, and
  classes are the folders below them. Otherwise a clip's split follows from the hash of its path
  inside root, so new clips move no old one. Both splits get at least one clip; a single clip serves
  both, which then show different views of it.

  The split "all" has every clip, but of root/train and root/val only the latter's: somebody trains
  on the former.

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
  official = {key.split("/")[0] if "/" in key else "" for key in keys} == {"train", "val"}
  inside = {key: key.partition("/")[2] if official else key for key in keys}
  classes = {key: path.split("/")[0] if "/" in path else top for key, path in inside.items()}
  names = sorted(set(classes.values()))
  if official:
    folder = "train/" if split == "train" else "val/"
    keys = [key for key in keys if key.startswith(folder)]
  elif len(keys) > 1 and split != "all":
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
