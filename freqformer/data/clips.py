"""The list of a split's clips, from any source."""

import collections
import dataclasses

from freqformer.data.folder import list_folder
from freqformer.data.protocol import DataConfig, Listing, uniforms
from freqformer.data.ucf101 import list_ucf101

_SOURCES = {"ucf101": list_ucf101, "folder": list_folder}


def list_clips(config: DataConfig, split: str) -> Listing:
  """Lists the clips of a split ("train" or "val"), class names, and clips listed but missing.

  Raises:
    ConfigError: the data set is missing, empty or contradicts itself.
    ValueError: there is no such split.
  """
  if split not in ("train", "val"):
    raise ValueError(f"A split is 'train' or 'val', got {split!r}.")
  listing = _SOURCES[config.source](config, split)
  if not config.max_clips or len(listing.clips) <= config.max_clips:
    return listing
  # Round-robin over the classes, by hash inside each: a small set still has every class that fits.
  shuffled = sorted(listing.clips, key=lambda clip: uniforms(f"{config.seed}|max|{clip.key}"))
  rounds = {}
  seen = collections.Counter()
  for clip in shuffled:
    rounds[clip.key] = seen[clip.label]
    seen[clip.label] += 1
  kept = set(sorted(shuffled, key=lambda clip: rounds[clip.key])[: config.max_clips])
  return dataclasses.replace(listing, clips=[clip for clip in listing.clips if clip in kept])
