"""Runs a sweep: one workdir per trial; finished trials are skipped, killed ones resumed.

Several sweeps may run on one study at once, one on each GPU say: each takes the next free trial.

  python -m freqformer.sweep --config=configs/ucf101.py --study=runs/study
  python -m freqformer.sweep --config=configs/demo.py --study=runs/study --override=train.steps=9
  python -m freqformer.sweep --config=configs/demo.py --study=runs/study --list

A config's `sweep()` yields flat overrides (`{"train.lr": 0.1}`). Each trial is one training command
with them, which is logged; its first line says which device it runs on. All trials are checked
before the first one runs. The table at the end is also written as study.json. report.html shows it
with validation loss over steps, FLOPs and seconds (also losses.png), and the trials that no other
one beats in both loss and cost. Trials that differ in nothing but their seed are summed up by mean
and spread; `--seeds=0,1,2` runs every trial with each. The exit code is 1 if a trial failed.
"""

import hashlib
import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from absl import flags, logging

from freqformer import disk
from freqformer.command import cli
from freqformer.command.files import define_config, load_config
from freqformer.config import ConfigError
from freqformer.disk import write_whole
from freqformer.pages.files import json_if_any
from freqformer.pages.study import seed_means, table, write_study
from freqformer.train import metrics
from freqformer.train.experiment import Experiment, experiment, of_record
from freqformer.train.lock import Held, held, holder
from freqformer.train.preemption import StopRequest
from freqformer.train.resume import change_text, changes

_NAME_LENGTH = 80  # characters of a trial's folder name before its hash
_POLL_SECONDS = 0.5  # between two looks at a running trial
_PATIENCE_SECONDS = 10  # for another sweep that writes the table
_SWEEPING = "sweep.lock"  # of a trial's folder, held by the sweep that runs it


def trial_name(overrides: dict) -> str:
  """Returns a readable folder name, unique by a hash of all overrides."""
  short = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in overrides.items())
  safe = "".join(c if c.isalnum() or c in "=.-," else "_" for c in short)[:_NAME_LENGTH]
  text = json.dumps(overrides, sort_keys=True, default=list)
  digest = hashlib.sha256(text.encode()).hexdigest()[:6]
  return f"{safe or 'default'}-{digest}"


def _resolve(config_path, overrides: dict) -> Experiment:
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


def _ran(study: pathlib.Path) -> dict[str, dict]:
  """Returns the rows of study.json by trial: how each one ended when it last ran."""
  path = study / "study.json"
  rows = json.loads(path.read_text()) if path.exists() else []
  return {row["trial"]: row for row in rows if "trial" in row}


def _row(study: pathlib.Path, name: str, overrides: dict, ended: str | None = None) -> dict:
  """Returns the row of a trial; `ended` is its status, None: what its files and locks say."""
  workdir = study / name
  result = result_of(workdir)
  status = "finished" if result else ended
  if status is None:
    running = holder(workdir) or holder(workdir, _SWEEPING)
    last = _ran(study).get(name, {}).get("status", "open")
    over = last.startswith(("finished", "running"))  # its folder is gone, its process died
    status = f"running, {running}" if running else "open" if over else last
  empty = {"trial": name, "step": None, "val_loss": None}
  return empty | (result or {}) | {"status": status, "overrides": overrides}


def _run_if_free(
  config_path,
  study: pathlib.Path,
  trials: dict[str, dict],
  name: str,
  before: dict | None,
  stop: Callable[[], bool],
) -> dict:
  """Runs a trial and writes its row, unless it is finished or another process has taken it.

  Args:
    trials: all overrides by name.
    before: the trial's row when this sweep began. One that is another by now, of a trial that
      failed, is of a sweep beside this one: the trial is not run twice.

  Returns:
    Its row.
  """
  workdir = study / name
  overrides = trials[name]
  workdir.mkdir(parents=True, exist_ok=True)
  try:
    with held(workdir, _SWEEPING):
      now = _ran(study).get(name)
      failed_beside = now != before and now["status"].startswith("exit")
      if failed_beside or holder(workdir) or result_of(workdir):
        return _row(study, name, overrides)
      code = run_trial(config_path, workdir, overrides, stop)
      # A process may have begun to train there just before.
      ended = None if holder(workdir) else f"exit {code}" if code else "stopped"
      row = _row(study, name, overrides, ended) | {"ended": time.time()}
      _write(study, [row], trials)
      return row
  except Held:
    return _row(study, name, overrides)


