"""Probes the trained models of the study by evaluation: other clips, other thresholds, samples.

  python -m benchmarks.probes --runs=runs/study_screen
  python -m benchmarks.probes --runs=runs/study_screen --only=threshold,samples --arms=octaves

A row per probe and run goes to benchmarks/results/study_probes.json (or --out). The same command
goes on: a row of the same run is not measured again. Probes are in benchmarks/trained/probes.py.
"""

import os
import pathlib
import time

from absl import flags, logging

from benchmarks.rows import RESULTS, Store, context
from benchmarks.trained import probes
from benchmarks.trained.study import ROOT, rounded
from freqformer.command import cli
from freqformer.config import ConfigError
from freqformer.evaluate.restore import load_run

NAME = "study_probes.json"
_NICE = 10


def main(_):
  """Measures what has no row yet.

  Raises:
    ConfigError: a name is unknown, or there is no finished run.
  """
  os.nice(_NICE)
  found = probes.subjects(pathlib.Path(_RUNS.value).absolute())
  if not found:
    raise ConfigError(f"--runs={_RUNS.value} has no finished trial of benchmarks.study.")
  _check("only", _ONLY.value, probes.PROBES)
  _check("arms", _ARMS.value, {subject.arm for subject in found})
  store = Store(
    pathlib.Path(_OUT.value or RESULTS).absolute() / NAME, context("python -m benchmarks.probes")
  )
  for subject in found:
    if not _ARMS.value or subject.arm in _ARMS.value:
      measure(subject, _ONLY.value or list(probes.PROBES), store)


def measure(subject: probes.Subject, names: list[str], store: Store):
  """Writes the rows of a run that are not there, of the probes that fit it."""
  names = [name for name in names if not _row_of(subject, name, store)]
  if not names:
    return
  run = load_run(subject.workdir)
  for name in names:
    probe = probes.PROBES[name]
    if not probe.fits(run):
      continue
    logging.info("%s of %s, seed %d", name, subject.arm, subject.seed)
    started = time.monotonic()
    results = probe.measure(run)
    store.add(
      rounded(
        {
          "name": f"{name}/{subject.arm}/seed{subject.seed}",
          "probe": name,
          "arm": subject.arm,
          "seed": subject.seed,
          "digest": subject.digest,
          "steps": run.step,
          "seconds": time.monotonic() - started,
          "overrides": {"train.time_range": list(run.experiment.train.time_range)},
          "results": results,
        }
      )
    )


def _row_of(subject: probes.Subject, name: str, store: Store) -> dict | None:
  """Returns the row of a probe, unless it is of another run."""
  row = store.get(f"{name}/{subject.arm}/seed{subject.seed}")
  return row if row and row["digest"] == subject.digest else None


def _check(flag: str, given: list[str] | None, known):
  """Raises ConfigError for a name that is not known."""
  for name in given or ():
    if name not in known:
      raise ConfigError(f"--{flag}: {name!r} must be one of {', '.join(sorted(known))}.")


if __name__ == "__main__":
  _RUNS = flags.DEFINE_string("runs", str(ROOT / "runs" / "study_screen"), "Folder of the runs.")
  _ONLY = flags.DEFINE_list("only", None, f"Some of {', '.join(probes.PROBES)}; default all.")
  _ARMS = flags.DEFINE_list("arms", None, "Arms of the study; default all that are finished.")
  _OUT = flags.DEFINE_string("out", None, "Folder of the rows.")
  cli.run(main)
