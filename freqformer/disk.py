"""Disks that are full, and files that are written whole or not at all."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from freqformer.config import ConfigError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORDS = tuple(os.strerror(code) for code in _FULL)


def is_full(error: BaseException) -> bool:
  """Tells whether an error, or one of those that led to it, is that of a full disk.

  Libraries wrap the system's error, or quote its words alone.
  """
  return any(
    getattr(each, "errno", None) in _FULL or any(words in str(each) for words in _WORDS)
    for each in chain(error)
  )


def chain(error: BaseException) -> Iterator[BaseException]:
  """Yields an error and all errors that led to it, each once."""
  pending = [error]
  found = []
  while pending:
    each = pending.pop(0)
    if each is None or any(each is known for known in found):
      continue
    found.append(each)
    yield each
    pending += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]


def free_bytes(folder) -> int:
  """Returns the free bytes of the disk on which a folder is, or will be once it is made."""
  folder = pathlib.Path(folder).absolute()
  there = next(place for place in (folder, *folder.parents) if place.exists())
  return shutil.disk_usage(there).free


def no_space(folder, what: str, needed: int | None = None, intact: str = "") -> str:
  """Returns the sentence about a full disk.

  Args:
    folder: where there is no space.
    what: cannot be written, e.g. "the checkpoint of step 20".
    needed: bytes of it, None if that is not known.
    intact: what is on disk as it was, e.g. "step 10 is intact".
  """
  need = "does not fit" if needed is None else f"needs {size_text(needed)}"
  kept = f"; {intact}" if intact else ""
  return (
    f"no space left in {str(folder)!r}: {what} {need}, {size_text(free_bytes(folder))} are "
    f"free{kept}. Free some space, or name a folder on another disk, and run the same command "
    "again."
  )


def size_text(count: int) -> str:
  """Returns `1,234.5 MB`, or kilobytes where these are less than one."""
  return f"{count / 1e6:,.1f} MB" if count >= 1_000_000 else f"{count / 1e3:,.1f} kB"


@contextlib.contextmanager
def space_for(
  what: str, folder, needed: int | None = None, intact: Callable[[], str] = lambda: ""
) -> Iterator[None]:
  """Turns the error of a full disk into a ConfigError; arguments as of `no_space`."""
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:  # libraries raise their own; any that is of no full disk goes on
    if not is_full(error):
      raise
    raise ConfigError(no_space(folder, what, needed, intact())) from error


def write_whole(path: pathlib.Path, contents: str | bytes):
  """Writes a file, text in UTF-8; where that fails, on a full disk say, the earlier one stays."""
  part = path.with_name(f".{path.name}.part")
  try:
    if isinstance(contents, bytes):
      part.write_bytes(contents)
    else:
      part.write_text(contents, encoding="utf-8")
    part.replace(path)
  except OSError:
    part.unlink(missing_ok=True)
    raise
