"""The demo with one of its choices undone, 400 steps each: what its parts are worth.

  make core && python -m benchmarks.trained.demo_parts [--only=shipped,adamw] [--steps=400]

Every run is a plain `python train.py --config=configs/demo.py` with the overrides of `PARTS`, and
finished ones are reused. Rows, in benchmarks/results/demo_parts.json, hold losses of validation
clips and what the router gives to each branch. One seed: differences of a few percent say nothing.
"""

import json
import pathlib
from operator import itemgetter

from absl import flags

from benchmarks.rows import write_rows
from benchmarks.trained.runs import ROOT, Finished, table, train
from freqformer.command import cli
from freqformer.config import ConfigError
from freqformer.data.render import DEMO, render_ucf101
from freqformer.simulation.output import number

_OCTAVES = "model__attention__octaves__"
PARTS = {
  "shipped": {},
  "adamw": {"train__optimizer": "adamw"},
  "cosine": {"train__schedule": "cosine"},
  "constant rate": {"train__schedule": "constant"},
  "no preconditioner": {"model__precondition": False},
  "no positions": {"model__positions": False},
  "logit-normal t": {"train__time_sampling": "logit_normal"},
  "dense": {"model__attention__method": "dense"},
  "freqformer": {"model__attention__method": "freqformer"},
  "windows by octant": {f"{_OCTAVES}window": (2, 1, 1), f"{_OCTAVES}deal": "octant"},
  "a distribution": {f"{_OCTAVES}router__mode": "soft"},
  "a penalty": {f"{_OCTAVES}router__penalty": 0.1, f"{_OCTAVES}router__budget": 0.3},
}


def row_of(name: str, workdir: pathlib.Path) -> dict:
  """Returns the row of a finished run."""
  finished = Finished(workdir)
  return {
    "name": name,
    **finished.row(),
    **finished.routing_row(),
    "trained_at": json.loads((workdir / "run.json").read_text())["git"],
  }


def main(_):
  unknown = set(_ONLY.value) - set(PARTS)
  if unknown:
    raise ConfigError(f"unknown parts {sorted(unknown)}; there are: {', '.join(PARTS)}.")
  render_ucf101(ROOT / "data" / "demo", DEMO)
  steps = _STEPS.value
  rows = []
  for name in _ONLY.value:
    workdir = ROOT / "runs" / "parts" / f"{name.replace(' ', '-')}-steps{steps}"
    train("demo.py", workdir, steps, train__val_every=steps, **PARTS[name])
    rows.append(row_of(name, workdir))
    write_rows("demo_parts", rows[-1:], f"python -m benchmarks.trained.demo_parts --steps={steps}")
  columns = {
    "part": itemgetter("name"),
    "loss": number("val_loss", ".4f"),
    "per quarter of t (1 = noise)": lambda r: " ".join(f"{x:.3f}" for x in r["val_buckets"]),
    "density": number("density", ".3f"),
  }
  print(table(rows, columns))


if __name__ == "__main__":
  _ONLY = flags.DEFINE_list("only", list(PARTS), "Parts to run.")
  _STEPS = flags.DEFINE_integer("steps", 400, "Optimisation steps of each run.", lower_bound=1)
  cli.run(main)
