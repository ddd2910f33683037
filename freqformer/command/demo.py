"""Runs the demo: renders a small data set, trains, samples and writes the report.

`make demo` does it in minutes on two CPU cores, by the very commands that a user would give. A
judge that sees no colours then says which of the samples' classes it can name.
"""

import json
import pathlib
import subprocess
import sys
import time

from absl import flags, logging

from freqformer import CHECKOUT
from freqformer.command import cli
from freqformer.command.files import read_config
from freqformer.data.render import DEMO, render_ucf101
from freqformer.disk import write_whole
from freqformer.pages.run import write_report
from freqformer.train.experiment import experiment

_ROOT = CHECKOUT or pathlib.Path.cwd()
_SAMPLES = 8  # of each class
_JUDGE_CLIPS = 256
_WORKDIR = cli.define_path("workdir", "runs/demo", "Folder of the run.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps of training instead of the config's.", 1)
_CONFIG = cli.define_path("config", str(_ROOT / "configs" / "demo.py"), "Config of the run.")


def _command(*arguments: str):
  """Runs a Python command as a user would; leaves if it fails."""
  logging.info("---- python %s", " ".join(arguments))
  code = subprocess.run([sys.executable, *arguments], cwd=_ROOT, check=False).returncode
  if code:
    sys.exit(code)


def main(_):
  started = time.monotonic()
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  exp = experiment(read_config(_CONFIG.value))
  clock = time.monotonic()
  render_ucf101(_ROOT / exp.data.root, DEMO)
  render_seconds = time.monotonic() - clock
  here = f"--workdir={workdir}"
  steps = [f"--config.train.steps={_STEPS.value}"] if _STEPS.value else []
  _command("-m", "freqformer.command.train", f"--config={_CONFIG.value}", here, *steps)
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
