"""Stores what a run of the demo took and what its judge says: benchmarks/results/demo.json.

  make demo && python -m benchmarks.trained.demo [--workdir=runs/demo]

Nothing is run here: the row holds the seconds of run.json, the last validation of metrics.jsonl and
the rows of evaluation.json. The first three fields say which code trained it.
"""

import json
import pathlib

from absl import flags

from benchmarks.rows import context, write_rows
from freqformer.command import cli
from freqformer.config import ConfigError
from freqformer.train import metrics

_KEPT = ("name", "unit", "value", "floor", "controls", "samples", "real")


def row_of(workdir: pathlib.Path) -> dict:
  """Returns the row of a finished demo.

  Raises:
    ConfigError: the run has no evaluation.json, or was not finished.
  """
  if not (workdir / "evaluation.json").exists():
    raise ConfigError(f"{workdir} has no evaluation.json: run make demo first.")
  run = json.loads((workdir / "run.json").read_text())
  if not run.get("finished"):
    raise ConfigError(f"{workdir} is not finished: the same make demo goes on with it.")
  losses = [row for row in metrics.read(workdir / "metrics.jsonl") if row["kind"] == "val"]
  evaluation = json.loads((workdir / "evaluation.json").read_text())
  return {
    "trained_at": run["git"],
    "trained_with": run["versions"],
    "trained_on": run["device"],
    "name": "demo",
    "method": run["method"],
    "parameters": run["params"],
    "tokens": run["tokens"],
    "steps": losses[-1]["step"],
    "seconds": {name: round(value, 1) for name, value in run["seconds"].items()},
    "validation_loss": losses[-1]["loss"],
    "metrics": [{key: row[key] for key in _KEPT if key in row} for row in evaluation],
  }


def main(_):
  command = "make demo && python -m benchmarks.trained.demo"
  row = row_of(pathlib.Path(_WORKDIR.value))
  write_rows("demo", [context(command) | row], command)
  for metric in row["metrics"]:
    print(f"{metric['name']}: {metric['value']:.4g} {metric['unit']}")


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the demo's run.")
  cli.run(main)
