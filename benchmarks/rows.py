"""Results as rows of JSON: every figure with the command, machine, versions, commit and sources that produced it.

  python -m benchmarks.rows 1f2e3d4c5b6a     # the commits that hold just the sources of a row

`commit` is where the tree stood when the run began; "+changes" says that sources differed from it (work that was committed
later, or never). `sources` is a hash of what was in the files, whether committed or not: rows of one hash come from the same
code, and the command above names the commits that have it. Rows from before this field have no such tie.
"""

import datetime
import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterable

from absl import logging

RESULTS = pathlib.Path(__file__).parent / "results"
_ROOT = RESULTS.parent.parent
# What a figure may depend on: the code and tables in these places.
_SOURCES = ("train.py", "eval.py", "kernels", "freqformer", "configs", "benchmarks")
# What every row holds; the benchmark adds its own fields.
CONTEXT_FIELDS = ("command", "device", "cpu", "jax", "python", "commit", "sources", "date")
# What the printed table shows beside the value, where a row has it.
_NOTES = (
  "others_cpu",
  "density",
  "retained",
  "largest_possible",
  "floor_s",
  "matmul_gflops",
  "tile_matmuls_s",
  "tile_matmul_gflops",
)


def context(command: str) -> dict[str, str]:
  """Where and with what a row is measured; asked once, when the run starts."""
  import jax  # here, because a process that only reads and merges rows must not need jax (benchmarks/gpu/slot.py)

  return {
    "command": command,
    "device": jax.devices()[0].device_kind,
    "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    "jax": jax.__version__,
    "python": platform.python_version(),
    "commit": _commit(),
    "sources": sources(),
    "date": datetime.date.today().isoformat(),
  }


def write_rows(
  benchmark: str, rows: list[dict], command: str, folder: pathlib.Path = RESULTS
) -> pathlib.Path:
  """Adds rows to `<folder>/<benchmark>.json`; a row replaces the one of the same name, the others stay.

  Args:
    benchmark: name of the file.
    rows: each with a `name` and what was measured; context fields that a row already has are kept.
    command: what produces them.
    folder: where results lie.
  """
  here = context(command)
  return merge_rows(pathlib.Path(folder) / f"{benchmark}.json", [here | row for row in rows])


def merge_rows(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
  """Puts rows into a file, each in the place of its namesake; whole or not at all, so that a killed run leaves what it had."""
  merged = {row["name"]: row for row in read_rows(path)} | {row["name"]: row for row in rows}
  path.parent.mkdir(parents=True, exist_ok=True)
  fresh = path.with_name(path.name + ".new")
  fresh.write_text(json.dumps(list(merged.values()), indent=1) + "\n")
  fresh.replace(path)
  return path


def read_rows(path: pathlib.Path) -> list[dict]:
  """The rows of a file; none if it does not exist."""
  return json.loads(path.read_text()) if path.exists() else []


def goal_row(name: str, value: float, goal: str | None, **fields) -> dict:
  """A row with its goal ("`>= 14`", "`<= 4.5`") and whether it was met; None: no goal."""
  met = None
  if goal is not None:
    relation, bound = goal.split()
    met = bool(value >= float(bound) if relation == ">=" else value <= float(bound))
  logging.info("%s: %.4g", name, value)
  return {"name": name, "value": value, "goal": goal, "met": met, **fields}


def table(found: list[dict]) -> str:
  """The rows for people: name, value, goal, met."""
  lines = [f"{'measurement':<52} {'value':>9}  {'goal':>8}  met"]
  for row in found:
    met = {None: "-", True: "yes", False: "NO"}[row["met"]]
    lines.append(
      f"{row['name']:<52} {row['value']:>7.3g} {row['unit']:<2} {row['goal'] or '-':>8}  {met}"
    )
    notes = [f"{key} {row[key]:.3g}" for key in _NOTES if key in row]
    notes += [f"best dense form: {row['form']}"] if "form" in row else []
    times = [
      f"{key} {value['median_s']:.3g} s" for key, value in row.items() if isinstance(value, dict)
    ]
    lines += [f"    {', '.join(times + notes)}"] if times or notes else []
  return "\n".join(lines)


def _commit() -> str:
  """The short commit, marked where code that could matter differs from it; "unknown" outside a checkout."""
  try:
    commit = _git("rev-parse", "--short", "HEAD").strip()
    changed = any(
      _is_source(line[3:])
      for line in _git("status", "--porcelain", "--untracked-files=no", *_SOURCES).splitlines()
    )
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return commit + ("+changes" if changed else "")


def sources(root: pathlib.Path = _ROOT) -> str:
  """Short hash of the sources as they lie there, new files included; the same for whoever has the same files."""

  def blob(data):
    return hashlib.sha1(
      b"blob %d\0" % len(data) + data
    ).hexdigest()  # as git names a file's content

  found = (
    p
    for place in _SOURCES
    for p in ((root / place).rglob("*") if (root / place).is_dir() else [root / place])
  )
  names = ((p, p.relative_to(root).as_posix()) for p in found)
  return _digest(
    (name, blob(p.read_bytes())) for p, name in names if _is_source(name) and p.is_file()
  )


def commits_with(wanted: str) -> list[str]:
  """The commits of all branches, newest first, whose sources have this hash.

  Raises:
    CalledProcessError, OSError: outside a checkout.
  """
  found = []
  for commit in _git("log", "--all", "--format=%h").split():
    listed = (
      line.split(None, 3)[2:] for line in _git("ls-tree", "-r", commit, *_SOURCES).splitlines()
    )
    files = {path: blob for blob, path in listed if _is_source(path)}
    found += [commit] if _digest(files.items()) == wanted else []
  return found


def _is_source(path: str) -> bool:
  return path.endswith((".py", ".json")) and not path.startswith("benchmarks/results/")


def _digest(files: Iterable[tuple[str, str]]) -> str:
  return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()[:12]


def _git(*args: str) -> str:
  return subprocess.run(
    ["git", *args], capture_output=True, text=True, check=True, cwd=_ROOT
  ).stdout


if __name__ == "__main__":
  print("\n".join(commits_with(sys.argv[1])) or "no commit has these sources")
