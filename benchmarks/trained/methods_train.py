"""Every trainable method from scratch at equal steps on the demo's data: validation loss and FLOPs.

  python -m benchmarks.trained.methods_train [--steps=200] [--workdir=runs/methods_train]
                                             [--only=dense,radial]

Trials are those of configs/methods.py: one model, one seed, the same batches, about the same
density (0.19 to 0.24); each is a plain `python train.py`, so finished runs are reused and killed
ones resumed. A row is written when its run is finished. One seed and a few hundred steps rank how
fast methods learn here, not how well they end: nothing has converged.
"""

import pathlib
from operator import itemgetter

import numpy as np
from absl import flags

from benchmarks.rows import RESULTS, read_rows, write_rows
from benchmarks.trained.runs import ROOT, Finished, table, train
from freqformer.command import cli
from freqformer.command.files import load_config
from freqformer.cost import model_cost, training_flops
from freqformer.data.render import render_ucf101
from freqformer.simulation.output import number

_NAME = "methods_train_cpu"


def trials() -> list[str]:
  """Methods of the sweep, in its order."""
  config = load_config(ROOT / "configs" / "methods.py", ("get_config", "sweep"))
  return [trial["model.attention.method"] for trial in config.sweep()]


def result_of(workdir: pathlib.Path, method: str) -> dict:
  """Reads the row of a finished run; FLOPs of a routed method are those of its measured heads."""
  run = Finished(workdir)
  config = run.restored.model.config
  shape = run.restored.latent_shape
  training = model_cost(config, shape, training=True)
  dense = model_cost(config.with_method("dense"), shape)
  over_dense = training_flops(training) / training_flops(dense)
  return {"name": method, "method": method, **run.row(), "training_flops_over_dense": over_dense}


def ranked(rows: list[dict], methods: list[str]) -> str:
  """Formats rows in order of validation loss, then names the methods that are missing."""
  rows = sorted((r for r in rows if r["name"] in methods), key=itemgetter("val_loss"))
  columns = {
    "method": itemgetter("method"),
    "steps": number("steps", ".0f"),
    "val loss": number("val_loss", ".4f"),
    "soft": number("val_soft_loss", ".4f"),
    "density": number("density", ".3f"),
    "attention": number("attention_flops_over_dense", ".3f"),
    "all FLOPs": number("all_flops_over_dense", ".3f"),
    "training": number("training_flops_over_dense", ".3f"),
  }
  lines = [table(rows, columns)]
  if rows:
    lines.append(f"linear predictor {np.mean(rows[0]['linear_buckets']):.4f}")
  if missing := [m for m in methods if m not in {r["name"] for r in rows}]:
    lines.append(f"missing: {', '.join(missing)}")
  return "\n".join(lines)


def main(_):
  render_ucf101(ROOT / "data" / "comparison")
  steps = _STEPS.value
  command = f"python -m benchmarks.trained.methods_train --steps={steps}"
  for method in _ONLY.value or trials():
    workdir = (pathlib.Path(_WORKDIR.value) / f"{method}-steps{steps}").absolute()
    train(
      "methods.py",
      workdir,
      steps,
      model__attention__method=method,
      train__val_every=steps,
      train__checkpoint_every=50,
    )
    write_rows(_NAME, [result_of(workdir, method)], command)
  rows = [r for r in read_rows(RESULTS / f"{_NAME}.json") if r["steps"] == steps]
  print(ranked(rows, trials()))


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string(
    "workdir", str(ROOT / "runs" / "methods_train"), "Folder of the runs."
  )
  _STEPS = flags.DEFINE_integer("steps", 200, "Optimisation steps of each run.", lower_bound=1)
  _ONLY = flags.DEFINE_list("only", None, "Only these methods.")
  cli.run(main)
