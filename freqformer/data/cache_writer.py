"""Encodes the clips of a split into a cache, shard by shard: what is interrupted goes on.

Until all clips are in, shards and `progress.json` lie in `.<name>.partial`; then a manifest takes
the place of the latter and the folder is renamed. A lock in that folder lets one process write; the
others wait for its cache. A record is little-endian: int32 label, int32 clip, int32 length of the
key, the key in UTF-8, the latent as float16 `[t, y, x, c]` in C order (0.2 grey levels at worst),
and the embedding as float32, if clips are conditioned on one.
"""

import collections
import contextlib
import errno
import fcntl
import json
import math
import os
import pathlib
import platform
import shutil
import struct
import time
from collections.abc import Iterator
from typing import IO

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from freqformer import disk
from freqformer.config import ConfigError
from freqformer.data.clips import printable
from freqformer.data.codec import LatentStatistics, StatisticsAccumulator, make_codec
from freqformer.data.encode import encode_all
from freqformer.data.files import stat
from freqformer.data.protocol import BrokenClip, Clip, DataConfig, Listing
from freqformer.versions import versions

SCHEMA = 2
HEADER = struct.Struct("<iii")
MANIFEST = "manifest.json"
PACKAGES = ("numpy", "av", "pillow", "array_record", "grain")
# choice: what a kill may cost.
SHARD_SECONDS = 60
SHARD_BYTES = 256 << 20
_LOCK = "lock"
_PROGRESS = "progress.json"
_REPORTED = 20  # clips that the log names; the manifest has all


def write_cache(
  path: pathlib.Path,
  config: DataConfig,
  split: str,
  listing: Listing,
  statistics: LatentStatistics | None,
) -> None:
  """Makes the folder `path`, from where an earlier process stopped, unless another one makes it.

  Args:
    statistics: to normalise with; None: the codec's own, or those of these clips.

  Raises:
    ConfigError: no clip is usable, or the disk is full.
  """
  latent = make_codec(config.codec).latent_shape(*config.video_shape)
  # float16 latents, float32 embeddings, headers and index, and a manifest of 1 kB a clip.
  view_bytes = 2 * math.prod(latent) + 4 * config.embedding_size + 256
  clip_bytes = config.views_of(split) * view_bytes + 1024
  needed = len(listing.clips) * clip_bytes + (1 << 20)
  space = disk.space_for(f"the cache {path.name}", path.parent, needed)
  with space, _writable(path.parent), _alone(path) as folder:
    if folder is None:
      return
    progress = _resumed(folder, config, listing)
    have = sum(shard["bytes"] for shard in progress["shards"])
    if needed - have > disk.free_bytes(folder):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    manifest = _encode_into(folder, config, split, listing, statistics, progress)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for name in (_PROGRESS, _LOCK):
      (folder / name).unlink(missing_ok=True)
    os.rename(folder, path)


def _encode_into(
  folder: pathlib.Path,
  config: DataConfig,
  split: str,
  listing: Listing,
  statistics: LatentStatistics | None,
  progress: dict,
) -> dict:
  """Writes the records that are not there yet and returns the manifest."""
  codec = make_codec(config.codec)
  accumulator = StatisticsAccumulator()
  for latent in _stored(folder, progress, codec.latent_shape(*config.video_shape)):
    accumulator.add(latent)
  done = len(progress["done"])
  if done:
    logging.info("%s: %d of %d clips are encoded already", split, done, len(listing.clips))
  encoded = contextlib.closing(encode_all(config, codec, split, listing.clips[done:]))
  bar = tqdm(total=len(listing.clips), initial=done, desc=f"encoding {split}", unit="clip")
  with bar, encoded as results, _Shards(folder, progress) as shards:
    for clip, entry, result in results:
      bar.update()
      if isinstance(result, BrokenClip):
        shards.skip({**entry, "reason": result.reason})
        continue
      latents, drawn, embedding = result
      shards.add(clip, {**entry, **drawn}, latents, embedding)
      for latent in latents:
        accumulator.add(latent)
  missing = [{"key": key, "reason": reason} for key, reason in listing.missing.items()]
  skipped = missing + progress["skipped"]
  _report(skipped, progress["clips"], config, split)
  statistics = statistics or codec.statistics or accumulator.result(codec.joint_std)
  return {
    "schema": SCHEMA,
    "hash": config.protocol_hash,
    "source": config.source,
    "root": [config.root, os.path.realpath(config.root)],
    "split": split,
    "protocol": config.protocol(),
    "latent_shape": codec.latent_shape(*config.video_shape),
    "video_shape": config.video_shape,
    "records": sum(shard["records"] for shard in progress["shards"]),
    "shards": progress["shards"],
    "class_names": listing.class_names,
    "statistics": statistics.to_json(),
    "clips": progress["clips"],
    "skipped": skipped,
    "versions": {"python": platform.python_version(), **versions(PACKAGES)},
  }


