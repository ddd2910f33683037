"""Sparse attention against dense, trained alike on rendered clips: `make demo-compare`.

  python -m benchmarks.trained.demo_compare [--steps=800] [--seeds=0,1] [--workdir=runs/compare]
  python -m benchmarks.trained.demo_compare --count

Each run is a plain `python train.py --config=configs/comparison.py` with overrides; finished runs
are reused, killed ones resumed. A row holds the validation loss overall and per quarter of t
against the best per-channel linear prediction, attention FLOPs by exact count with the router's own
measured allocation, its probabilities per quarter of t, and artefacts of 64 samples
(`evaluate/quality.py`). `trained_at` and `seconds` are those of the run, which may be older than
the row. The row `training step` counts what a step costs with all branches that run; --count writes
it alone and trains nothing.
"""

import json
import pathlib
from collections.abc import Mapping
from operator import itemgetter

import numpy as np
from absl import flags

from benchmarks.rows import write_rows
from benchmarks.trained.runs import ROOT, Finished, run, table, train
from freqformer.command import cli
from freqformer.command.files import read_config
from freqformer.cost import model_cost, training_flops
from freqformer.data.render import render_ucf101
from freqformer.simulation.output import number
from freqformer.train.experiment import experiment

_NAME = "demo_compare"
METHODS = ("octaves", "freqformer", "dense")  # the shipped default, the abstract's, all pairs


def result_of(workdir: pathlib.Path, name: str, seed: int) -> dict:
  """Reads the row of one trained and sampled run."""
  trained = Finished(workdir)
  restored = trained.restored
  layout = restored.model.config.layout(restored.latent_shape)
  saved = np.load(workdir / "samples" / "latents.npz")
  record = json.loads((workdir / "run.json").read_text())
  return {
    "name": f"{name}/seed{seed}",
    "method": name,
    "tokens": layout.n,
    "tiles": layout.tiles,
    **trained.row(),
    **trained.routing_row(),
    **trained.artefacts(saved["latents"]),
    "trained_at": record["git"],
    "seconds": record["seconds"],
  }


def training_step(config: Mapping) -> dict:
  """Returns the row of a step's FLOPs per sample, forward and backward, of a config.

  With the share of dense attention's that every method takes.
  """
  exp = experiment(config)
  flops = {
    name: training_flops(model_cost(exp.model.with_method(name), exp.latent_shape, training=True))
    for name in METHODS
  }
  over_dense = {name: value / flops["dense"] for name, value in flops.items()}
  return {"name": "training step", "flops": flops, "over_dense": over_dense}


def summary(rows: list[dict], step: dict) -> tuple[dict, str]:
  """Returns the row of goals and whether they were met, and a printed table.

  Args:
    rows: of `result_of`.
    step: of `training_step`.
  """
  loss = {
    name: float(np.mean([r["val_loss"] for r in rows if r["method"] == name])) for name in METHODS
  }
  over_dense = {name: value / loss["dense"] for name, value in loss.items()}
  ours = [r for r in rows if r["method"] != "dense"]
  attention = max(r["attention_flops_over_dense"] for r in ours)
  goals = {
    "tokens >= 1024 and tiles >= 16": all(r["tokens"] >= 1024 and r["tiles"] >= 16 for r in rows),
    "attention FLOPs <= 40 % of dense": bool(attention <= 0.4),
    "validation loss within 3 % of dense": max(over_dense.values()) <= 1.03,
    "every bucket below the linear predictor": all(
      (np.asarray(r["val_buckets"]) < r["linear_buckets"]).all().item() for r in ours
    ),
  }
  row = {"name": "summary", "val_loss": loss, "over_dense": over_dense, "goals": goals}

  dense_seconds = {r["seed"]: r["seconds"]["train"] for r in rows if r["method"] == "dense"}

  def buckets(values):
    return " ".join(f"{value:7.4f}" for value in values)

  columns = {
    "run": itemgetter("name"),
    "loss": number("val_loss", ".4f"),
    "buckets (t = 0 .. 1)": lambda r: buckets(r["val_buckets"]),
    "attention/dense": number("attention_flops_over_dense", ".3f"),
    "density": number("density", ".3f"),
    "s": lambda r: f"{r['seconds']['train']:.0f}",
    "s/dense": lambda r: f"{r['seconds']['train'] / dense_seconds[r['seed']]:.2f}",
  }
  linear = rows[0]["linear_buckets"]
  lines = [table(rows, columns), f"linear predictor {np.mean(linear):.4f}: {buckets(linear)}"]
  lines.append(_step_text(step))
  lines += [f"{'met   ' if met else 'MISSED'} {goal}" for goal, met in goals.items()]
  return row, "\n".join(lines)


def _step_text(step: dict) -> str:
  """Returns the row of `training_step` as a line."""
  shares = ", ".join(f"{name} {share:.3f}" for name, share in step["over_dense"].items())
  return f"FLOPs of a training step over dense: {shares}"


def main(_):
  step = training_step(read_config(ROOT / "configs" / "comparison.py"))
  if _COUNT.value:
    write_rows(_NAME, [step], "python -m benchmarks.trained.demo_compare --count")
    print(_step_text(step))
    return
  render_ucf101(ROOT / "data" / "comparison")
  steps = _STEPS.value
  rows = []
  for seed in _SEEDS.value:
    for name in METHODS:
      workdir = (pathlib.Path(_WORKDIR.value) / f"{name}-seed{seed}-steps{steps}").absolute()
      train(
        "comparison.py",
        workdir,
        steps,
        seed=seed,
        model__attention__method=name,
        train__val_every=max(1, steps // 3),
      )
      if not (workdir / "samples" / "sampling.json").exists():
        run("eval.py", f"--workdir={workdir}", "--samples=8")
      rows.append(result_of(workdir, name, int(seed)))
  row, text = summary(rows, step)
  seeds = ",".join(_SEEDS.value)
  command = f"python -m benchmarks.trained.demo_compare --steps={steps} --seeds={seeds}"
  write_rows(_NAME, [*rows, step, row], command)
  print(text)


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", str(ROOT / "runs" / "compare"), "Folder of the runs.")
  _STEPS = flags.DEFINE_integer("steps", 800, "Optimisation steps of each run.")
  _COUNT = flags.DEFINE_bool("count", False, "Only count FLOPs of a training step.")
  _SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Seeds.")
  cli.run(main)
