"""From clips to latents, side by side in threads, in order; and the file of records they go to.

Threads, not processes: PyAV, Pillow and NumPy release the GIL in decoding, resizing and matmuls. On a busy 2-core machine 2
threads did 20 clips of 320x240 a second and 2 spawned processes, their start included, 17; many cores were not measured.
"""

import collections
import concurrent.futures
import dataclasses
import errno
import hashlib
import os
import pathlib
import struct
from collections.abc import Iterator

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from freqformer.data.codec import Codec, psnr
from freqformer.data.decode import BrokenClip, VideoFile, crop_resize
from freqformer.data.protocol import Clip, DataConfig, TooShort, View, draw_view

SHARD_BYTES = 64 << 20
# A record: int32 label, int32 clip (its place in the manifest's list), int32 length of the key, the key in UTF-8, then the
# latent as float16 `[t, y, x, c]` in C order. Little-endian throughout. A float16 keeps 11 bits: 0.2 grey levels at worst.
_HEADER = struct.Struct("<iii")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class EncodedClip:
  """The views of one clip.

  Attributes:
    latents: float16 `[views, t, y, x, c]`, un-normalised.
    length, size: frames of the clip and their (rows, cols).
    psnr: of the first view through the codec in dB, where it was asked for.
  """

  latents: np.ndarray
  views: list[View]
  length: int
  size: tuple[int, int]
  psnr: float | None = None


def encode_clip(
  config: DataConfig, codec: Codec, split: str, clip: Clip, measure: bool = False
) -> EncodedClip:
  """Draws, decodes, crops, mirrors and encodes the views of a clip.

  Raises:
    BrokenClip: it cannot be decoded, or `config.short` leaves it out.
  """
  with VideoFile(clip.path, clip.key) as video:
    views, frames = _read_views(config, split, clip, video)
    pixels = np.stack([_pixels(view, config, video.length, frames) for view in views])
    latents = codec.encode(pixels).astype(np.float16)
    if not np.isfinite(latents).all():
      raise ValueError(
        f"The codec gives latents beyond float16 (65504) for {clip.key}; scale them inside the codec."
      )
    quality = psnr(pixels[:1], codec.decode(latents[:1], config.video_shape)) if measure else None
    return EncodedClip(latents, views, video.length, video.size, quality)


def _read_views(config, split, clip, video):
  """The views and their frames by index; drawn again when fewer frames decode than the container promised."""
  count = config.views if split == "train" else 1
  for _ in range(3):
    try:
      views = [
        draw_view(config, split, clip.key, i, video.length, video.size) for i in range(count)
      ]
    except TooShort as error:
      raise BrokenClip(clip.key, str(error)) from error
    wanted = sorted({i for view in views for i in view.indices(config.frames, video.length)})
    frames = video.read(wanted)
    if frames is not None:
      return views, dict(zip(wanted, frames, strict=True))
  raise BrokenClip(clip.key, "it decodes to another number of frames each time")


def _pixels(view, config, length, frames):
  """uint8 `[frames, rows, cols, 3]` of one view. Pixels are mirrored: mirrored latents are not those of a mirrored video."""
  box = np.stack(
    [
      crop_resize(frames[i], view.box, config.resolution)
      for i in view.indices(config.frames, length)
    ]
  )
  return box[:, :, ::-1] if view.flip else box


def encode_all(
  config: DataConfig, codec: Codec, split: str, clips: list[Clip], measured: int = 32
) -> Iterator[tuple[Clip, EncodedClip | BrokenClip]]:
  """Every clip in order with its latents, or with the reason why not; PSNR for `measured` clips spread over the list."""
  workers = config.workers or _cpus()
  measured = {i * len(clips) // measured for i in range(measured)}

  def one(index):
    try:
      return clips[index], encode_clip(config, codec, split, clips[index], index in measured)
    except BrokenClip as error:
      return clips[index], error

  pool = concurrent.futures.ThreadPoolExecutor(workers)
  try:
    # A bounded window: finished clips wait in memory for a slow one, but not the whole data set.
    waiting = collections.deque()
    for index in range(len(clips)):
      waiting.append(pool.submit(one, index))
      if len(waiting) > 3 * workers:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def _cpus() -> int:
  """Those this process may use; a container often has fewer than the machine."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pack(latent: np.ndarray, label: int, clip: int, key: str) -> bytes:
  """One record; see `_HEADER`."""
  name = key.encode()
  return _HEADER.pack(label, clip, len(name)) + name + latent.astype("<f2").tobytes()


def unpack(record: bytes, shape: tuple[int, ...]) -> tuple[np.ndarray, int, int, str]:
  """(latent float32 `shape`, label, clip, key) of a record."""
  label, clip, length = _HEADER.unpack_from(record)
  start = _HEADER.size + length
  latent = np.frombuffer(record, "<f2", offset=start).reshape(shape).astype(np.float32)
  return latent, label, clip, record[_HEADER.size : start].decode()


class ShardWriter:
  """ArrayRecord files `latents-00000.array_record`, ... in a folder, each of about `SHARD_BYTES`.

  Raises OSError when the disk is full, also where the library itself says so only in words, and only on closing a file.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder, self.shards, self._writer = folder, [], None

  def write(self, record: bytes) -> None:
    """Appends one record."""
    if self._writer is None:
      self.shards.append({"file": f"latents-{len(self.shards):05d}.array_record", "records": 0})
      self._size = 0
      # One record per group, for random access; raw, because float16 latents hardly compress.
      path = str(self.folder / self.shards[-1]["file"])
      self._writer = self._guard(lambda: ArrayRecordWriter(path, "group_size:1,uncompressed"))
    self._guard(lambda: self._writer.write(record))
    self.shards[-1]["records"] += 1
    self._size += len(record)
    if self._size >= SHARD_BYTES:
      self.close()

  def close(self) -> None:
    """Ends the current file and notes its size on disk."""
    if self._writer is not None:
      writer, self._writer = self._writer, None
      self._guard(writer.close)
      self.shards[-1]["bytes"] = (self.folder / self.shards[-1]["file"]).stat().st_size

  def _guard(self, call):
    try:
      return call()
    except RuntimeError as error:
      code = next((c for c in _DISK_FULL if os.strerror(c) in str(error)), None)
      if code is None:
        raise
      raise OSError(code, os.strerror(code), str(self.folder)) from error


def is_disk_full(error: OSError) -> bool:
  """No space, no quota, or a file larger than the system allows."""
  return error.errno in _DISK_FULL


def fingerprint(path: str | pathlib.Path) -> str:
  """A short hash of a file's size, first and last 64 KiB: enough to notice another file, cheap for a whole data set."""
  size = os.path.getsize(path)
  digest = hashlib.sha256(str(size).encode())
  with open(path, "rb") as file:
    digest.update(file.read(1 << 16))
    file.seek(max(size - (1 << 16), 0))
    digest.update(file.read())
  return digest.hexdigest()[:16]
