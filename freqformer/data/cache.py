"""The latents of a data set, encoded once. A folder `<cache>/<source>-<split>-<hash12>/` of ArrayRecord shards and a manifest.

The manifest says everything that the latents depend on: protocol and its hash, codec, statistics, each clip with its
fingerprint and views, what was left out and why, library versions. A cache comes into being whole: it is written under another
name and renamed when complete. Another protocol has another hash, so it makes another cache.
"""

import json
import operator
import os
import pathlib

import grain
import numpy as np
from absl import logging

from freqformer.config import ConfigError, build
from freqformer.data.clips import list_clips
from freqformer.data.codec import CodecConfig, LatentStatistics, make_codec
from freqformer.data.encode import fingerprint, unpack
from freqformer.data.protocol import DataConfig, Listing
from freqformer.data.write import SCHEMA, CacheError, write_cache


class LatentCache:
  """Normalised latents by number. Picklable, and safe to read from many threads.

  Attributes:
    path: its folder.
    manifest: all of manifest.json.
    latent_shape: (t, y, x, c). video_shape: (frames, rows, cols).
    class_names: index = label.
    statistics: of the training views, also in a validation cache.
    codec: made from the manifest's config.
  """

  def __init__(self, path: pathlib.Path, manifest: dict):
    """Use `LatentCache.open`."""
    self.path, self.manifest = path, manifest
    self.latent_shape, self.video_shape = (
      tuple(manifest["latent_shape"]),
      tuple(manifest["video_shape"]),
    )
    self.class_names = list(manifest["class_names"])
    self.statistics = LatentStatistics.from_json(manifest["statistics"])
    self.codec = make_codec(build(CodecConfig, manifest["protocol"]["codec"], "data.codec"))
    self._records = grain.sources.ArrayRecordDataSource(
      [str(path / shard["file"]) for shard in manifest["shards"]]
    )

  @classmethod
  def open(cls, path: str | os.PathLike, expect: str | None = None) -> "LatentCache":
    """Opens a complete cache; `expect` is the protocol hash that it must have been made with.

    Raises:
      CacheError: it is not there, not complete, or made with another protocol.
    """
    path = pathlib.Path(path)
    try:
      manifest = json.loads((path / "manifest.json").read_text())
      shards = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
      schema, found = manifest["schema"], manifest["hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise CacheError(
        f"{path} is not a complete cache, its manifest.json cannot be read: delete the folder."
      ) from error
    if schema != SCHEMA:
      raise CacheError(
        f"The cache {path} has schema {schema}, this code reads {SCHEMA}: delete the folder to encode again."
      )
    if expect is not None and found != expect:
      raise CacheError(
        f"The cache {path} was made with protocol {found[:12]}, but {expect[:12]} is wanted: delete the folder, or name"
        " another data.cache."
      )
    for file, size in shards.items():
      if not (path / file).is_file() or (path / file).stat().st_size != size:
        raise CacheError(
          f"The cache {path} is damaged: {file} is missing or not {size} bytes; delete the folder."
        )
    return cls(path, manifest)

  def __len__(self) -> int:
    return self.manifest["records"]

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """`{"latent": float32 [t, y, x, c] normalised, "label": int32, "index": int32}`."""
    index = operator.index(index)
    if not -len(self) <= index < len(self):
      raise IndexError(f"The cache holds {len(self)} records, number {index} is not among them.")
    index %= len(self)
    latent, label, _, _ = unpack(self._records[index], self.latent_shape)
    return {
      "latent": self.statistics.normalise(latent),
      "label": np.int32(label),
      "index": np.int32(index),
    }

  def clip(self, index: int) -> dict:
    """The manifest's entry of the clip that a record shows: key, label, views, ..."""
    return self.manifest["clips"][
      unpack(self._records[operator.index(index)], self.latent_shape)[2]
    ]

  def denormalise(self, latents: np.ndarray) -> np.ndarray:
    """Normalised `[..., c]` to what the codec decodes."""
    return self.statistics.denormalise(latents)

  def decode(self, latents: np.ndarray) -> np.ndarray:
    """Normalised latents `[b, t, y, x, c]` to uint8 video `[b, frames, rows, cols, 3]`."""
    return self.codec.decode(self.denormalise(latents), self.video_shape)

  def __repr__(self):
    return f"LatentCache({str(self.path)!r}, {len(self)} records {self.latent_shape}, {len(self.class_names)} classes)"


