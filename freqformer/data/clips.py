"""One list of clips from any source."""

import collections
import dataclasses

from freqformer.data.folder import list_folder
from freqformer.data.protocol import DataConfig, Listing, uniforms
from freqformer.data.ucf101 import list_ucf101

_SOURCES = {"ucf101": list_ucf101, "folder": list_folder}


def list_clips(config: DataConfig, split: str) -> Listing:
  """The clips of a split ("train" or "val") with their class names, and what is listed but missing.

  Raises:
    ConfigError: the data set is missing, empty or contradicts itself; ValueError for another split.
  """
  if split not in ("train", "val"):
    raise ValueError(f"A split is 'train' or 'val', got {split!r}.")
  listing = _SOURCES[config.source](config, split)
  if not config.max_clips or len(listing.clips) <= config.max_clips:
    return listing
  # Round-robin over the classes, by hash inside each: a small set still has every class that fits.
  order = sorted(listing.clips, key=lambda clip: uniforms(f"{config.seed}|max|{clip.key}"))
  rank, seen = {}, collections.Counter()
  for clip in order:
    rank[clip.key] = seen[clip.label]
    seen[clip.label] += 1
  kept = {clip.key for clip in sorted(order, key=lambda clip: rank[clip.key])[: config.max_clips]}
  return dataclasses.replace(listing, clips=[clip for clip in listing.clips if clip.key in kept])
