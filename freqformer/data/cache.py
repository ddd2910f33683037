"""The latents of a data set, encoded once: `prepare` makes or finds them, `LatentCache` reads them.

A cache is a folder `<cache>/<source>-<split>-<hash12>/` of shards and a manifest of everything that
the latents depend on, with the clips left out and why. It is written under another name and renamed
when complete. A record is little-endian: int32 label, int32 clip, int32 length of the key, the key
in UTF-8, then the latent as float16 `[t, y, x, c]` in C order: 0.2 grey levels at worst.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import platform
import shutil
import socket
import struct
from collections.abc import Iterator

import grain
import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from freqformer.config import ConfigError, build
from freqformer.data.clips import list_clips
from freqformer.data.codec import CodecConfig, LatentStatistics, StatisticsAccumulator, make_codec
from freqformer.data.encode import encode_all
from freqformer.data.protocol import BrokenClip, Clip, DataConfig, Listing
from freqformer.disk import is_full
from freqformer.versions import versions

SCHEMA = 1
_HEADER = struct.Struct("<iii")
_RECORDS = "latents-00000.array_record"
PACKAGES = ("numpy", "av", "pillow", "array_record", "grain")
_REPORTED = 20  # left-out clips that the log names; the manifest has all


class LatentCache:
  """Normalised latents by number. Picklable, and safe to read from many threads.

  Attributes:
    path: its folder.
    manifest: all of manifest.json.
    latent_shape: (t, y, x, c).
    video_shape: (frames, rows, cols).
    class_names: index = label.
    statistics: of the training views, also in a validation cache.
    hash: of the protocol that it was made with.
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
      manifest = json.loads((path / "manifest.json").read_text())
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
    self.hash = found
    self.codec = make_codec(build(CodecConfig, manifest["protocol"]["codec"], "data.codec"))
    self._records = grain.sources.ArrayRecordDataSource(
      [str(path / shard["file"]) for shard in manifest["shards"]]
    )

  def __len__(self) -> int:
    return self.manifest["records"]

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns `{"latent": float32 [t, y, x, c] normalised, "label": int32, "index": int32}`."""
    if not 0 <= index < len(self):
      raise IndexError(f"The cache holds {len(self)} records, number {index} is not among them.")
    data = self._records[index]
    label, _, length = _HEADER.unpack_from(data)
    latent = np.frombuffer(data, "<f2", offset=_HEADER.size + length).astype(np.float32)
    return {
      "latent": self.statistics.normalise(latent.reshape(self.latent_shape)),
      "label": np.int32(label),
      "index": np.int32(index),
    }

  def decode(self, latents: np.ndarray) -> np.ndarray:
    """Decodes normalised latents `[b, t, y, x, c]` to uint8 video `[b, frames, rows, cols, 3]`."""
    return self.codec.decode(self.statistics.denormalise(latents), self.video_shape)


def cache_path(
  config: DataConfig, split: str, statistics: LatentStatistics | None = None
) -> pathlib.Path:
  """Returns the folder of a cache, whether it is there or not; arguments as of `prepare`."""
  name = f"{config.source}-{split}"
  if statistics is not None:
    name += f"-{hashlib.sha256(json.dumps(statistics.to_json()).encode()).hexdigest()[:6]}"
  return pathlib.Path(config.cache) / f"{name}-{config.protocol_hash[:12]}"


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
  path = cache_path(config, split)
  if statistics is not None and not _normalised_by(statistics, path):
    path = cache_path(config, split, statistics)
  if path.exists():
    cache = LatentCache(path, config.protocol_hash)
    _check_source(cache, config, split)
    train = cache_path(config, "train")
    if statistics is None and train.exists():
      wanted = LatentCache(train).statistics.to_json()
      if cache.statistics.to_json() != wanted:
        raise ConfigError(
          f"The cache {path} is normalised with other statistics than {train}: delete {path}."
        )
    return cache
  if statistics is None and split != "train":
    statistics = prepare(config, "train").statistics
  listing = list_clips(config, split)
  latent = make_codec(config.codec).latent_shape(*config.video_shape)
  # float16 latents, headers and index, and a manifest of 1 kB a clip.
  clip_bytes = config.views_of(split) * (2 * math.prod(latent) + 256) + 1024
  with _whole_folder(path, len(listing.clips) * clip_bytes + (1 << 20)) as folder:
    manifest = _encode_into(folder, config, split, listing, statistics)
    (folder / "manifest.json").write_text(json.dumps(manifest))
  return LatentCache(path)


def _normalised_by(statistics: LatentStatistics, path: pathlib.Path) -> bool:
  """Tells whether a cache is there and has these statistics."""
  return path.exists() and LatentCache(path).statistics.to_json() == statistics.to_json()


# ---- writing ----------------------------------------------------------------------------------


def _encode_into(
  folder: pathlib.Path,
  config: DataConfig,
  split: str,
  listing: Listing,
  statistics: LatentStatistics | None,
) -> dict:
  """Writes the records and returns the manifest; computes statistics where none are given."""
  codec = make_codec(config.codec)
  accumulator = StatisticsAccumulator()
  # One record per group, for random access; raw, because float16 latents hardly compress.
  writer = ArrayRecordWriter(str(folder / _RECORDS), "group_size:1,uncompressed")
  records = 0
  clips = []
  skipped = [{"key": key, "reason": reason} for key, reason in listing.missing.items()]
  encoded = contextlib.closing(encode_all(config, codec, split, listing.clips))
  bar = tqdm(total=len(listing.clips), desc=f"encoding {split}", unit="clip")
  with bar, encoded as results:
    for clip, result in results:
      bar.update()
      stat = os.stat(clip.path)
      entry = {
        "key": clip.key,
        "label": clip.label,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "fingerprint": _fingerprint(clip.path),
      }
      if isinstance(result, BrokenClip):
        skipped.append({**entry, "reason": result.reason})
        continue
      latents, drawn = result
      key = clip.key.encode()
      header = _HEADER.pack(clip.label, len(clips), len(key))
      for latent in latents:
        writer.write(header + key + latent.astype("<f2").tobytes())
        accumulator.add(latent)
        records += 1
      clips.append({**entry, **drawn})
  writer.close()
  _report(skipped, len(clips), config, split)
  size = (folder / _RECORDS).stat().st_size
  return {
    "schema": SCHEMA,
    "hash": config.protocol_hash,
    "source": config.source,
    "split": split,
    "protocol": config.protocol(),
    "latent_shape": codec.latent_shape(*config.video_shape),
    "video_shape": config.video_shape,
    "records": records,
    "shards": [{"file": _RECORDS, "records": records, "bytes": size}],
    "class_names": listing.class_names,
    "statistics": (statistics or accumulator.result(codec.joint_std)).to_json(),
    "clips": clips,
    "skipped": skipped,
    "versions": {"python": platform.python_version(), **versions(PACKAGES)},
  }


def _report(skipped: list[dict], used: int, config: DataConfig, split: str) -> None:
  """Logs the clips that were left out; raises ConfigError if there is no other."""
  if not used:
    example = f", e.g. {skipped[0]['key']}: {skipped[0]['reason']}" if skipped else ""
    raise ConfigError(
      f"None of the {len(skipped)} {split} clips under {config.root!r} can be used{example}."
    )
  if skipped:
    lines = [f"  {entry['key']}: {entry['reason']}" for entry in skipped[:_REPORTED]]
    if len(skipped) > _REPORTED:
      lines.append(f"  ... and {len(skipped) - _REPORTED} more, all in the manifest")
    total = used + len(skipped)
    text = "\n".join(lines)
    logging.warning("%d of %d %s clips could not be used:\n%s", len(skipped), total, split, text)


@contextlib.contextmanager
def _whole_folder(path: pathlib.Path, needed: int) -> Iterator[pathlib.Path]:
  """Yields a folder that becomes `path` when the block ends without an error, or else vanishes."""
  partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
  free = 0
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_dead(path.parent)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # A restarted container has the process id of the one that died.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    try:
      os.rename(partial, path)
    except OSError:
      # Where another process was faster, its cache (the same) stays.
      if not (path / "manifest.json").exists():
        raise
  except (OSError, RuntimeError) as error:
    # ArrayRecord raises a RuntimeError.
    if is_full(error):
      raise ConfigError(
        f"No space left in {str(path.parent)!r}: the cache {path.name} needs about "
        f"{needed / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB were free before; free some, or "
        "let data.cache name a folder on another disk."
      ) from error
    if isinstance(error, RuntimeError):
      raise
    raise ConfigError(
      f"data.cache {str(path.parent)!r} cannot be written ({error.strerror}): name another folder."
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _remove_dead(parent: pathlib.Path) -> None:
  """Removes the unfinished folders of this machine's processes that no longer live."""
  for folder in parent.glob(f".*.{socket.gethostname()}-*.partial"):
    pid = folder.name.removesuffix(".partial").rpartition("-")[2]
    try:
      os.kill(int(pid), 0)
    except ProcessLookupError:
      shutil.rmtree(folder, ignore_errors=True)
    except PermissionError:
      continue  # another user's process, which lives


