"""Writes a latent cache, whole or not at all."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import socket

import numpy as np
from absl import logging
from tqdm import tqdm

from freqformer.config import ConfigError
from freqformer.data.codec import LatentStatistics, StatisticsAccumulator, make_codec
from freqformer.data.decode import BrokenClip
from freqformer.data.encode import ShardWriter, encode_all, fingerprint, is_disk_full, pack
from freqformer.data.protocol import Clip, DataConfig, Listing

SCHEMA = 1
REPORTED = 20  # Names in the log; the manifest has all.
_LIBRARIES = ("numpy", "av", "pillow", "array_record", "grain")


class CacheError(ConfigError):
  """A cache that cannot be written or used; the message says where and what to do."""


def write_cache(
  path: pathlib.Path,
  config: DataConfig,
  split: str,
  listing: Listing,
  statistics: LatentStatistics | None,
  progress: bool,
) -> None:
  """Encodes all clips of a listing into `path`, which appears only when it is complete.

  Args:
    statistics: those to store; None computes them from what is encoded (the training split).

  Raises:
    ConfigError: no clip is usable.
    CacheError: the folder cannot be written, or the disk is full.
  """
  partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
  needed, free = _bytes_needed(config, split, len(listing.clips)), None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_dead(path.parent)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
      raise CacheError(_no_space(path, needed, free))
    shutil.rmtree(
      partial, ignore_errors=True
    )  # A restarted container has the process id of the one that died.
    partial.mkdir()
    manifest = _encode_into(partial, config, split, listing, statistics, progress)
    # The manifest comes last and in one piece; without it a folder is no cache.
    (partial / "manifest.json").write_text(json.dumps(manifest))
    _publish(partial, path)
  except OSError as error:
    if is_disk_full(error):
      raise CacheError(_no_space(path, needed, free)) from error
    raise CacheError(
      f"data.cache {str(path.parent)!r} cannot be written ({error.strerror}): name another folder."
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _publish(partial, path):
  """Renames; where another process was faster, its cache (the same) stays."""
  try:
    os.rename(partial, path)
  except OSError:
    if not (path / "manifest.json").exists():
      raise


def _encode_into(folder, config, split, listing, statistics, progress) -> dict:
  """Writes the shards; returns the manifest."""
  codec = make_codec(config.codec)
  shape = codec.latent_shape(*config.video_shape)
  accumulator = StatisticsAccumulator(shape)
  labels = {clip.key: clip.label for clip in listing.clips}
  clips, quality = [], []
  skipped = [
    {"key": key, "reason": reason, "label": None, "bytes": None}
    for key, reason in listing.missing.items()
  ]
  writer = ShardWriter(folder)
  encoded = contextlib.closing(encode_all(config, codec, split, listing.clips))
  bar = tqdm(total=len(listing.clips), desc=f"encoding {split}", unit="clip", disable=not progress)
  with bar, encoded as results:
    for clip, result in results:
      bar.update()
      entry = {"key": clip.key, "label": labels[clip.key], **_identity(clip)}
      if isinstance(result, BrokenClip):
        skipped.append({**entry, "reason": result.reason})
        continue
      for latent in result.latents:
        writer.write(pack(latent, clip.label, len(clips), clip.key))
        accumulator.add(latent)
      views = [dataclasses.asdict(view) for view in result.views]
      clips.append({**entry, "frames": result.length, "size": result.size, "views": views})
      if result.psnr is not None:
        quality.append(result.psnr)
  writer.close()
  _report(skipped, len(clips), config, split)
  return {
    "schema": SCHEMA,
    "hash": config.protocol_hash,
    "source": config.source,
    "split": split,
    "protocol": config.protocol(),
    "latent_shape": shape,
    "video_shape": config.video_shape,
    "records": accumulator.count,
    "shards": writer.shards,
    "class_names": listing.class_names,
    "statistics": (statistics or accumulator.result()).to_json(),
    "psnr": {"mean": float(np.mean(quality)), "min": min(quality), "views": len(quality)}
    if quality
    else None,
    "clips": clips,
    "skipped": skipped,
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in _LIBRARIES},
    },
  }


def _identity(clip: Clip) -> dict:
  """What tells whether the file is still the same."""
  stat = os.stat(clip.path)
  return {
    "bytes": stat.st_size,
    "mtime_ns": stat.st_mtime_ns,
    "fingerprint": fingerprint(clip.path),
  }


def _report(skipped: list[dict], used: int, config: DataConfig, split: str) -> None:
  """Names and counts what was left out; no clip at all is an error."""
  if not used:
    example = f", e.g. {skipped[0]['key']}: {skipped[0]['reason']}" if skipped else ""
    raise ConfigError(
      f"None of the {len(skipped)} {split} clips under {config.root!r} can be used{example}."
    )
  if skipped:
    lines = [f"  {entry['key']}: {entry['reason']}" for entry in skipped[:REPORTED]]
    if len(skipped) > REPORTED:
      lines.append(f"  ... and {len(skipped) - REPORTED} more, all in the manifest")
    text = "\n".join(lines)
    logging.warning(
      "%d of %d %s clips could not be used:\n%s", len(skipped), used + len(skipped), split, text
    )


def _bytes_needed(config, split, clips) -> int:
  """Size of the shards: float16 latents, headers and index, and about a kilobyte per clip of the manifest."""
  shape = make_codec(config.codec).latent_shape(*config.video_shape)
  views = config.views if split == "train" else 1
  return clips * (views * (2 * int(np.prod(shape)) + 256) + 1024) + (1 << 20)


def _no_space(path, needed, free) -> str:
  had = "" if free is None else f" and {_size(free)} were free before"
  return (
    f"No space left in {str(path.parent)!r}: the cache {path.name} needs about {_size(needed)}{had};"
    " free some, or let data.cache name a folder on another disk."
  )


def _size(count: int) -> str:
  return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _remove_dead(parent: pathlib.Path) -> None:
  """Removes what processes of this machine that no longer live left half-written."""
  mark = f".{socket.gethostname()}-"
  for folder in parent.glob(f".*{mark}*.partial"):
    pid = folder.name.removesuffix(".partial").rpartition(mark)[2]
    if pid.isdigit() and not _alive(int(pid)):
      shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True
