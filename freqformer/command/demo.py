"""`make demo`: from nothing to videos, a routing heatmap and a table with true numbers, in minutes on two CPU cores.

Renders a small UCF-101-shaped data set, then runs the very commands that a user would: train.py, eval.py, the report.
"""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
from absl import flags, logging

from freqformer.analysis.timed_layer import layer_rows
from freqformer.command import cli
from freqformer.command.files import load_config
from freqformer.data.cache import prepare
from freqformer.data.render import render_ucf101
from freqformer.evaluate.classifier import class_accuracy
from freqformer.pages.mp4 import write_mp4
from freqformer.pages.run import write_report
from freqformer.train.experiment import experiment

_ROOT = pathlib.Path(__file__).parents[2]
_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the run.")
_CONFIG = flags.DEFINE_string("config", str(_ROOT / "configs" / "demo.py"), "Config of the run.")


def step(seconds: dict, name: str, *command):
  """Runs one of our own commands as a user would, and notes how long it took."""
  logging.info("---- %s: python %s", name, " ".join(command))
  clock = time.monotonic()
  code = subprocess.run([sys.executable, *command], cwd=_ROOT, check=False).returncode
  seconds[name] = time.monotonic() - clock
  if code:
    sys.exit(code)


def real_clips(cache, workdir, fps):
  """One training clip per class, through the codec, beside the samples."""
  shown = set()
  for i in range(len(cache)):
    item = cache[i]
    name = cache.class_names[int(item["label"])]
    if name not in shown:
      shown.add(name)
      write_mp4(workdir / "real" / f"{name}.mp4", cache.decode(item["latent"][None])[0], fps)


def main(_):
  workdir, seconds, started = pathlib.Path(_WORKDIR.value).absolute(), {}, time.monotonic()
  config = load_config(_CONFIG.value).get_config()
  exp = experiment(config)
  clock = time.monotonic()
  render_ucf101(_ROOT / exp.data.root)
  seconds["render"] = time.monotonic() - clock
  step(seconds, "train", "train.py", f"--config={_CONFIG.value}", f"--workdir={workdir}")
  step(seconds, "sample", "eval.py", f"--workdir={workdir}")
  (workdir / "real").mkdir(parents=True, exist_ok=True)
  cache = prepare(exp.data, "train")
  real_clips(cache, workdir, 25 / exp.data.stride)
  drawn = np.load(workdir / "samples" / "latents.npz")
  accuracy = class_accuracy(cache, prepare(exp.data, "val"), drawn["latents"], drawn["labels"])
  (workdir / "evaluation.json").write_text(json.dumps({"classifier": accuracy}, indent=2))
  allocation = None
  if (workdir / "routing.json").exists():
    choice = np.asarray(json.loads((workdir / "routing.json").read_text())["choice"])
    allocation = choice.mean((0, 1, 2))
  (workdir / "cost.json").write_text(
    json.dumps(layer_rows(exp.model, tuple(cache.latent_shape), allocation), indent=2)
  )
  run = json.loads((workdir / "run.json").read_text())
  sampling = json.loads((workdir / "samples" / "sampling.json").read_text())
  run["seconds"] = {
    **run["seconds"],
    "render": seconds["render"],
    "sample": sampling["compile_seconds"] + sampling["run_seconds"],
    "total": time.monotonic() - started,
  }
  (workdir / "run.json").write_text(json.dumps(run, indent=2))
  print(f"report: {write_report(workdir)}  ({run['seconds']['total']:.0f} s)")


if __name__ == "__main__":
  cli.run(main)
