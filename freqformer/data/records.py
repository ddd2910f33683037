"""Latents as records in ArrayRecord files, the shards of a cache.

A record is little-endian: int32 label, int32 clip, int32 length of the key, the key in UTF-8, then
the latent as float16 `[t, y, x, c]` in C order. A float16 keeps 11 bits: 0.2 grey levels at worst.
"""

import pathlib
import struct

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

SHARD_BYTES = 64 << 20
_HEADER = struct.Struct("<iii")


def to_record(latent: np.ndarray, label: int, clip: int, key: str) -> bytes:
  """Returns a record of one un-normalised latent, of the clip at place `clip` in the manifest."""
  name = key.encode()
  return _HEADER.pack(label, clip, len(name)) + name + latent.astype("<f2").tobytes()


def from_record(data: bytes, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
  """Returns latent, float32 of the given shape, and label."""
  label, _, length = _HEADER.unpack_from(data)
  latent = np.frombuffer(data, "<f2", offset=_HEADER.size + length)
  return latent.reshape(shape).astype(np.float32), label


class ShardWriter:
  """Writes `latents-00000.array_record`, ... into a folder, each of about `SHARD_BYTES`.

  Attributes:
    shards: file name, number of records and bytes on disk of each file that is complete.
  """

  def __init__(self, folder: pathlib.Path):
    self.shards: list[dict] = []
    self._folder = folder
    self._writer = None

  def write(self, data: bytes) -> None:
    """Appends one record."""
    if self._writer is None:
      self._path = self._folder / f"latents-{len(self.shards):05d}.array_record"
      self._count = 0
      self._bytes = 0
      # One record per group, for random access; raw, because float16 latents hardly compress.
      self._writer = ArrayRecordWriter(str(self._path), "group_size:1,uncompressed")
    self._writer.write(data)
    self._count += 1
    self._bytes += len(data)
    if self._bytes >= SHARD_BYTES:
      self.close()

  def close(self) -> None:
    """Completes the current file."""
    if self._writer is None:
      return
    self._writer.close()
    self._writer = None
    size = self._path.stat().st_size
    self.shards.append({"file": self._path.name, "records": self._count, "bytes": size})
