"""Versions of packages and the commit of the code, for the records of a result."""

import importlib.metadata
import subprocess
from collections.abc import Iterable

from freqformer import CHECKOUT


def versions(names: Iterable[str]) -> dict[str, str]:
  """Returns the installed version of each distribution, "absent" where there is none."""
  found = {}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "absent"
  return found


def git_revision() -> str:
  """Returns the commit of this code, "+" added if files changed; "unknown" outside a checkout.

  The repository around an installed package is somebody else's.
  """
  if CHECKOUT is None:
    return "unknown"

  def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      ["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )

  try:
    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
  except OSError:
    return "unknown"
  if commit.returncode:
    return "unknown"
  return commit.stdout.strip() + ("+" if changed else "")
