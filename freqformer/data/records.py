"""Latents as records in ArrayRecord files, the shards of a cache.

A record is little-endian: int32 label, int32 clip, int32 length of the key, the key in UTF-8, then
the latent as float16 `[t, y, x, c]` in C order. A float16 keeps 11 bits: 0.2 grey levels at worst.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import struct

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

SHARD_BYTES = 64 << 20
_HEADER = struct.Struct("<iii")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Record:
  """One view of one clip.

  Attributes:
    latent: `[t, y, x, c]`, un-normalised; float32 when read.
    label: class of the clip.
    clip: place of the clip in the manifest's list.
    key: name of the clip.
  """

  latent: np.ndarray
  label: int
  clip: int
  key: str

  def to_bytes(self) -> bytes:
    """Returns the record as it is stored."""
    key = self.key.encode()
    latent = self.latent.astype("<f2").tobytes()
    return _HEADER.pack(self.label, self.clip, len(key)) + key + latent

  @classmethod
  def from_bytes(cls, data: bytes, shape: tuple[int, ...]) -> "Record":
    """Inverts `to_bytes`; `shape` is the latent's."""
    label, clip, length = _HEADER.unpack_from(data)
    start = _HEADER.size + length
    latent = np.frombuffer(data, "<f2", offset=start).reshape(shape).astype(np.float32)
    return cls(latent, label, clip, data[_HEADER.size : start].decode())


class ShardWriter:
  """Writes `latents-00000.array_record`, ... into a folder, each of about `SHARD_BYTES`.

  A full disk is an OSError, even where the library only says so in words and on closing a file.

  Attributes:
    shards: file name, number of records and bytes on disk of each file that is complete.
  """

  def __init__(self, folder: pathlib.Path):
    self.shards: list[dict] = []
    self._folder = folder
    self._writer = None

  def write(self, record: Record) -> None:
    """Appends one record."""
    data = record.to_bytes()
    with self._disk_errors():
      if self._writer is None:
        self._file = f"latents-{len(self.shards):05d}.array_record"
        self._count = 0
        self._bytes = 0
        # One record per group, for random access; raw, because float16 latents hardly compress.
        path = str(self._folder / self._file)
        self._writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
      self._writer.write(data)
    self._count += 1
    self._bytes += len(data)
    if self._bytes >= SHARD_BYTES:
      self.close()

  def close(self) -> None:
    """Completes the current file."""
    if self._writer is None:
      return
    writer = self._writer
    self._writer = None
    with self._disk_errors():
      writer.close()
    size = (self._folder / self._file).stat().st_size
    self.shards.append({"file": self._file, "records": self._count, "bytes": size})

  @contextlib.contextmanager
  def _disk_errors(self):
    try:
      yield
    except RuntimeError as error:
      code = next((c for c in _DISK_FULL if os.strerror(c) in str(error)), None)
      if code is None:
        raise
      raise OSError(code, os.strerror(code), str(self._folder)) from error


def is_disk_full(error: OSError) -> bool:
  """Returns whether there was no space, no quota, or a file larger than the system allows."""
  return error.errno in _DISK_FULL
