"""The list of a split's clips, from any source."""

import collections
import dataclasses

from freqformer.data.folder import list_folder
from freqformer.data.protocol import DataConfig, Listing, uniforms
from freqformer.data.ucf101 import list_ucf101


def list_clips(config: DataConfig, split: str) -> Listing:
  """Lists the clips of a split ("train" or "val"), class names, and clips listed but missing.

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
