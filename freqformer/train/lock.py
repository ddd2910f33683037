"""A run's folder has one writer at a time: a lock on a file in it, held while a process writes.

The system gives a lock back when its process ends, however it ends: no lock outlives a crash.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from absl import logging

from freqformer.config import ConfigError

TRAINING = "lock"  # held by a process that trains
_MOMENT = 0.25  # seconds; someone who only looks for a holder has the lock for less
_PAUSE_SECONDS = 0.05


class Held(ConfigError):
  """Another process has the lock; the message says which one."""


@contextlib.contextmanager
def held(folder, name: str = TRAINING, patience: float = _MOMENT) -> Iterator[None]:
  """Holds the lock `name` of a folder, which is there, for as long as the block runs.

  On a file system without locks the block runs all the same, which is logged.

  Raises:
    Held: another process, or another block of this one, has it for longer than `patience` seconds.
  """
  path = pathlib.Path(folder) / name
  deadline = time.monotonic() + patience
  with path.open("a+") as file:
    while True:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
          logging.warning("%s cannot be locked (%s): start no second process there", path, error)
          break
        if time.monotonic() > deadline:
          raise Held(
            f"{folder} is in use by {_owner(path)}: wait for it, stop it, or name another folder."
          ) from error
        time.sleep(_PAUSE_SECONDS)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def holder(folder, name: str = TRAINING) -> str | None:
  """Returns who holds a lock, "process 12 on host", or None; makes no file."""
  path = pathlib.Path(folder) / name
  try:
    with path.open() as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except FileNotFoundError:
    return None
  except OSError as error:
    return _owner(path) if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
  return None


def _owner(path: pathlib.Path) -> str:
  """Returns what the holder wrote into the file."""
  return path.read_text().strip() or "another process"
