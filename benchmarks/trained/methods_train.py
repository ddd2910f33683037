"""Every trainable method from scratch at equal steps on the demo's data: validation loss and FLOPs.

  python -m benchmarks.trained.methods_train [--steps=200] [--workdir=runs/methods_train]
                                             [--only=dense,radial]

Trials are those of configs/methods.py: one model, one seed, the same batches, about the same
density (0.19 to 0.24); each is a plain `python train.py`, so finished runs are reused and killed
ones resumed. A row is written when its run is finished. One seed and a few hundred steps rank how
fast methods learn here, not how well they end: nothing has converged.
"""

import pathlib

import numpy as np
from absl import flags

from benchmarks.rows import RESULTS, read_rows, write_rows
from benchmarks.trained.runs import ROOT, Finished, train
from freqformer.command import cli
from freqformer.command.files import load_config
from freqformer.cost import model_cost, training_flops
from freqformer.data.render import render_ucf101

_NAME = "methods_train_cpu"


def trials() -> list[str]:
  """Methods of the sweep, in its order."""
  config = load_config(ROOT / "configs" / "methods.py", ("get_config", "sweep"))
  return [trial["model.attention.method"] for trial in config.sweep()]


def result_of(workdir: pathlib.Path, method: str) -> dict:
  """Reads the row of a finished run; FLOPs of a routed method are those of its measured heads."""
  run = Finished(workdir)
  config = run.model.config
  cost = run.cost()
  dense = run.dense_cost()
  training = model_cost(config, run.restored.latent_shape, training=True)
  return {
    "name": method,
    "method": method,
    "steps": run.restored.step,
    "seed": run.restored.experiment.seed,
    **run.losses(),
    "density": run.last("val")["density"],
    "attention_flops_over_dense": cost.attention_flops / dense.attention_flops,
    "all_flops_over_dense": cost.total / dense.total,
    "training_flops_over_dense": training_flops(training) / training_flops(dense),
    "allocation": run.allocation and list(run.allocation),
  }


def table(rows: list[dict], methods: list[str]) -> str:
  """Formats rows in order of validation loss, then names the methods that are missing."""
  rows = sorted((r for r in rows if r["name"] in methods), key=lambda r: r["val_loss"])
  lines = [
    f"{'method':16} {'steps':>5} {'val loss':>8} {'soft':>7} {'density':>8} {'attention':>9} "
    f"{'all FLOPs':>9} {'training':>9}"
  ]
  for r in rows:
    soft = f"{r['val_soft_loss']:7.4f}" if r["val_soft_loss"] else f"{'':7}"
    lines.append(
      f"{r['method']:16} {r['steps']:5} {r['val_loss']:8.4f} {soft} {r['density']:8.3f} "
      f"{r['attention_flops_over_dense']:9.3f} {r['all_flops_over_dense']:9.3f} "
      f"{r['training_flops_over_dense']:9.3f}"
    )
  if rows:
    lines.append(f"linear predictor {np.mean(rows[0]['linear_buckets']):14.4f}")
  if missing := [m for m in methods if m not in {r["name"] for r in rows}]:
    lines.append(f"missing: {', '.join(missing)}")
  return "\n".join(lines)


def main(_):
  render_ucf101(ROOT / "data" / "demo")
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
  print(table(rows, trials()))


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string(
    "workdir", str(ROOT / "runs" / "methods_train"), "Folder of the runs."
  )
  _STEPS = flags.DEFINE_integer("steps", 200, "Optimisation steps of each run.", lower_bound=1)
  _ONLY = flags.DEFINE_list("only", None, "Only these methods.")
  cli.run(main)
