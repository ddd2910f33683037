"""Runs the demo: renders a small data set, trains, samples and writes the report.

`make demo` does it in minutes on two CPU cores, by the very commands that a user would give.
"""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
from absl import flags, logging

from freqformer import CHECKOUT
from freqformer.analysis.timed_steps import write_seconds
from freqformer.command import cli
from freqformer.command.files import read_config
from freqformer.data.cache import prepare
from freqformer.data.render import render_ucf101
from freqformer.evaluate.quality import artefacts, spread
from freqformer.evaluate.restore import load_run
from freqformer.pages.progress import first_clips
from freqformer.pages.run import write_report
from freqformer.train.experiment import experiment

_ROOT = CHECKOUT or pathlib.Path.cwd()
_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the run.")
_CONFIG = flags.DEFINE_string("config", str(_ROOT / "configs" / "demo.py"), "Config of the run.")


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
  render_ucf101(_ROOT / exp.data.root)
  render_seconds = time.monotonic() - clock
  arguments = [f"--config={_CONFIG.value}", f"--workdir={workdir}"]
  _command("-m", "freqformer.command.train", *arguments)
  _command("-m", "freqformer.command.eval", f"--workdir={workdir}")

  cache = prepare(exp.data, "train")
  clips = {
    "samples": np.load(workdir / "samples" / "latents.npz")["latents"],
    # As few as samples: how far some real clips lie from others.
    "training clips": np.stack(list(first_clips(cache, range(len(cache.class_names))).values())),
    "validation clips": spread(prepare(exp.data, "val")),
  }
  trained = load_run(workdir)
  evaluation = {}
  for name, latents in clips.items():
    found = artefacts(trained, latents, clips["validation clips"])
    evaluation[name] = {"count": len(latents), **found}
  _write(workdir / "evaluation.json", evaluation)
  write_seconds(workdir)

  run = json.loads((workdir / "run.json").read_text())
  sampling = json.loads((workdir / "samples" / "sampling.json").read_text())
  run["seconds"] |= {
    "render": render_seconds,
    "sample": sampling["compile_seconds"] + sampling["run_seconds"],
    "total": time.monotonic() - started,
  }
  _write(workdir / "run.json", run)
  print(f"report: {write_report(workdir)}  ({run['seconds']['total']:.0f} s)")


def _write(path: pathlib.Path, value):
  path.write_text(json.dumps(value, indent=2))


if __name__ == "__main__":
  cli.run(main)
