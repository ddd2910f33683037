"""Runs the demo: renders a small data set, trains, samples and writes the report.

  python -m freqformer.demo                                         what `make demo` does
  python -m freqformer.demo --workdir=runs/longer --steps=5000      however long that takes

It gives the very commands that a user would give. A few steps are timed first, and training takes
as many as --minutes have room for, the config's at most. A judge that sees no colours then says
which of the samples' classes it can name.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags, logging

from freqformer import CHECKOUT
from freqformer.command import cli
from freqformer.command.files import read_config
from freqformer.data.render import DEMO, render_ucf101
from freqformer.disk import write_whole
from freqformer.pages.run import write_report
from freqformer.train import metrics
from freqformer.train.experiment import experiment
from freqformer.train.throughput import steps_within

_ROOT = CHECKOUT or pathlib.Path.cwd()
_SAMPLES = 8  # of each class
_JUDGE_CLIPS = 256
# choice: steps that are timed, and rows of the log at whose rate a run is expected to go on.
_TIMED_STEPS = 40
_TIMED_ROWS = 3
_STEPS_AT_ONCE = 50  # the number of steps is a multiple of it
# choice: samples, judge and report take as long as so many steps of training.
_AFTERWARDS = 300
_WITH_VALIDATION = 1.1  # choice: seconds of training and validation over those of its steps
_TRAIN = ("-m", "freqformer.command.train")
_WORKDIR = cli.define_path("workdir", "runs/demo", "Folder of the run.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps of training, however long they take.", 1)
_MINUTES = flags.DEFINE_float("minutes", 8.5, "What the demo may take in all.", lower_bound=1)
_CONFIG = cli.define_path("config", str(_ROOT / "configs" / "demo.py"), "Config of the run.")


def _command(*arguments: str):
  """Runs a Python command as a user would; leaves if it fails."""
  logging.info("---- python %s", " ".join(arguments))
  code = subprocess.run([sys.executable, *arguments], cwd=_ROOT, check=False).returncode
  if code:
    sys.exit(code)


def _begun(workdir: pathlib.Path) -> int | None:
  """Returns the steps of the run that was begun in a folder; None if there is none."""
  path = workdir / "config.json"
  return json.loads(path.read_text())["train"]["steps"] if path.exists() else None


def _step_seconds() -> float:
  """Returns how long a training step takes here, validation included; it leaves the data encoded.

  The program is compiled on the way, for the run itself, too: steps are no part of it.
  """
  with tempfile.TemporaryDirectory() as folder:
    short = {"steps": _TIMED_STEPS, "val_every": 0, "samples": 0}
    keys = [f"--config.train.{key}={value}" for key, value in short.items()]
    _command(*_TRAIN, f"--config={_CONFIG.value}", f"--workdir={folder}", *keys)
    rows = metrics.read(pathlib.Path(folder) / "metrics.jsonl")
  rates = [row["steps_per_s"] for row in rows if "steps_per_s" in row]
  return _WITH_VALIDATION / min(rates[-_TIMED_ROWS:])


def main(_):
  started = time.monotonic()
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  exp = experiment(read_config(_CONFIG.value))
  clock = time.monotonic()
  render_ucf101(_ROOT / exp.data.root, DEMO)
  render_seconds = time.monotonic() - clock
  here = f"--workdir={workdir}"
  steps = _STEPS.value or _begun(workdir)
  if steps is None:
    seconds = _step_seconds()
    left = 60 * _MINUTES.value - (time.monotonic() - started) - _AFTERWARDS * seconds
    steps = steps_within(left, seconds, exp.train.steps, _STEPS_AT_ONCE)
    logging.info(
      "a step takes %.2f s: %d of %d steps in %g minutes",
      seconds,
      steps,
      exp.train.steps,
      _MINUTES.value,
    )
  _command(*_TRAIN, f"--config={_CONFIG.value}", here, f"--config.train.steps={steps}")
  _command("-m", "freqformer.command.eval", here, f"--samples={_SAMPLES}")
  clock = time.monotonic()
  judge = ("--samples=samples", "--metrics=judge,psd,flicker", f"--judge_clips={_JUDGE_CLIPS}")
  _command("-m", "freqformer.command.measure", here, *judge)
  judge_seconds = time.monotonic() - clock

  path = workdir / "run.json"
  run = json.loads(path.read_text())
  sampling = json.loads((workdir / "samples" / "sampling.json").read_text())
  run["seconds"] |= {
    "render": render_seconds,
    "sample": sampling["compile_seconds"] + sampling["run_seconds"],
    "judge": judge_seconds,
    "total": time.monotonic() - started,
  }
  write_whole(path, json.dumps(run, indent=2))
  print(f"report: {write_report(workdir)}  ({run['seconds']['total']:.0f} s)")


if __name__ == "__main__":
  cli.run(main)
