"""Trials of a study: their names, their checks, their training processes and their rows.

A trial is a workdir named by its overrides. Locks on it let several commands share a study.
"""

import dataclasses
import hashlib
import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from absl import flags, logging

from freqformer import disk
from freqformer.command import cli
from freqformer.command.files import define_config
from freqformer.config import ConfigError
from freqformer.disk import write_whole
from freqformer.pages.files import json_if_any
from freqformer.pages.study import seed_means
from freqformer.train import metrics
from freqformer.train.experiment import Experiment, experiment, of_record
from freqformer.train.lock import Held, held, holder
from freqformer.train.resume import change_text, changes

_NAME_LENGTH = 80  # characters of a trial's folder name before its hash
_POLL_SECONDS = 0.5  # between two looks at a running trial
_PATIENCE_SECONDS = 10  # for another sweep that writes the table
PRUNED = "pruned"  # begins the status of a trial that a rule has stopped
_SWEEPING = "sweep.lock"  # of a trial's folder, held by the sweep that runs it


@dataclasses.dataclass(frozen=True)
class Trial:
  """One training of a study.

  Attributes:
    config: path of the config file.
    study: folder of the study.
    overrides: flat keys of the config and their values.
  """

  config: pathlib.Path
  study: pathlib.Path
  overrides: dict

  @property
  def name(self) -> str:
    """A readable folder name, see `trial_name`."""
    return trial_name(self.overrides)

  @property
  def workdir(self) -> pathlib.Path:
    return self.study / self.name

  def running(self) -> str | None:
    """Returns who sweeps or trains it, "process 12 on host", or None."""
    return holder(self.workdir) or holder(self.workdir, _SWEEPING)


def trial_name(overrides: dict) -> str:
  """Returns a readable folder name, unique by a hash of all overrides."""
  short = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in overrides.items())
  safe = "".join(c if c.isalnum() or c in "=.-," else "_" for c in short)[:_NAME_LENGTH]
  text = json.dumps(overrides, sort_keys=True, default=list)
  digest = hashlib.sha256(text.encode()).hexdigest()[:6]
  return f"{safe or 'default'}-{digest}"


def resolve(config_path, overrides: dict) -> Experiment:
  """Returns the experiment that training makes of a config file and overrides."""
  argv = ["sweep", f"--config={config_path}", *_flags(overrides)]
  values = flags.FlagValues()
  config = define_config(values, argv)
  try:
    cli.parse(argv, values)
    return experiment(config.value)
  except ConfigError as error:
    raise ConfigError(f"trial {trial_name(overrides)}: {error}") from error


def _flags(overrides: dict) -> list[str]:
  return [f"--config.{key}={value}" for key, value in overrides.items()]


def changed(trials: Iterable[Trial]) -> dict[str, str]:
  """Returns how the config of trials that have run differs from what they would run with now.

  Raises:
    ConfigError: a trial's config is wrong.
  """
  found = {}
  for trial in trials:
    if text := _changed_since(trial.workdir, resolve(trial.config, trial.overrides)):
      found[trial.name] = text
  return found


def refuse_changed(found: dict[str, str], count: int, study: pathlib.Path):
  """Raises ConfigError if `changed` found any of `count` trials."""
  if found:
    name, text = next(iter(found.items()))
    raise ConfigError(
      f"{len(found)} of {count} trials under {study} ran with another config, e.g. {name}: "
      f"{text}; name another --study, undo the change, or delete those folders."
    )


def _changed_since(workdir: pathlib.Path, exp: Experiment) -> str:
  """Describes how `exp` differs from the config that a trial ran with; empty if it does not."""
  path = workdir / "config.json"
  if not path.exists():
    return ""
  try:
    return change_text(changes(of_record(json.loads(path.read_text())), exp))
  except ValueError as error:  # cut off by a crash, or of another revision
    return f"its config.json cannot be read ({error})"


def result_of(workdir: pathlib.Path) -> dict | None:
  """Returns the last validation of a finished trial, None if it has not finished."""
  run = workdir / "run.json"
  if not run.exists() or not json.loads(run.read_text()).get("finished"):
    return None
  last = {row["kind"]: row for row in metrics.read(workdir / "metrics.jsonl")}
  train, val, soft = (last.get(kind, {}) for kind in ("train", "val", "val_soft"))
  return {
    "step": train.get("step"),
    "val_loss": val.get("loss"),
    "val_density": val.get("density"),
    "val_soft_loss": soft.get("loss"),
    "attn/dense": _over_dense(workdir),
    "router_entropy": train.get("router_entropy"),
    "flops": train.get("flops"),
    "seconds": train.get("seconds"),
  }