# ---- finding ----------------------------------------------------------------------------------


def _check_source(cache: LatentCache, config: DataConfig, split: str) -> None:
  """Refuses a cache whose clips on disk are no longer those it was encoded from."""
  try:
    clips = list_clips(config, split).clips
  except ConfigError as error:
    logging.warning("Using the cache %s without its videos: %s", cache.path, error)
    return
  entries = cache.manifest["clips"] + cache.manifest["skipped"]
  known = {entry["key"]: entry for entry in entries if entry.get("bytes") is not None}
  new = [clip.key for clip in clips if clip.key not in known]
  changed = [c.key for c in clips if c.key in known and not _is_same(c, known[c.key])]
  gone = {entry["key"] for entry in cache.manifest["clips"]} - {clip.key for clip in clips}
  if gone:
    logging.warning(
      "%d clips of the cache %s are no longer on disk, e.g. %s.", len(gone), cache.path, min(gone)
    )
  if new or changed:
    raise ConfigError(
      f"Under {config.root!r} {len(new)} clips are new and {len(changed)} changed since the cache "
      f"{cache.path} was encoded (e.g. {(new + changed)[0]}): delete the caches "
      f"{cache.path.parent}/*-{config.protocol_hash[:12]} to encode again."
    )


def _is_same(clip: Clip, entry: dict) -> bool:
  """Tells whether a clip's file is the one of a manifest's entry."""
  now = os.stat(clip.path)
  if entry["label"] != clip.label or entry["bytes"] != now.st_size:
    return False
  # A copied data set has new times but the same contents.
  return entry["mtime_ns"] == now.st_mtime_ns or entry["fingerprint"] == _fingerprint(clip.path)


def _fingerprint(path: str) -> str:
  """Hashes a file's size, first and last 64 KiB: cheap enough for a whole data set."""
  size = os.path.getsize(path)
  digest = hashlib.sha256(str(size).encode())
  with open(path, "rb") as file:
    digest.update(file.read(1 << 16))
    file.seek(max(size - (1 << 16), 0))
    digest.update(file.read())
  return digest.hexdigest()[:16]