def _write(study: pathlib.Path, rows: list[dict], trials: dict[str, dict]):
  """Puts rows into study.json, beside those of sweeps that run at the same time."""
  study.mkdir(parents=True, exist_ok=True)
  with disk.space_for("the study's table", study), held(study, patience=_PATIENCE_SECONDS):
    found = _ran(study) | {row["trial"]: row for row in rows}
    ordered = [found[name] for name in trials if name in found]
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


def with_seeds(overrides: Iterable[dict], seeds: Sequence[int]) -> list[dict]:
  """Returns the overrides of every trial once with each seed; without seeds as they are.

  Raises:
    ConfigError: a trial has a seed of its own, or a seed is given twice.
  """
  overrides = list(overrides)
  if not seeds:
    return overrides
  if len(set(seeds)) < len(seeds):
    raise ConfigError(f"--seeds={','.join(map(str, seeds))} must name each seed once.")
  own = next((trial for trial in overrides if "seed" in trial), None)
  if own is not None:
    raise ConfigError(
      f"trial {trial_name(own)} sets its own seed; leave --seeds out, or the trial's seed."
    )
  return [trial | {"seed": seed} for trial in overrides for seed in seeds]


def sweep(
  config_path, study, extra: dict, list_only: bool = False, seeds: Sequence[int] = ()
) -> list[dict]:
  """Runs a study, or goes on with it, and returns its rows.

  Args:
    extra: overrides keys of every trial.
    list_only: nothing runs.
    seeds: every trial runs once with each; without any, with the config's own.

  Raises:
    ConfigError: a trial's config is wrong, or a trial ran with another config than it would run
      with now.
  """
  study = pathlib.Path(study)
  module = load_config(config_path, ("get_config", "sweep"))
  overrides = with_seeds((extra | own for own in module.sweep()), seeds)
  trials = {trial_name(own): own for own in overrides}
  stale = {}
  for name, overrides in trials.items():
    if text := _changed_since(study / name, _resolve(config_path, overrides)):
      stale[name] = text
  if stale and not list_only:
    name, text = next(iter(stale.items()))
    raise ConfigError(
      f"{len(stale)} of {len(trials)} trials under {study} ran with another config, e.g. {name}: "
      f"{text}; name another --study, undo the change, or delete those folders."
    )
  own = {}
  before = _ran(study)
  with StopRequest() as stop:
    for number, name in enumerate(trials, 1):
      if not list_only and not stop() and result_of(study / name) is None:
        logging.info("trial %d of %d: %s", number, len(trials), name)
        own[name] = _run_if_free(config_path, study, trials, name, before.get(name), stop)
        if own[name]["status"].startswith("running"):
          logging.info("%s is %s", name, own[name]["status"])
          del own[name]
  # What other sweeps ran meanwhile is as it is now.
  rows = [own.get(name) or _row(study, name, overrides) for name, overrides in trials.items()]
  if not list_only:
    _write(study, rows, trials)
  for row in rows:
    if row["trial"] in stale:
      row["status"] += f" with another config: {stale[row['trial']]}"
  return rows


def _seeds() -> list[int]:
  """Returns the numbers of --seeds=0,1,2."""
  try:
    return [int(seed) for seed in _SEEDS.value]
  except ValueError as error:
    given = ",".join(_SEEDS.value)
    raise ConfigError(f"--seeds={given} must be whole numbers, e.g. --seeds=0,1,2.") from error


def main(_):
  extra = {}
  for item in _OVERRIDE.value:
    key, separator, value = item.partition("=")
    if not separator:
      raise ConfigError(f"--override={item!r} must read key=value, e.g. train.steps=100.")
    extra[key] = value
  rows = sweep(_CONFIG.value, _STUDY.value, extra, _LIST.value, _seeds())
  print(table(rows))
  if pathlib.Path(_STUDY.value).exists():
    logging.info("%s", write_study(_STUDY.value, rows))
  failed = [row for row in rows if row["status"].startswith("exit")]
  if failed and not _LIST.value:
    logging.error("%d of %d trials failed; each has logged why above", len(failed), len(rows))
    sys.exit(1)


if __name__ == "__main__":
  # Not at import: other commands have a --config of their own.
  _CONFIG = cli.define_path("config", None, "Has get_config() and sweep().", required=True)
  _STUDY = cli.define_path("study", None, "Folder of the study.", required=True)
  _OVERRIDE = flags.DEFINE_multi_string("override", [], "key=value for every trial.")
  _SEEDS = flags.DEFINE_list("seeds", [], "Runs every trial once with each: --seeds=0,1,2.")
  _LIST = flags.DEFINE_bool("list", False, "Run nothing; show what has run, also in report.html.")
  cli.run(main)
