"""Sweeps over routing hyper-parameters: one workdir per trial, finished trials are skipped, killed ones resumed.

  python -m freqformer.sweep --config=configs/ucf101.py --study=runs/study
  python -m freqformer.sweep --config=configs/demo.py --study=runs/study --override=train.steps=100 --list

A config's `sweep()` yields flat overrides (`{"model.attention.freqformer.router.budget": 0.1}`); each trial is one
`python train.py` with them, so that a trial can be repeated by hand. All are checked before the first one runs. The table at
the end is also written as study.json; the exit code is 1 if a trial failed.
"""

import hashlib
import json
import pathlib
import signal
import subprocess
import sys

from absl import flags, logging
from ml_collections import config_flags

from freqformer.command import cli
from freqformer.command.files import check_keys, load_config
from freqformer.config import ConfigError
from freqformer.train import metrics
from freqformer.train.experiment import Experiment, experiment
from freqformer.train.preemption import StopRequest
from freqformer.train.resume import change_text, changes

_ROOT = pathlib.Path(__file__).parents[2]


def trial_name(overrides: dict) -> str:
  """A readable folder name, unique by a hash of all overrides."""
  short = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in overrides.items())
  safe = "".join(c if c.isalnum() or c in "=.-," else "_" for c in short)[:80]
  digest = hashlib.sha256(json.dumps(overrides, sort_keys=True, default=list).encode()).hexdigest()[
    :6
  ]
  return f"{safe or 'default'}-{digest}"


def resolve(config_path, overrides: dict) -> Experiment:
  """What `python train.py` makes of a config file and these overrides, parsed by the very same flags.

  Raises:
    ConfigError: names the trial and what is wrong with it.
  """
  argv = ["sweep", f"--config={config_path}", *_flags(overrides)]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=True)
  try:
    check_keys(load_config(config_path).get_config(), overrides)
    values(argv)
    return experiment(values.config)
  except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
    text = str(error.args[0] if error.args else error).replace("\n", " ")
    raise ConfigError(f"trial {trial_name(overrides)}: {text}") from error


def _flags(overrides: dict) -> list[str]:
  return [f"--config.{key}={value}" for key, value in overrides.items()]


def changed_since(workdir: pathlib.Path, exp: Experiment) -> str:
  """How the config that a trial ran with differs from the one it would run with now; empty if it does not."""
  path = workdir / "config.json"
  if not path.exists():
    return ""
  try:
    return change_text(changes(experiment(json.loads(path.read_text())), exp))
  except ValueError as error:  # cut off by a crash, or of another revision
    return f"its config.json cannot be read ({error})"


def result_of(workdir: pathlib.Path) -> dict | None:
  """The last validation of a finished trial, None if it has not finished."""
  run = workdir / "run.json"
  if not run.exists() or not json.loads(run.read_text()).get("finished"):
    return None
  rows = metrics.read(workdir / "metrics.jsonl")
  last = {
    kind: next((r for r in reversed(rows) if r["kind"] == kind), {})
    for kind in ("val", "val_soft", "train")
  }
  return {
    "step": last["train"].get("step"),
    "val_loss": last["val"].get("loss"),
    "val_density": last["val"].get("density"),
    "val_soft_loss": last["val_soft"].get("loss"),
    "router_entropy": last["train"].get("router_entropy"),
  }


def run_trial(config_path, workdir: pathlib.Path, overrides: dict, stop) -> int:
  """One `python train.py`; a stop request is passed on, so that the trial saves. Returns its exit code."""
  command = [
    sys.executable,
    str(_ROOT / "train.py"),
    f"--config={config_path}",
    f"--workdir={workdir}",
    *_flags(overrides),
  ]
  logging.info("%s", " ".join(command[1:]))
  process = subprocess.Popen(command)
  while True:
    try:
      return process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
      if stop() and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        return process.wait()


def table(rows: list[dict]) -> str:
  """Aligned text; trials in order of validation loss, unfinished ones last."""
  rows = sorted(rows, key=lambda r: (r["val_loss"] is None, r["val_loss"]))
  columns = (
    "trial",
    "val_loss",
    "val_soft_loss",
    "val_density",
    "router_entropy",
    "step",
    "status",
  )

  def cell(v):
    return "" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v)

  grid = [columns, *(tuple(cell(r.get(c)) for c in columns) for r in rows)]
  widths = [max(len(row[i]) for row in grid) for i in range(len(columns))]
  return "\n".join(
    "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in grid
  )


def sweep(config_path, study, extra: dict, list_only: bool = False) -> list[dict]:
  """Runs (or goes on with) a study and returns its rows; with `list_only` it runs and writes nothing.

  Raises:
    ConfigError: a trial's config is wrong, or a trial ran with another config than it would run with now.
  """
  module, study, rows = load_config(config_path, ("get_config", "sweep")), pathlib.Path(study), []
  trials = {
    trial_name(overrides): overrides for overrides in ({**extra, **own} for own in module.sweep())
  }
  stale = {
    name: changed_since(study / name, resolve(config_path, overrides))
    for name, overrides in trials.items()
  }
  stale = {name: text for name, text in stale.items() if text}
  if stale and not list_only:
    name, text = next(iter(stale.items()))
    raise ConfigError(
      f"{len(stale)} of {len(trials)} trials under {study} ran with another config, e.g. {name}: {text}; name another --study, "
      "undo the change, or delete those folders."
    )
  before = _last_status(study)
  with StopRequest() as stop:
    for number, (name, overrides) in enumerate(trials.items(), 1):
      workdir, result = study / name, result_of(study / name)
      status = "finished" if result else before.get(name, "open")
      if result is None and not list_only and not stop():
        logging.info("trial %d of %d: %s", number, len(trials), name)
        code = run_trial(config_path, workdir, overrides, stop)
        result = result_of(workdir)
        status = "finished" if result else f"exit {code}" if code else "stopped"
      if name in stale:
        status += f" with another config: {stale[name]}"
      rows.append(
        {
          "trial": name,
          "step": None,
          "val_loss": None,
          **(result or {}),
          "status": status,
          "overrides": overrides,
        }
      )
      if not list_only:
        study.mkdir(parents=True, exist_ok=True)
        (study / "study.json").write_text(json.dumps(rows, indent=2, default=list))
  return rows


def _last_status(study: pathlib.Path) -> dict[str, str]:
  """How each trial ended when the study last ran: one that failed is not merely open."""
  path = study / "study.json"
  if not path.exists():
    return {}
  return {
    row["trial"]: row["status"]
    for row in json.loads(path.read_text())
    if row["status"] != "finished"
  }


def main(_):
  extra = {}
  for item in _OVERRIDE.value:
    key, separator, value = item.partition("=")
    if not separator:
      raise ConfigError(
        f"--override={item!r} must read key=value, e.g. --override=train.steps=100."
      )
    extra[key] = value
  rows = sweep(_CONFIG.value, _STUDY.value, extra, _LIST.value)
  print(table(rows))
  if failed := [] if _LIST.value else [row for row in rows if row["status"].startswith("exit")]:
    logging.error("%d of %d trials failed; each has said why above", len(failed), len(rows))
    sys.exit(1)


if __name__ == "__main__":
  _CONFIG = flags.DEFINE_string(
    "config", None, "Config file with get_config() and sweep().", required=True
  )
  _STUDY = flags.DEFINE_string("study", None, "Folder of the study.", required=True)
  _OVERRIDE = flags.DEFINE_multi_string(
    "override", [], "key=value for every trial, e.g. train.steps=100."
  )
  _LIST = flags.DEFINE_bool("list", False, "Only show what has run.")
  cli.run(main)
