"""Versions of the code and the packages that a result was made with, for the records of runs."""

import importlib.metadata
import subprocess
from collections.abc import Iterable

from freqformer import CHECKOUT

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
  """Returns the version of each package, "absent" for one that is not installed."""
  found = {}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "absent"
  return found


def git_revision() -> str:
  """Returns the short commit of this code, with "+" if files were changed since.

  "unknown" outside a checkout: the repository around an installed package is somebody else's.
  """
  if CHECKOUT is None:
    return "unknown"
  try:
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
  except OSError:
    return "unknown"
  if commit.returncode:
    return "unknown"
  return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _git(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    ["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False
  )