class _Shards:
  """Writes records into shards, and what is in them into `progress.json`.

  On leaving, the last shard is closed and counts, also after an error of encoding or Ctrl-C.
  """

  def __init__(self, folder: pathlib.Path, progress: dict):
    self._folder = folder
    self._progress = progress
    self._writer = None
    self._fresh = _nothing()
    self._whole = True  # no clip is half written

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    # After an error of writing there is nothing to write any more.
    if self._whole and not isinstance(error, OSError | RuntimeError):
      self._commit()

  def add(self, clip: Clip, entry: dict, latents: np.ndarray, embedding: np.ndarray):
    """Writes the views of a clip."""
    if self._writer is None:
      self._begin()
    key = clip.key.encode(errors="surrogateescape")
    number = len(self._progress["clips"]) + len(self._fresh["clips"])
    header = HEADER.pack(clip.label, number, len(key))
    self._whole = False
    for latent in latents:
      stored = latent.astype("<f2").tobytes() + embedding.astype("<f4").tobytes()
      self._writer.write(header + key + stored)
    self._whole = True
    self._records += len(latents)
    self._bytes += latents.nbytes
    self._fresh["clips"].append(entry)
    self._done(entry)

  def skip(self, entry: dict):
    """Notes a clip that cannot be used."""
    self._fresh["skipped"].append(entry)
    self._done(entry)

  def _done(self, entry: dict):
    self._fresh["done"].append(entry["key"])
    if self._writer is None:
      return
    if time.monotonic() - self._begun > SHARD_SECONDS or self._bytes > SHARD_BYTES:
      self._commit()

  def _begin(self):
    self._name = f"latents-{len(self._progress['shards']):05d}.array_record"
    # One record per group, for random access; raw, because float16 latents hardly compress.
    path = str(self._folder / self._name)
    self._writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
    self._begun = time.monotonic()
    self._records = 0
    self._bytes = 0

  def _commit(self):
    """Closes the shard and writes down what there is."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None
      size = (self._folder / self._name).stat().st_size
      shard = {"file": self._name, "records": self._records, "bytes": size}
      self._fresh["shards"].append(shard)
    for name, entries in self._fresh.items():
      self._progress[name] += entries
    self._fresh = _nothing()
    if not self._progress["shards"]:
      return  # nothing that would be worth keeping
    following = self._folder / f"{_PROGRESS}.new"
    following.write_text(json.dumps(self._progress))
    os.replace(following, self._folder / _PROGRESS)


def _nothing() -> dict:
  """Returns lists of what is in no shard yet."""
  return {"shards": [], "clips": [], "skipped": [], "done": []}


# ---- going on ---------------------------------------------------------------------------------


def _resumed(folder: pathlib.Path, config: DataConfig, listing: Listing) -> dict:
  """Returns what an interrupted process has finished of this listing, and removes all else."""
  fresh = {"hash": config.protocol_hash, **_nothing()}
  try:
    progress = json.loads((folder / _PROGRESS).read_text())
    usable = _goes_on(folder, progress, config, listing)
  except (OSError, ValueError, KeyError, TypeError):
    usable = False
  progress = progress if usable else fresh
  kept = {_LOCK, *(shard["file"] for shard in progress["shards"])}
  if usable:
    kept.add(_PROGRESS)
  for file in folder.iterdir():
    if file.name not in kept:
      file.unlink()
  return progress


def _goes_on(folder: pathlib.Path, progress: dict, config: DataConfig, listing: Listing) -> bool:
  """Tells whether progress is of these settings and of the first of these clips, as they are."""
  whole = all((folder / s["file"]).stat().st_size == s["bytes"] for s in progress["shards"])
  begun = listing.clips[: len(progress["done"])]
  entries = {entry["key"]: entry for entry in progress["clips"] + progress["skipped"]}
  return (
    whole
    and progress["hash"] == config.protocol_hash
    and progress["done"] == [clip.key for clip in begun]
    and all(same_label(clip, entries[clip.key]) for clip in begun)
    and all(_untouched(clip, entries[clip.key]) for clip in begun)
  )


def same_label(clip: Clip, entry: dict) -> bool:
  """Tells whether a clip has the class and the caption of its entry."""
  return entry["label"] == clip.label and entry.get("caption", "") == clip.caption


def _untouched(clip: Clip, entry: dict) -> bool:
  """Tells whether a file has the size and time of its entry, or is still not to be read."""
  try:
    now = stat(*clip.files)
  except OSError:
    return "bytes" not in entry
  return (entry.get("bytes"), entry.get("mtime_ns")) == now


def _stored(
  folder: pathlib.Path, progress: dict, shape: tuple[int, int, int, int]
) -> Iterator[np.ndarray]:
  """Yields the latents of finished shards, float16."""
  for shard in progress["shards"]:
    reader = ArrayRecordReader(str(folder / shard["file"]))
    for index in range(shard["records"]):
      yield unpack(reader.read([index])[0], shape)[1]
    reader.close()


def unpack(record: bytes, shape: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns label and latent, float16 `[t, y, x, c]`, of a record.

  The label is an embedding, float32 `[e]`, or a class, int32.
  """
  label, _, length = HEADER.unpack_from(record)
  start = HEADER.size + length
  latent = np.frombuffer(record, "<f2", math.prod(shape), start).reshape(shape)
  embedding = np.frombuffer(record, "<f4", offset=start + latent.nbytes)
  return embedding if embedding.size else np.int32(label), latent


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[pathlib.Path | None]:
  """Yields the folder of the unfinished cache, which is ours; None if another process finished it.

  Waits for a process that writes it. The lock goes with the process, however that ends.
  """
  folder = path.with_name(f".{path.name}.partial")
  while not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    try:
      lock = open(folder / _LOCK, "a")
    except FileNotFoundError:
      continue  # it has just been renamed
    with lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        logging.info("another process encodes %s: waiting for it", path.name)
        fcntl.flock(lock, fcntl.LOCK_EX)
      if not _is_there(folder / _LOCK, lock):
        continue  # who had it has renamed or removed the folder
      try:
        yield folder
      finally:
        if folder.exists() and not (folder / _PROGRESS).exists():
          shutil.rmtree(folder)
      return
  yield None


