"""The latents of a data set, encoded once: `prepare` makes or finds them, `LatentCache` reads them.

A cache is a folder `<cache>/<source>-<split>-<hash12>/` of shards and a manifest of everything that
the latents depend on, with the clips left out and why (`cache_writer.py`). The hash is of the
settings, not of the clips' folder: a data set that moved is known by its files, and another one of
the same settings gets a folder with a number behind it.
"""

import hashlib
import itertools
import json
import os
import pathlib
import statistics as averages

import grain
import numpy as np
from absl import logging

from freqformer.config import ConfigError, build
from freqformer.data.cache_writer import MANIFEST, SCHEMA, same_label, unpack, write_cache
from freqformer.data.clips import list_clips
from freqformer.data.codec import CodecConfig, LatentStatistics, make_codec
from freqformer.data.files import fingerprint, stat
from freqformer.data.protocol import Clip, DataConfig, Listing


class LatentCache:
  """Normalised latents by number. Picklable, and safe to read from many threads.

  Attributes:
    path: its folder.
    manifest: all of manifest.json.
    latent_shape: (t, y, x, c).
    video_shape: (frames, rows, cols).
    class_names: index = label.
    class_counts: clips of each class.
    fps: of decoded videos; those of most clips, if they differ.
    statistics: of the training views, also in a validation cache.
    hash: of the settings and the clips that it was made with.
  """

  reference = None  # the exact posterior mean of videos is not known
  target = None

  def __init__(self, path: pathlib.Path, protocol: str | None = None):
    """Opens a cache.

    Args:
      protocol: the `DataConfig.protocol_hash` that it must have been made with.

    Raises:
      ConfigError: it is not whole, or made with another protocol or by other code.
    """
    try:
      manifest = json.loads((path / MANIFEST).read_text())
      sizes = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
      schema = manifest["schema"]
      found = manifest["hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ConfigError(
        f"{path} is not a complete cache, its manifest.json cannot be read: delete the folder."
      ) from error
    if schema != SCHEMA:
      raise ConfigError(
        f"The cache {path} has schema {schema}, this code reads {SCHEMA}: delete the folder."
      )
    if protocol not in (None, found):
      raise ConfigError(
        f"The cache {path} was made with protocol {found[:12]}, but {protocol[:12]} is wanted: "
        "delete the folder, or name another data.cache."
      )
    for name, size in sizes.items():
      file = path / name
      if not file.is_file() or file.stat().st_size != size:
        raise ConfigError(
          f"The cache {path} is damaged: {name} is missing or not {size} bytes; delete the folder."
        )
    self.path = path
    self.manifest = manifest
    self.latent_shape = tuple(manifest["latent_shape"])
    self.video_shape = tuple(manifest["video_shape"])
    self.class_names = list(manifest["class_names"])
    self.statistics = LatentStatistics.from_json(manifest["statistics"])
    clips = manifest["clips"]
    names = ("key", "label", "fingerprint", "caption")
    known = [[clip[name] for name in names if name in clip] for clip in clips]
    self.hash = hashlib.sha256(json.dumps([found, known]).encode()).hexdigest()
    self.class_counts = np.bincount(
      [clip["label"] for clip in clips], minlength=len(self.class_names)
    ).tolist()
    self.fps = averages.median(view["fps"] for clip in clips for view in clip["views"])
    self.codec = make_codec(build(CodecConfig, manifest["protocol"]["codec"], "data.codec"))
    self._records = grain.sources.ArrayRecordDataSource(
      [str(path / shard["file"]) for shard in manifest["shards"]]
    )

  def __len__(self) -> int:
    return self.manifest["records"]

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns a record: `latent`, normalised float32 `[t, y, x, c]`, `label`, `index`."""
    if not 0 <= index < len(self):
      raise IndexError(f"The cache holds {len(self)} records, number {index} is not among them.")
    try:
      label, latent = unpack(self._records[index], self.latent_shape)
    except (RuntimeError, ValueError) as error:
      raise ConfigError(
        f"The cache {self.path} is damaged: record {index} cannot be read; delete the folder."
      ) from error
    return {
      "latent": self.statistics.normalise(latent.astype(np.float32)),
      "label": label,
      "index": np.int32(index),
    }

  def decode(self, latents: np.ndarray) -> np.ndarray:
    """Decodes normalised latents `[b, t, y, x, c]` to uint8 video `[b, frames, rows, cols, 3]`."""
    return self.codec.decode(self.statistics.denormalise(latents), self.video_shape)


def cache_path(
  config: DataConfig, split: str, statistics: LatentStatistics | None = None, number: int = 1
) -> pathlib.Path:
  """Returns the folder of a cache, whether it is there or not.

  Args:
    statistics: as of `prepare`.
    number: 1, or of a further set of clips with the same settings.
  """
  name = f"{config.source}-{split}"
  if statistics is not None:
    name += f"-{hashlib.sha256(json.dumps(statistics.to_json()).encode()).hexdigest()[:6]}"
  name += f"-{config.protocol_hash[:12]}"
  return pathlib.Path(config.cache) / (name if number == 1 else f"{name}-{number}")


def prepare(
  config: DataConfig, split: str, statistics: LatentStatistics | None = None
) -> LatentCache:
  """Returns the cache of a split of `list_clips`, encoded first if it is not there yet.

  A cache whose videos are gone can still be used; one whose videos changed is refused.

  Args:
    statistics: to normalise with, of a model that was trained on other clips; a cache with others
      is left alone. None: those of "train", which is prepared first.

  Raises:
    ConfigError: no clip is usable, the cache contradicts the clips, or the disk is full.
  """
  try:
    listing = list_clips(config, split)
  except ConfigError as error:
    listing = None
    if not is_cached(config, split, statistics):
      raise
    logging.warning("Using the cache without its videos: %s", error)
  if statistics is not None:
    own = _find(config, split, None, listing)
    if isinstance(own, LatentCache) and own.statistics.to_json() == statistics.to_json():
      return own
  found = _find(config, split, statistics, listing)
  train = None
  if statistics is None and split != "train":
    train = prepare(config, "train")
  if isinstance(found, pathlib.Path):
    write_cache(found, config, split, listing, train.statistics if train else statistics)
    return LatentCache(found, config.protocol_hash)
  if train and found.statistics.to_json() != train.statistics.to_json():
    raise ConfigError(
      f"The cache {found.path} is normalised with other statistics than {train.path}: delete "
      f"{found.path}."
    )
  return found


def is_cached(config: DataConfig, split: str, statistics: LatentStatistics | None = None) -> bool:
  """Tells whether clips that are no longer there, or cannot be listed, have a cache."""
  return isinstance(_find(config, split, statistics, None), LatentCache)


def _find(
  config: DataConfig, split: str, statistics: LatentStatistics | None, listing: Listing | None
) -> LatentCache | pathlib.Path:
  """Returns the cache of these clips, or the folder that it should get.

  Raises:
    ConfigError: clips of the cache of this very folder are new or changed.
  """
  # Without videos a cache is told by its folder's name, also where all has moved together.
  root = (config.root, os.path.realpath(config.root))
  for number in itertools.count(1):
    path = cache_path(config, split, statistics, number)
    if not path.exists():
      return path
    cache = LatentCache(path, config.protocol_hash)
    own = tuple(cache.manifest["root"])
    if listing is None:
      if own[0] == root[0] or own[1] == root[1]:
        return cache
      continue
    here = own[1] == root[1]
    new, changed, gone = _differences(cache, listing)
    if here and (new or changed):
      raise ConfigError(
        f"Under {config.root!r} {len(new)} clips are new and {len(changed)} changed since the "
        f"cache {path} was encoded (e.g. {(new + changed)[0]}): delete the caches "
        f"{path.parent}/*-{config.protocol_hash[:12]} to encode again."
      )
    if here and gone:
      logging.warning(
        "%d clips of the cache %s are no longer on disk, e.g. %s.", len(gone), path, min(gone)
      )
    if here or not (new or changed or gone):
      return cache
  raise AssertionError("unreachable")


def _differences(cache: LatentCache, listing: Listing) -> tuple[list[str], list[str], set[str]]:
  """Returns keys of clips that a cache does not know, of changed ones, and of those now gone."""
  entries = cache.manifest["clips"] + cache.manifest["skipped"]
  known = {entry["key"]: entry for entry in entries if "label" in entry}
  new = [clip.key for clip in listing.clips if clip.key not in known]
  changed = [
    clip.key for clip in listing.clips if clip.key in known and not _is_same(clip, known[clip.key])
  ]
  gone = {entry["key"] for entry in cache.manifest["clips"]} - {clip.key for clip in listing.clips}
  return new, changed, gone


def _is_same(clip: Clip, entry: dict) -> bool:
  """Tells whether a clip's file is the one of a manifest's entry, or still not to be read."""
  try:
    size, time = stat(*clip.files)
  except OSError:
    return "bytes" not in entry
  if not same_label(clip, entry) or entry.get("bytes") != size:
    return False
  # A copied data set has new times but the same contents.
  return entry["mtime_ns"] == time or entry["fingerprint"] == fingerprint(*clip.files)
