"""Golden tables: numbers that code is held to, kept as JSON so that a change shows in the diff."""

import functools
import hashlib
import importlib.metadata
import inspect
import pathlib

from benchmarks.gpu.code import ROOT, meaning
from tools import offline


def path(name: str) -> pathlib.Path:
  """Returns the file of a table."""
  return pathlib.Path(__file__).with_name(f"{name}.json")


@functools.cache
def made_by(packages: tuple[str, ...], sources: tuple[str, ...], *parts) -> str:
  """Returns a hash of what resources of kernels depend on: their code, and who compiles it.

  Args:
    packages: distributions whose versions count, as that of the assembler does.
    sources: glob patterns of files below the root; comments and layout do not count.
    *parts: functions and classes whose code counts, too.
  """
  versions = [*map(importlib.metadata.version, packages), offline.assembler_version()]
  found = hashlib.sha256(repr(versions).encode())
  for part in parts:
    found.update(meaning(inspect.getsource(part)).encode())
  for file in sorted({file for pattern in sources for file in ROOT.glob(pattern)}):
    found.update(meaning(file.read_text(), file.suffix).encode())
  return found.hexdigest()