def _over_dense(workdir: pathlib.Path) -> float | None:
  """Returns attention FLOPs of a training step over dense attention's; None if not recorded."""
  cost = json_if_any(workdir, "cost.json").get("training")
  return cost and cost["own"]["attention_flops"] / cost["dense"]["attention_flops"]


def ran(study: pathlib.Path) -> dict[str, dict]:
  """Returns the rows of study.json by trial: how each one ended when it last ran."""
  path = study / "study.json"
  rows = json.loads(path.read_text()) if path.exists() else []
  return {row["trial"]: row for row in rows if "trial" in row}


def row_of(trial: Trial, ended: str | None = None) -> dict:
  """Returns the row of a trial; `ended` is its status, None: what its files and locks say."""
  result = result_of(trial.workdir)
  status = "finished" if result else ended
  if status is None:
    running = trial.running()
    last = ran(trial.study).get(trial.name, {}).get("status", "open")
    over = last.startswith(("finished", "running"))  # its folder is gone, its process died
    status = f"running, {running}" if running else "open" if over else last
  empty = {"trial": trial.name, "step": None, "val_loss": None}
  return empty | (result or {}) | {"status": status, "overrides": trial.overrides}


class Rule(Protocol):
  """Watches a trial while it trains: `status` is its row's status once a call has returned True."""

  status: str | None

  def __call__(self) -> bool: ...


def run_if_free(
  trial: Trial,
  before: dict | None,
  stop: Callable[[], bool],
  write: Callable[[dict], None],
  rule: Callable[[Trial], Rule] | None = None,
) -> dict:
  """Runs a trial and writes its row, unless it is finished or another process has taken it.

  Args:
    before: the trial's row when this sweep began. One that is another by now, of a trial that
      failed, is of a sweep beside this one: the trial is not run twice.
    stop: tells whether the sweep is asked to stop.
    write: puts a row into study.json.
    rule: may stop the trial; one that it has stopped before is not gone on with.

  Returns:
    Its row.
  """
  trial.workdir.mkdir(parents=True, exist_ok=True)
  try:
    with held(trial.workdir, _SWEEPING):
      now = ran(trial.study).get(trial.name)
      failed_beside = now != before and now["status"].startswith("exit")
      pruned = rule is not None and now is not None and now["status"].startswith(PRUNED)
      if failed_beside or pruned or holder(trial.workdir) or result_of(trial.workdir):
        return row_of(trial)
      judge = rule(trial) if rule else None
      code = run_trial(
        trial.config,
        trial.workdir,
        trial.overrides,
        lambda: stop() or (judge is not None and judge()),
      )
      stopped = (judge and judge.status) or "stopped"
      # A process may have begun to train there just before.
      ended = None if holder(trial.workdir) else f"exit {code}" if code else stopped
      row = row_of(trial, ended) | {"ended": time.time()}
      write(row)
      return row
  except Held:
    return row_of(trial)


def write(study: pathlib.Path, rows: Iterable[dict], names: Iterable[str]):
  """Puts rows into study.json, beside those of sweeps that run at the same time.

  Args:
    names: trials of the study, in the order of their rows; others are left out.
  """
  study.mkdir(parents=True, exist_ok=True)
  with disk.space_for("the study's table", study), held(study, patience=_PATIENCE_SECONDS):
    found = ran(study) | {row["trial"]: row for row in rows}
    ordered = [found[name] for name in names if name in found]
    text = json.dumps([*ordered, *seed_means(ordered)], indent=2, default=list)
    write_whole(study / "study.json", text)


def run_trial(config_path, workdir: pathlib.Path, overrides: dict, stop: Callable[[], bool]) -> int:
  """Trains in a process that a stop request is passed on to, and returns its exit code."""
  command = ["-m", "freqformer.command.train", f"--config={config_path}", f"--workdir={workdir}"]
  command += _flags(overrides)
  logging.info("%s", " ".join(command))
  process = subprocess.Popen([sys.executable, *command])
  while True:
    try:
      return process.wait(timeout=_POLL_SECONDS)
    except subprocess.TimeoutExpired:
      if stop() and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        return process.wait()
