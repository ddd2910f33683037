"""FreqFormer against dense attention, both trained on the demo's data: `make demo-compare`.

  python -m benchmarks.trained.demo_compare [--steps=1500] [--seeds=0,1] [--workdir=runs/compare]

Each run is a plain `python train.py --config=configs/demo.py` with overrides; finished runs are
reused, killed ones resumed. A row holds the validation loss overall and per quarter of t against
the best per-channel linear prediction, attention FLOPs by exact count with the router's own
measured allocation, its probabilities per quarter of t, and the accuracy of a ridge classifier on
64 samples. `trained_at` and `seconds` are those of the run, which may be older than the row.
"""

import json
import pathlib
from operator import itemgetter

import numpy as np
from absl import flags

from benchmarks.rows import write_rows
from benchmarks.trained.runs import ROOT, Finished, run, table, train
from freqformer.command import cli
from freqformer.data.render import render_ucf101
from freqformer.simulation.output import number


def result_of(workdir: pathlib.Path, name: str, seed: int) -> dict:
  """Reads the row of one trained and sampled run."""
  trained = Finished(workdir)
  restored = trained.restored
  layout = restored.model.config.layout(restored.latent_shape)
  routing = trained.routing
  saved = np.load(workdir / "samples" / "latents.npz")
  record = json.loads((workdir / "run.json").read_text())
  return {
    "name": f"{name}/seed{seed}",
    "method": name,
    "tokens": layout.n,
    "tiles": layout.tiles,
    **trained.row(),
    # Mean over layers and heads, [quarters of t][branches], t = 0 first.
    "branches": routing and routing["branches"],
    "probability_by_t": routing and np.asarray(routing["probs"]).mean((0, 2)).tolist(),
    "classifier": trained.accuracy(saved["latents"], saved["labels"]),
    "trained_at": record["git"],
    "seconds": record["seconds"],
  }


def summary(rows: list[dict]) -> tuple[dict, str]:
  """Returns the row of goals and whether they were met, and a printed table."""
  ours = [r for r in rows if r["method"] == "freqformer"]
  loss = {
    name: float(np.mean([r["val_loss"] for r in rows if r["method"] == name]))
    for name in ("freqformer", "dense")
  }
  over_dense = max(r["attention_flops_over_dense"] for r in ours)
  goals = {
    "tokens >= 1024 and tiles >= 16": all(r["tokens"] >= 1024 and r["tiles"] >= 16 for r in rows),
    "attention FLOPs <= 40 % of dense": bool(over_dense <= 0.4),
    "validation loss within 3 % of dense": bool(loss["freqformer"] <= 1.03 * loss["dense"]),
    "every bucket below the linear predictor": all(
      (np.asarray(r["val_buckets"]) < r["linear_buckets"]).all().item() for r in ours
    ),
    "classifier names >= 50 % of samples": all(r["classifier"]["samples"] >= 0.5 for r in ours),
  }
  row = {
    "name": "summary",
    "val_loss": loss,
    "freqformer_over_dense": loss["freqformer"] / loss["dense"],
    "goals": goals,
  }

  def buckets(values):
    return " ".join(f"{value:7.4f}" for value in values)

  columns = {
    "run": itemgetter("name"),
    "loss": number("val_loss", ".4f"),
    "buckets (t = 0 .. 1)": lambda r: buckets(r["val_buckets"]),
    "attention/dense": number("attention_flops_over_dense", ".3f"),
    "density": number("density", ".3f"),
    "samples": lambda r: f"{r['classifier']['samples']:.2f}",
    "real": lambda r: f"{r['classifier']['real_val']:.2f}",
  }
  linear = rows[0]["linear_buckets"]
  lines = [table(rows, columns), f"linear predictor {np.mean(linear):.4f}: {buckets(linear)}"]
  lines += [f"{'met   ' if met else 'MISSED'} {goal}" for goal, met in goals.items()]
  return row, "\n".join(lines)


def main(_):
  render_ucf101(ROOT / "data" / "demo")
  steps = _STEPS.value
  rows = []
  for seed in _SEEDS.value:
    for name in ("freqformer", "dense"):
      workdir = (pathlib.Path(_WORKDIR.value) / f"{name}-seed{seed}-steps{steps}").absolute()
      train(
        "demo.py",
        workdir,
        steps,
        seed=seed,
        model__attention__method=name,
        train__val_every=max(1, steps // 3),
      )
      if not (workdir / "samples" / "sampling.json").exists():
        run("eval.py", f"--workdir={workdir}", "--samples=8")
      rows.append(result_of(workdir, name, int(seed)))
  row, text = summary(rows)
  seeds = ",".join(_SEEDS.value)
  command = f"python -m benchmarks.trained.demo_compare --steps={steps} --seeds={seeds}"
  write_rows("demo_compare", [*rows, row], command)
  print(text)


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", str(ROOT / "runs" / "compare"), "Folder of the runs.")
  _STEPS = flags.DEFINE_integer("steps", 1500, "Optimisation steps of each run.")
  _SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Seeds.")
  cli.run(main)
