"""Results as rows of JSON: every figure with the command, machine, versions and commit that produced it."""

import datetime
import json
import os
import pathlib
import platform
import subprocess

import jax
from absl import logging

RESULTS = pathlib.Path(__file__).parent / "results"
# What every row holds; the benchmark adds its own fields.
CONTEXT_FIELDS = ("command", "device", "cpu", "jax", "python", "commit", "date")
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
  return {
    "command": command,
    "device": jax.devices()[0].device_kind,
    "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    "jax": jax.__version__,
    "python": platform.python_version(),
    "commit": _commit(),
    "date": datetime.date.today().isoformat(),
  }


def write_rows(benchmark: str, rows: list[dict], command: str, folder: pathlib.Path = RESULTS) -> pathlib.Path:
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
    lines.append(f"{row['name']:<52} {row['value']:>7.3g} {row['unit']:<2} {row['goal'] or '-':>8}  {met}")
    notes = [f"{key} {row[key]:.3g}" for key in _NOTES if key in row]
    notes += [f"best dense form: {row['form']}"] if "form" in row else []
    times = [f"{key} {value['median_s']:.3g} s" for key, value in row.items() if isinstance(value, dict)]
    lines += [f"    {', '.join(times + notes)}"] if times or notes else []
  return "\n".join(lines)


def _commit() -> str:
  """The short commit, marked where code that could matter differs from it; "unknown" outside a checkout."""
  git = lambda *args: subprocess.run(["git", *args], capture_output=True, text=True, check=True, cwd=RESULTS.parent.parent)
  try:
    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "kernels", "freqformer", "benchmarks/*.py").stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return commit + ("+changes" if changed else "")
