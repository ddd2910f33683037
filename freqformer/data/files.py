"""The files of a data set. A .tar file counts as the files that it unpacks to, which stay in it."""

import dataclasses
import functools
import hashlib
import os
import tarfile

from freqformer.config import ConfigError

_ENDS = 1 << 16  # bytes of a file's beginning and end that tell it from others
_BLOCK = 512  # bytes of a header, and of the zeros at the end


@dataclasses.dataclass(frozen=True)
class Member:
  """A file inside a .tar file.

  Attributes:
    tar: path.
    offset: of its first byte.
    bytes: its length.
  """

  tar: str
  offset: int
  bytes: int


Path = str | Member


def members(tar: str) -> dict[str, Member]:
  """Returns the files in a .tar file by name; their contents are not read.

  Raises:
    ConfigError: it is damaged, cut or compressed.
  """
  try:
    return _members(tar, os.stat(tar).st_mtime_ns)
  except (OSError, tarfile.TarError) as error:
    raise ConfigError(
      f"{tar} cannot be read as a .tar file ({error}): it must be whole and not compressed; "
      "replace it or move it away."
    ) from error


@functools.lru_cache(maxsize=4096)
def _members(tar: str, _time: int) -> dict[str, Member]:
  """Returns the members of a tar file as it was at a time: a split is listed several times."""
  with tarfile.open(tar, "r:") as opened:
    found = {
      os.path.normpath(each.name).lstrip("/"): Member(tar, each.offset_data, each.size)
      for each in opened
      if each.isfile()
    }
    # A header that is damaged ends the list as zeros do.
    opened.fileobj.seek(opened.offset)
    if opened.fileobj.read(_BLOCK) != bytes(_BLOCK):
      raise tarfile.ReadError(f"no header and no end at byte {opened.offset}")
  return found


def read(path: Path) -> bytes:
  """Returns the contents of a file."""
  name, offset, size = _range(path)
  with open(name, "rb") as file:
    file.seek(offset)
    return file.read(size)


def stat(*paths: Path) -> tuple[int, int]:
  """Returns how many bytes files have, and the time in ns when the newest was changed."""
  sizes = [_range(path)[2] for path in paths]
  return sum(sizes), max(os.stat(_range(path)[0]).st_mtime_ns for path in paths)


def fingerprint(*paths: Path) -> str:
  """Hashes files' sizes, first and last 64 KiB: cheap enough for a whole data set."""
  digest = hashlib.sha256()
  for path in paths:
    name, offset, size = _range(path)
    digest.update(str(size).encode())
    with open(name, "rb") as file:
      for start in (0, max(size - _ENDS, 0)):
        file.seek(offset + start)
        digest.update(file.read(min(_ENDS, size)))
  return digest.hexdigest()[:16]


def address(path: Path) -> str:
  """Returns a file as FFmpeg opens it."""
  if isinstance(path, str):
    return path
  return f"subfile,,start,{path.offset},end,{path.offset + path.bytes},,:{path.tar}"


def _range(path: Path) -> tuple[str, int, int]:
  """Returns the file on disk, and the offset and the number of the bytes in it."""
  if isinstance(path, Member):
    return path.tar, path.offset, path.bytes
  return path, 0, os.path.getsize(path)
