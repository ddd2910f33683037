"""Every trainable method from scratch at equal steps on the demo's data: validation loss beside FLOPs.

  python -m benchmarks.trained.methods_train [--steps=200] [--workdir=runs/methods_train] [--only=dense,radial]

Trials are those of configs/methods.py: one model, one seed, the same batches, about the same density (0.19 to 0.24); each is a
plain `python train.py`, so finished runs are reused and killed ones go on. A row is written when its run is finished. One seed
and a few hundred steps rank how fast methods learn here, not how well they end: nothing has converged.
"""

import json
import pathlib

import numpy as np
from absl import flags

from benchmarks.rows import RESULTS, read_rows, write_rows
from benchmarks.trained.demo_compare import finished, run
from freqformer.command import cli
from freqformer.command.files import load_config
from freqformer.cost import BACKWARD_OVER_FORWARD, model_cost
from freqformer.data.render import render_ucf101
from freqformer.evaluate.restore import load_run
from freqformer.train import metrics

_ROOT = pathlib.Path(__file__).parents[2]
_CONFIG = _ROOT / "configs" / "methods.py"
_NAME = "methods_train_cpu"
_KEY = "model.attention.method"


def trials() -> list[str]:
  """Methods of the sweep, in its order."""
  return [trial[_KEY] for trial in load_config(_CONFIG, ("get_config", "sweep")).sweep()]


def train(workdir: pathlib.Path, method: str, steps: int):
  """One trial, unless it is finished."""
  if not finished(workdir, steps):
    run(
      "train.py",
      f"--config={_CONFIG}",
      f"--workdir={workdir}",
      f"--config.{_KEY}={method}",
      f"--config.train.steps={steps}",
      f"--config.train.val_every={steps}",
      "--config.train.val_batches=16",
      "--config.train.checkpoint_every=50",
    )


def result_of(workdir: pathlib.Path, method: str) -> dict:
  """The row of a finished run. Routed methods: FLOPs by the heads' own hard choices on validation clips, and the soft loss."""
  restored = load_run(workdir)
  model = restored.model
  last = {
    kind: next(
      (r for r in reversed(metrics.read(workdir / "metrics.jsonl")) if r["kind"] == kind), None
    )
    for kind in KINDS
  }
  allocations = None
  if (workdir / "routing.json").exists():
    choice = np.asarray(json.loads((workdir / "routing.json").read_text())["choice"])
    allocations = [tuple(choice.mean((0, 1, 2)))] * len(model.config.runs())
  shape = restored.latent_shape
  cost, training = (
    model_cost(model.config, shape, allocations),
    model_cost(model.config, shape, training=True),
  )
  dense = model_cost(model.config.with_method("dense"), shape)
  return {
    "name": method,
    "method": method,
    "steps": restored.step,
    "seed": restored.experiment.seed,
    "val_loss": last["val"]["loss"],
    "val_soft_loss": None if last["val_soft"] is None else last["val_soft"]["loss"],
    "val_buckets": last["val"]["buckets"],
    "linear_buckets": last["val"]["linear_buckets"],
    "density": last["val"]["density"],
    "attention_flops_over_dense": cost.attention_flops / dense.attention_flops,
    "all_flops_over_dense": cost.total / dense.total,
    "training_flops_over_dense": training_flops(training) / training_flops(dense),
    "allocation": None if allocations is None else [float(x) for x in allocations[0]],
  }


KINDS = ("val", "val_soft")


def training_flops(cost) -> float:
  """Forward and backward: attention's backward is 2.5 times its forward, that of plain matmuls twice."""
  return (1 + BACKWARD_OVER_FORWARD) * cost.attention_flops + 3 * cost.linear_flops


def table(rows: list[dict], methods: list[str]) -> str:
  """Rows in order of validation loss, then what is missing."""
  rows = sorted((r for r in rows if r["name"] in methods), key=lambda r: r["val_loss"])
  lines = [
    f"{'method':16} {'steps':>5} {'val loss':>8} {'soft':>7} {'density':>8} {'attention':>9} {'all FLOPs':>9} {'training':>9}"
  ]
  for r in rows:
    soft = f"{r['val_soft_loss']:7.4f}" if r["val_soft_loss"] else f"{'':7}"
    lines.append(
      f"{r['method']:16} {r['steps']:5} {r['val_loss']:8.4f} {soft} {r['density']:8.3f} {r['attention_flops_over_dense']:9.3f} "
      f"{r['all_flops_over_dense']:9.3f} {r['training_flops_over_dense']:9.3f}"
    )
  missing = [m for m in methods if m not in {r["name"] for r in rows}]
  if rows:
    lines.append(f"linear predictor {np.mean(rows[0]['linear_buckets']):14.4f}")
  return "\n".join(lines + ([f"missing: {', '.join(missing)}"] if missing else []))


def main(_):
  render_ucf101(_ROOT / "data" / "demo")
  command = f"python -m benchmarks.trained.methods_train --steps={_STEPS.value}"
  for method in _ONLY.value or trials():
    workdir = (pathlib.Path(_WORKDIR.value) / f"{method}-steps{_STEPS.value}").absolute()
    train(workdir, method, _STEPS.value)
    write_rows(_NAME, [result_of(workdir, method)], command)
  rows = [r for r in read_rows(RESULTS / f"{_NAME}.json") if r["steps"] == _STEPS.value]
  print(table(rows, trials()))


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string(
    "workdir", str(_ROOT / "runs" / "methods_train"), "Folder of the runs."
  )
  _STEPS = flags.DEFINE_integer("steps", 200, "Optimisation steps of each run.", lower_bound=1)
  _ONLY = flags.DEFINE_list("only", None, "Only these methods.")
  cli.run(main)
