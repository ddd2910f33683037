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
from freqformer.analysis.timed_layer import layer_rows
from freqformer.command import cli
from freqformer.command.files import read_config
from freqformer.data.cache import LatentCache, prepare
from freqformer.data.render import render_ucf101
from freqformer.evaluate.quality import artefacts, spread
from freqformer.evaluate.restore import load_run
from freqformer.pages.mp4 import write_mp4
from freqformer.pages.run import write_report
from freqformer.train.experiment import experiment

_ROOT = CHECKOUT or pathlib.Path.cwd()
_SOURCE_FPS = 25  # frames per second of the rendered clips
_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the run.")
_CONFIG = flags.DEFINE_string("config", str(_ROOT / "configs" / "demo.py"), "Config of the run.")


def _command(*arguments: str):
  """Runs a Python command as a user would; leaves if it fails."""
  logging.info("---- python %s", " ".join(arguments))
  code = subprocess.run([sys.executable, *arguments], cwd=_ROOT, check=False).returncode
  if code:
    sys.exit(code)


def _write_real_clips(cache: LatentCache, workdir: pathlib.Path, fps: float) -> np.ndarray:
  """Writes one training clip per class, decoded from its latent, to compare samples with.

  Returns:
    Their latents `[classes, t, y, x, c]`.
  """
  first = {}
  for item in map(cache.__getitem__, range(len(cache))):
    first.setdefault(cache.class_names[int(item["label"])], item["latent"])
  for name, latent in first.items():
    write_mp4(workdir / "real" / f"{name}.mp4", cache.decode(latent[None])[0], fps)
  return np.stack(list(first.values()))


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
    "training clips": _write_real_clips(cache, workdir, _SOURCE_FPS / exp.data.stride),
    "validation clips": spread(prepare(exp.data, "val")),
  }
  trained = load_run(workdir)
  evaluation = {}
  for name, latents in clips.items():
    found = artefacts(trained, latents, clips["validation clips"])
    evaluation[name] = {"count": len(latents), **found}
  _write(workdir / "evaluation.json", evaluation)
  allocation = None
  if (workdir / "routing.json").exists():
    routing = json.loads((workdir / "routing.json").read_text())
    allocation = np.asarray(routing["choice"]).mean((0, 1, 2))
  _write(workdir / "cost.json", layer_rows(exp.model, tuple(cache.latent_shape), allocation))

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
