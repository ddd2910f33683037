"""Sweeps over routing hyper-parameters: one workdir per trial, finished trials are skipped, killed ones resumed.

  python -m freqformer.sweep --config=configs/ucf101.py --study=runs/study
  python -m freqformer.sweep --config=configs/demo.py --study=runs/study --override=train.steps=100 --list

A config's `sweep()` yields flat overrides (`{"model.attention.freqformer.router.budget": 0.1}`); each trial is one
`python train.py` with them, so that a trial can be repeated by hand. The table at the end is also written as study.json.
"""

import hashlib
import json
import pathlib
import signal
import subprocess
import sys

from absl import flags, logging

from freqformer import cli, metrics
from freqformer.config import ConfigError
from freqformer.config_file import check_keys, load_config
from freqformer.preemption import StopRequest

_ROOT = pathlib.Path(__file__).parent.parent


def trial_name(overrides: dict) -> str:
  """A readable folder name, unique by a hash of all overrides."""
  short = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in overrides.items())
  safe = "".join(c if c.isalnum() or c in "=.-," else "_" for c in short)[:80]
  digest = hashlib.sha256(json.dumps(overrides, sort_keys=True, default=list).encode()).hexdigest()[:6]
  return f"{safe or 'default'}-{digest}"


def result_of(workdir: pathlib.Path) -> dict | None:
  """The last validation of a finished trial, None if it has not finished."""
  run = workdir / "run.json"
  if not run.exists() or not json.loads(run.read_text()).get("finished"):
    return None
  rows = metrics.read(workdir / "metrics.jsonl")
  last = {kind: next((r for r in reversed(rows) if r["kind"] == kind), {}) for kind in ("val", "val_soft", "train")}
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
    *(f"--config.{key}={value}" for key, value in overrides.items()),
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
  columns = ("trial", "val_loss", "val_soft_loss", "val_density", "router_entropy", "step", "status")
  cell = lambda v: "" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v)
  grid = [columns, *(tuple(cell(r.get(c)) for c in columns) for r in rows)]
  widths = [max(len(row[i]) for row in grid) for i in range(len(columns))]
  return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in grid)


def sweep(config_path, study, extra: dict, list_only: bool = False) -> list[dict]:
  """Runs (or goes on with) a study and returns its rows."""
  module, study, rows = load_config(config_path, ("get_config", "sweep")), pathlib.Path(study), []
  trials = [{**extra, **overrides} for overrides in module.sweep()]
  for overrides in trials:
    check_keys(module.get_config(), overrides)
  study.mkdir(parents=True, exist_ok=True)
  empty = {"step": None, "val_loss": None}
  with StopRequest() as stop:
    for number, overrides in enumerate(trials, 1):
      name = trial_name(overrides)
      workdir, status = study / name, "finished"
      result = result_of(workdir)
      if result is None and not list_only and not stop():
        logging.info("trial %d of %d: %s", number, len(trials), name)
        code = run_trial(config_path, workdir, overrides, stop)
        result = result_of(workdir)
        status = "finished" if result else f"exit {code}"
      elif result is None:
        status = "open"
      rows.append({"trial": name, **empty, **(result or {}), "status": status, "overrides": overrides})
      (study / "study.json").write_text(json.dumps(rows, indent=2, default=list))
  return rows


def main(_):
  extra = {}
  for item in _OVERRIDE.value:
    key, separator, value = item.partition("=")
    if not separator:
      raise ConfigError(f"--override={item!r} must read key=value, e.g. --override=train.steps=100.")
    extra[key] = value
  print(table(sweep(_CONFIG.value, _STUDY.value, extra, _LIST.value)))


if __name__ == "__main__":
  _CONFIG = flags.DEFINE_string("config", None, "Config file with get_config() and sweep().", required=True)
  _STUDY = flags.DEFINE_string("study", None, "Folder of the study.", required=True)
  _OVERRIDE = flags.DEFINE_multi_string("override", [], "key=value for every trial, e.g. train.steps=100.")
  _LIST = flags.DEFINE_bool("list", False, "Only show what has run.")
  cli.run(main)
