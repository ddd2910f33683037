"""Compares attention methods on random fields with a known best answer (configs/fields.py).

  python -m benchmarks.study --stage=screen --list               trials and their state
  python -m benchmarks.study --stage=screen --shard=1/2 --budget-minutes=90
  python -m benchmarks.study --stage=screen --against=window     the table, of what is finished
  python -m benchmarks.study --verdict                           the hypotheses, by all rows
  python -m benchmarks.study --rehearse --out=/tmp/study         two tiny trials, no measurement

The same command goes on: finished trials have a row in benchmarks/results/study_<stage>.json and
are skipped, stopped ones resume. Trials run one after the other at low priority, each in a process
of its own; shards may run at the same time. On Ctrl-C, SIGTERM, or when the budget is used up, the
running trial saves itself. Arms and stages are in benchmarks/trained/study.py.
"""

import os
import pathlib
import sys
import time

from absl import flags, logging

from benchmarks.rows import RESULTS, Store, context, measured_rows
from benchmarks.trained import study, study_verdict
from benchmarks.trained.study_summary import summary
from freqformer.command import cli
from freqformer.config import ConfigError
from freqformer.pages.text import aligned
from freqformer.train.preemption import StopRequest

PROBES = "study_probes.json"  # of benchmarks.probes
_NICE = 10
_REHEARSAL = "rehearsal"


def main(_):
  """Runs a shard, lists it, or prints the table or the verdicts.

  Raises:
    ConfigError: an argument is invalid, or there is no row to summarise.
  """
  if _REHEARSE.value and _OUT.value is None:
    raise ConfigError("--rehearse measures nothing; name a folder by --out to write to.")
  stage = study.REHEARSAL if _REHEARSE.value else study.STAGES[_STAGE.value]
  name = f"study_{_REHEARSAL if _REHEARSE.value else _STAGE.value}"
  rows = pathlib.Path(_OUT.value or RESULTS).absolute() / f"{name}.json"
  runs = pathlib.Path(_OUT.value or study.ROOT / "runs").absolute() / name
  command = f"python -m benchmarks.study --stage={_STAGE.value}"
  store = Store(rows, context(command), rehearsal=_REHEARSE.value)
  wanted = study.trials(stage, _shard(_SHARD.value))
  found = [row for row in store.all() if "error" not in row]
  if _VERDICT.value:
    stages = {name: measured_rows(rows.parent / f"study_{name}.json") for name in study.STAGES}
    probes = measured_rows(rows.parent / PROBES)
    print(study_verdict.text(study_verdict.verdicts(stages, probes)))
  elif _AGAINST.value:
    if _AGAINST.value not in {row["arm"] for row in found}:
      raise ConfigError(f"{rows} has no row of {_AGAINST.value}; run that arm first.")
    print(summary(found, _AGAINST.value))
    now = {trial.name: trial.digest for trial in study.trials(stage)}
    if other := [row["name"] for row in found if row["digest"] != now.get(row["name"])]:
      print(f"Not of the settings that these trials have now: {', '.join(other)}.")
  elif _LIST.value:
    print(aligned(study.listing(wanted, store, runs)))
  elif _RUN.value:
    known = {trial.name: trial for trial in study.trials(stage)}
    if _RUN.value not in known:
      raise ConfigError(f"--run={_RUN.value} must be one of {', '.join(known)}.")
    study.run(known[_RUN.value], runs, store)
  else:
    _run_all(wanted, store, runs)


def _run_all(wanted: list[study.Trial], store: Store, runs: pathlib.Path):
  """Runs what is not finished, prints the state of all, and leaves with 1 if a trial failed."""
  os.nice(_NICE)
  arguments = [f"--stage={_STAGE.value}"]
  arguments += [f"--out={pathlib.Path(_OUT.value).absolute()}"] if _OUT.value else []
  arguments += ["--rehearse"] if _REHEARSE.value else []
  minutes = _BUDGET.value
  deadline = None if minutes is None else time.monotonic() + 60 * minutes
  with StopRequest() as stop:
    failed = study.run_all(wanted, store, arguments, stop, deadline)
  print(aligned(study.listing(wanted, store, runs)))
  if failed:
    logging.error("failed, see above: %s", ", ".join(failed))
    sys.exit(1)


def _shard(text: str) -> tuple[int, int]:
  """Reads "i/n" with i from 1 to n; raises ConfigError."""
  index, slash, count = text.partition("/")
  if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
    raise ConfigError(f"--shard={text!r} must read i/n with i from 1 to n, e.g. 1/2.")
  return int(index), int(count)


if __name__ == "__main__":
  _STAGE = flags.DEFINE_enum("stage", "screen", list(study.STAGES), "Part of the study.")
  _SHARD = flags.DEFINE_string("shard", "1/1", "i/n: every n-th trial, beginning at the i-th.")
  _BUDGET = flags.DEFINE_float("budget-minutes", None, "Stop after so many minutes.", lower_bound=0)
  _LIST = flags.DEFINE_bool("list", False, "Show the trials, run nothing.")
  _AGAINST = flags.DEFINE_enum("against", None, list(study.ARMS), "Print the table against an arm.")
  _VERDICT = flags.DEFINE_bool("verdict", False, "Judge the hypotheses of docs/evidence.md.")
  _RUN = flags.DEFINE_string("run", None, "One trial by name, in this process.")
  _OUT = flags.DEFINE_string("out", None, "Folder of rows and runs.")
  _REHEARSE = flags.DEFINE_bool("rehearse", False, "Two tiny trials, no measurement.")
  cli.run(main)
