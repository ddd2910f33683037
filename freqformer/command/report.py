"""Writes one HTML file that shows a run, or several beside each other. It needs no network.

  python -m freqformer.report --workdir=runs/demo                as train.py and eval.py do
  python -m freqformer.report --workdir=runs/demo --time_dense   times its steps against dense ones
  python -m freqformer.report --compare runs/octaves runs/dense  losses, samples, costs of both

A run's page is <workdir>/report.html. --compare also takes a list with commas; it writes
compare.html beside the first run, or the file that --out names.
"""

import itertools
import os
import pathlib
import sys

from absl import flags

from freqformer.analysis.timed_steps import write_seconds
from freqformer.command import cli
from freqformer.config import ConfigError
from freqformer.pages.run import write_report
from freqformer.pages.runs import write_runs


def gathered(arguments: list[str]) -> list[str]:
  """Returns the arguments with `--compare=RUN` for each RUN that follows `--compare`."""
  for i, argument in enumerate(arguments):
    if argument in ("--compare", "-compare"):
      runs = list(itertools.takewhile(lambda text: not text.startswith("-"), arguments[i + 1 :]))
      rest = arguments[i + 1 + len(runs) :]
      return [*arguments[:i], *(f"--compare={run}" for run in runs), *rest]
  return arguments


def folders(texts: list[str]) -> list[str]:
  """Returns the runs that texts name: a text that is no folder may be a list with commas."""
  found = []
  for text in texts:  # folders of a sweep have commas in their names
    parts = [text] if pathlib.Path(text).is_dir() else text.split(",")
    found += map(os.path.expanduser, parts)
  return found


def main(_):
  if (_WORKDIR.value is None) == (_COMPARE.value is None):
    raise ConfigError("give --workdir the folder of a run, or --compare several of them.")
  if _COMPARE.value is not None:
    if _TIME_DENSE.value:
      raise ConfigError("--time_dense goes with --workdir: time one run after the other.")
    runs = folders(_COMPARE.value)
    print(write_runs(runs, _OUT.value or pathlib.Path(runs[0]).parent / "compare.html"))
    return
  if _OUT.value:
    raise ConfigError("--out goes with --compare; a run's page is <workdir>/report.html.")
  if _TIME_DENSE.value:
    write_seconds(_WORKDIR.value)
  print(write_report(_WORKDIR.value))


if __name__ == "__main__":
  # Not at import: other commands have a --workdir of their own.
  _WORKDIR = cli.define_path("workdir", None, "Folder of the run.")
  _TIME_DENSE = flags.DEFINE_bool("time_dense", False, "Time its steps against dense attention's.")
  _COMPARE = cli.define_paths("compare", "Folders of runs to show side by side.")
  _OUT = cli.define_path("out", None, "File of --compare.")
  sys.argv = gathered(sys.argv)
  cli.run(main)
