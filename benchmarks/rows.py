"""Results as rows of JSON: a figure with the command, machine, versions and code that produced it.

  python -m benchmarks.rows 1f2e3d4c5b6a     # the commits that hold just the sources of a row

`commit` is the commit of the checkout when the run began; "+changes" means that sources differed
from it. `sources` is a hash of the files' content, whether committed or not: rows with the same
hash come from the same code, and the command above names the commits that have it.
"""

import contextlib
import dataclasses
import datetime
import fcntl
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
# Fields that the printed table shows after the value, where a row has them.
_NOTES = ("others_cpu", "density", "retained", "largest_possible")


def context(command: str) -> dict[str, str]:
  """Returns where and with what a row is measured; to be asked once, when the run starts."""
  # Not at the top: a process that only merges rows must not need jax (benchmarks/gpu/slot.py).
  import jax

  return {
    "command": command,
    "device": jax.devices()[0].device_kind,
    "cpu": f"{processor()}, {os.cpu_count()} cores",
    "jax": jax.__version__,
    "python": platform.python_version(),
    "commit": _commit(),
    "sources": sources(),
    "date": datetime.date.today().isoformat(),
  }


def processor(info: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
  """Returns the processor's name with family and model, which names alone often hide."""
  fields = {}
  for line in info.read_text().splitlines() if info.exists() else ():
    key, _, value = line.partition(":")
    fields.setdefault(key.strip(), value.strip())
  if not {"model name", "cpu family", "model"} <= fields.keys():
    return platform.processor() or platform.machine()
  return "{model name} (family {cpu family}, model {model})".format_map(fields)


@dataclasses.dataclass
class Store:
  """The rows of one file, written one by one and found again by a later run.

  Attributes:
    path: of the JSON file.
    context: fields that every new row gets.
    same: fields of the context in which an earlier row must agree to count.
    rehearsal: mark rows as no measurement.
  """

  path: pathlib.Path
  context: dict
  same: tuple[str, ...] = ()
  rehearsal: bool = False

  def all(self) -> list[dict]:
    """Returns the rows that agree with this run; others stay in the file and are not mixed in."""
    found = read_rows(self.path)
    return [row for row in found if all(row.get(k) == self.context[k] for k in self.same)]

  def get(self, name: str) -> dict | None:
    """Returns the row of that name, if it agrees with this run and did not fail."""
    return next((row for row in self.all() if row["name"] == name and "error" not in row), None)

  def add(self, row: dict) -> dict:
    """Writes a row at once, with the context, and returns it.

    Raises:
      ValueError: if the row has a field of the context.
    """
    if hidden := row.keys() & self.context.keys():
      raise ValueError(
        f"row {row.get('name')!r} has fields that say where it was measured, {sorted(hidden)}; "
        "name them otherwise."
      )
    row = row | self.context | ({"rehearsal": True} if self.rehearsal else {})
    merge_rows(self.path, [row])
    return row


def write_rows(
  benchmark: str, rows: list[dict], command: str, folder: pathlib.Path = RESULTS
) -> pathlib.Path:
  """Adds rows to `<folder>/<benchmark>.json`; a row replaces its namesake, the others stay.

  Args:
    benchmark: name of the file.
    rows: each with a `name` and what was measured; context fields that a row already has are kept.
    command: what produces them.
    folder: of the results.
  """
  here = context(command)
  return merge_rows(pathlib.Path(folder) / f"{benchmark}.json", [here | row for row in rows])


def merge_rows(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
  """Puts rows into a file, each in the place of its namesake; other processes may do so, too."""
  with _locked(path.parent):
    merged = {row["name"]: row for row in [*read_rows(path), *rows]}
    return write_json(path, list(merged.values()))


@contextlib.contextmanager
def _locked(folder: pathlib.Path):
  """Lets one process at a time into a folder, without a file of its own there."""
  folder.mkdir(parents=True, exist_ok=True)
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)


def write_json(path: pathlib.Path, content: object) -> pathlib.Path:
  """Writes a whole file or none, so that a killed run leaves the old one."""
  fresh = path.with_name(path.name + ".new")
  fresh.write_text(json.dumps(content, indent=1) + "\n")
  fresh.replace(path)
  return path


def read_rows(path: pathlib.Path) -> list[dict]:
  """Returns the rows of a file; none if it does not exist."""
  return json.loads(path.read_text()) if path.exists() else []


def measured_rows(path: pathlib.Path) -> list[dict]:
  """Returns the rows of a file that are measurements: neither errors nor rehearsals."""
  return [row for row in read_rows(path) if "error" not in row and not row.get("rehearsal")]


def goal_row(name: str, value: float, goal: str | None, **fields) -> dict:
  """Returns a row with its goal (`>= 14`, `<= 4.5`, or None) and whether it was met."""
  met = None
  if goal is not None:
    relation, bound = goal.split()
    met = bool(value >= float(bound) if relation == ">=" else value <= float(bound))
  logging.info("%s: %.4g", name, value)
  return {"name": name, "value": value, "goal": goal, "met": met, **fields}


def table(found: list[dict]) -> str:
  """Returns the rows for people: name, value, goal, met."""
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
  """Returns the short commit, marked where sources differ from it; "unknown" outside a checkout."""
  try:
    commit = _git("rev-parse", "--short", "HEAD").strip()
    status = _git("status", "--porcelain", "--untracked-files=no", *_SOURCES)
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  changed = any(_is_source(line[3:]) for line in status.splitlines())
  return commit + ("+changes" if changed else "")


def sources(root: pathlib.Path = _ROOT) -> str:
  """Returns a short hash of the sources as they lie there, new files included."""
  found = {}
  for place in _SOURCES:
    inside = (root / place).rglob("*") if (root / place).is_dir() else [root / place]
    for path in inside:
      name = path.relative_to(root).as_posix()
      if _is_source(name) and path.is_file():
        data = path.read_bytes()
        # As git names a file's content.
        found[name] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
  return _digest(found.items())


def commits_with(wanted: str) -> list[str]:
  """Returns the commits of all branches, newest first, whose sources have this hash.

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
