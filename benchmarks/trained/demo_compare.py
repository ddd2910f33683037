"""FreqFormer against dense attention, trained from scratch at equal steps on the demo's data: `make demo-compare`.

  python -m benchmarks.trained.demo_compare [--steps=1500] [--seeds=0,1] [--workdir=runs/compare]

Each run is a plain `python train.py --config=configs/demo.py` with overrides; finished runs are reused, killed ones resumed.
Then per run: validation loss overall and per quarter of t against the best per-channel linear prediction, attention FLOPs by
exact count with the router's own measured allocation, its probabilities per quarter of t, and the accuracy of a ridge
classifier on 64 samples. `trained_at` and `seconds` are those of the run, which may be older than the row.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import flags, logging

from benchmarks.rows import write_rows
from freqformer.command import cli
from freqformer.cost import model_cost
from freqformer.data.cache import prepare
from freqformer.data.render import render_ucf101
from freqformer.evaluate.classifier import class_accuracy
from freqformer.evaluate.restore import load_run
from freqformer.train import metrics
from freqformer.train.checkpoint import Checkpoints

_ROOT = pathlib.Path(__file__).parents[2]
_CONFIG = _ROOT / "configs" / "demo.py"


def run(*command):
  """One of our own commands in its own process."""
  logging.info("python %s", " ".join(command))
  subprocess.run([sys.executable, *command], cwd=_ROOT, check=True)


def finished(workdir: pathlib.Path, steps: int) -> bool:
  """Whether a run with this many steps is complete."""
  return (workdir / "checkpoints").is_dir() and Checkpoints(workdir, create=False).latest() == steps


def result_of(workdir: pathlib.Path, name: str, seed: int) -> dict:
  """The row of one trained and sampled run."""
  restored = load_run(workdir)
  model = restored.model
  val = [r for r in metrics.read(workdir / "metrics.jsonl") if r["kind"] == "val"][-1]
  soft = [r for r in metrics.read(workdir / "metrics.jsonl") if r["kind"] == "val_soft"]
  allocations, mean, routing = None, None, None
  if (workdir / "routing.json").exists():
    # Hard choices per layer, averaged over layers and quarters of t: the share of heads that each branch really gets.
    routing = json.loads((workdir / "routing.json").read_text())
    mean = np.asarray(routing["choice"]).mean((0, 1, 2))
    allocations = [tuple(mean)] * len(model.config.runs())
  cost = model_cost(model.config, restored.latent_shape, allocations)
  dense = model_cost(model.config.with_method("dense"), restored.latent_shape)
  saved = np.load(workdir / "samples" / "latents.npz")
  data = restored.experiment.data
  accuracy = class_accuracy(
    prepare(data, "train"), prepare(data, "val"), saved["latents"], saved["labels"]
  )
  layout, run = (
    model.config.layout(restored.latent_shape),
    json.loads((workdir / "run.json").read_text()),
  )
  return {
    "name": f"{name}/seed{seed}",
    "method": name,
    "seed": seed,
    "steps": restored.step,
    "tokens": layout.n,
    "tiles": layout.tiles,
    "val_loss": val["loss"],
    "val_buckets": val["buckets"],
    "linear_buckets": val["linear_buckets"],
    "val_soft_loss": soft[-1]["loss"] if soft else None,
    "attention_flops": cost.attention_flops,
    "attention_flops_over_dense": cost.attention_flops / dense.attention_flops,
    "realised_density": val["density"],
    "allocation": None if mean is None else mean.tolist(),
    "branches": None if routing is None else routing["branches"],
    # Mean over layers and heads, [quarters of t][branches], t = 0 first.
    "probability_by_t": None
    if routing is None
    else np.asarray(routing["probs"]).mean((0, 2)).tolist(),
    "classifier": accuracy,
    "trained_at": run["git"],
    "seconds": run["seconds"],
  }


def summary(rows: list[dict]) -> tuple[dict, str]:
  """Goals and whether they were met, and a printed table."""

  def by(name):
    return [r for r in rows if r["method"] == name]

  loss = {
    name: float(np.mean([r["val_loss"] for r in by(name)])) for name in ("freqformer", "dense")
  }
  ours = by("freqformer")
  below = all(
    a < b for r in ours for a, b in zip(r["val_buckets"], r["linear_buckets"], strict=True)
  )
  goals = {
    "tokens >= 1024 and tiles >= 16": bool(
      min(r["tokens"] for r in rows) >= 1024 and min(r["tiles"] for r in rows) >= 16
    ),
    "attention FLOPs <= 40 % of dense": bool(
      max(r["attention_flops_over_dense"] for r in ours) <= 0.4
    ),
    "validation loss within 3 % of dense": bool(loss["freqformer"] <= 1.03 * loss["dense"]),
    "every bucket below the linear predictor": below,
    "classifier names >= 50 % of samples": bool(
      min(r["classifier"]["samples"] for r in ours) >= 0.5
    ),
  }
  row = {
    "name": "summary",
    "val_loss": loss,
    "freqformer_over_dense": loss["freqformer"] / loss["dense"],
    "goals": goals,
  }
  lines = [
    f"{'run':18} {'loss':>7} {'buckets (t = 0 .. 1)':^31} {'attention/dense':>15} {'density':>8} {'samples':>8} {'real':>6}"
  ]
  for r in rows:
    buckets = " ".join(f"{b:7.4f}" for b in r["val_buckets"])
    lines.append(
      f"{r['name']:18} {r['val_loss']:7.4f} {buckets} {r['attention_flops_over_dense']:15.3f} "
      f"{r['realised_density']:8.3f} {r['classifier']['samples']:8.2f} {r['classifier']['real_val']:6.2f}"
    )
  linear = " ".join(f"{b:7.4f}" for b in rows[0]["linear_buckets"])
  lines.append(f"{'linear predictor':18} {np.mean(rows[0]['linear_buckets']):7.4f} {linear}")
  lines += [f"{'met   ' if met else 'MISSED'} {goal}" for goal, met in goals.items()]
  return row, "\n".join(lines)


def main(_):
  root = pathlib.Path(_WORKDIR.value)
  render_ucf101(_ROOT / "data" / "demo")
  rows = []
  for seed in _SEEDS.value:
    for name in ("freqformer", "dense"):
      workdir = (root / f"{name}-seed{seed}-steps{_STEPS.value}").absolute()
      if not finished(workdir, _STEPS.value):
        run(
          "train.py",
          f"--config={_CONFIG}",
          f"--workdir={workdir}",
          f"--config.seed={seed}",
          f"--config.model.attention.method={name}",
          f"--config.train.steps={_STEPS.value}",
          f"--config.train.val_every={max(1, _STEPS.value // 3)}",
          "--config.train.val_batches=16",
        )
      if not (workdir / "samples" / "sampling.json").exists():
        run("eval.py", f"--workdir={workdir}", "--samples=8")
      rows.append(result_of(workdir, name, int(seed)))
  row, text = summary(rows)
  command = f"python -m benchmarks.trained.demo_compare --steps={_STEPS.value} --seeds={','.join(_SEEDS.value)}"
  write_rows("demo_compare", [*rows, row], command)
  print(text)


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", str(_ROOT / "runs" / "compare"), "Folder of the runs.")
  _STEPS = flags.DEFINE_integer("steps", 1500, "Optimisation steps of each run.")
  _SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Seeds.")
  cli.run(main)