def cache_path(config: DataConfig, split: str) -> pathlib.Path:
  """Where the cache of a split lies, or will."""
  return pathlib.Path(config.cache) / f"{config.source}-{split}-{config.protocol_hash[:12]}"


def prepare(config: DataConfig, split: str, progress: bool = True) -> LatentCache:
  """The cache of a split ("train" or "val"), encoded first if it is not there yet.

  "val" is normalised with the statistics of "train", which is prepared first. A cache whose videos are gone can still be
  used; one whose videos changed is refused.

  Raises:
    ConfigError: the data set is missing, or no clip of it is usable.
    CacheError: (a ConfigError) the cache contradicts the request, or the disk is full.
  """
  path = cache_path(config, split)
  if path.exists():
    cache = LatentCache.open(path, config.protocol_hash)
    _check_source(cache, config, split)
    if split != "train":
      _check_statistics(cache, cache_path(config, "train"))
    return cache
  statistics = None if split == "train" else prepare(config, "train", progress).statistics
  write_cache(path, config, split, list_clips(config, split), statistics, progress)
  return LatentCache.open(path, config.protocol_hash)


def _check_statistics(cache: LatentCache, train: pathlib.Path) -> None:
  """Refuses a validation cache that outlived the training cache whose statistics it has."""
  if (
    train.exists()
    and LatentCache.open(train).manifest["statistics"] != cache.manifest["statistics"]
  ):
    raise CacheError(
      f"The cache {cache.path} is normalised with other statistics than {train}: delete {cache.path}."
    )


def _check_source(cache: LatentCache, config: DataConfig, split: str) -> None:
  """Refuses a cache whose clips on disk are no longer those it was encoded from."""
  try:
    listing = list_clips(config, split)
  except ConfigError as error:
    logging.warning("Using the cache %s without its videos: %s", cache.path, error)
    return
  new, changed, gone = _compare(listing, cache.manifest)
  if gone:
    logging.warning(
      "%d clips of the cache %s are no longer on disk, e.g. %s.", len(gone), cache.path, gone[0]
    )
  if new or changed:
    raise CacheError(
      f"Under {config.root!r} {len(new)} clips are new and {len(changed)} changed since the cache {cache.path} was encoded"
      f" (e.g. {(new + changed)[0]}): delete the caches {cache.path.parent}/*-{config.protocol_hash[:12]} to encode again."
    )


def _compare(listing: Listing, manifest: dict) -> tuple[list[str], list[str], list[str]]:
  """Keys of clips that are (new, changed, gone) since the manifest was written."""
  known = {entry["key"]: entry for entry in manifest["clips"] + manifest["skipped"]}
  new, changed = [], []
  for clip in listing.clips:
    entry, now = known.get(clip.key), os.stat(clip.path)
    if entry is None or entry["bytes"] is None:
      new.append(clip.key)
    elif entry["label"] != clip.label or entry["bytes"] != now.st_size:
      changed.append(clip.key)
    # A copied data set has new times but the same contents.
    elif entry["mtime_ns"] != now.st_mtime_ns and entry["fingerprint"] != fingerprint(clip.path):
      changed.append(clip.key)
  present = {clip.key for clip in listing.clips}
  return new, changed, [entry["key"] for entry in manifest["clips"] if entry["key"] not in present]


__all__ = ["CacheError", "LatentCache", "cache_path", "prepare"]