def _is_there(path: pathlib.Path, opened: IO) -> bool:
  """Tells whether an open file is still the one of that name."""
  try:
    return os.path.samestat(os.stat(path), os.fstat(opened.fileno()))
  except FileNotFoundError:
    return False


@contextlib.contextmanager
def _writable(folder: pathlib.Path) -> Iterator[None]:
  """Makes a folder; one that cannot be written, but for a full disk, is one sentence."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    yield
  except OSError as error:
    if disk.is_full(error):
      raise
    raise ConfigError(
      f"data.cache {str(folder)!r} cannot be written ({error.strerror}): name another folder."
    ) from error


def _report(skipped: list[dict], used: list[dict], config: DataConfig, split: str) -> None:
  """Logs clips that were left out and odd ones; raises ConfigError if none could be used."""
  if not used:
    example = f", e.g. {skipped[0]['key']}: {skipped[0]['reason']}" if skipped else ""
    raise ConfigError(
      f"None of the {len(skipped)} {split} clips under {config.root!r} can be used{example}."
    )
  total = len(used) + len(skipped)
  if skipped:
    reasons = [f"{entry['key']}: {entry['reason']}" for entry in skipped]
    _warn(f"{len(skipped)} of {total} {split} clips could not be used", reasons)
  odd = collections.defaultdict(list)
  for entry in used:
    for note in entry["notes"]:
      odd[note.partition(":")[0]].append(f"{entry['key']}: {note}")
  for kind, entries in odd.items():
    _warn(f"{len(entries)} of {total} {split} clips are used, but {kind}", entries)


def _warn(head: str, entries: list[str]) -> None:
  """Logs a head and its first entries."""
  lines = [f"  {printable(entry)}" for entry in entries[:_REPORTED]]
  if len(entries) > _REPORTED:
    lines.append(f"  ... and {len(entries) - _REPORTED} more, all in the manifest")
  logging.warning("%s:\n%s", head, "\n".join(lines))
