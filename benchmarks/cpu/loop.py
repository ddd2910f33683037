"""Milliseconds of the training loop's own work a step, and how long it waits for data.

  python -m benchmarks.cpu.loop            # 1 minute on 2 cores: results/loop_cpu.json
  python -m benchmarks.cpu.loop --quick    # few steps, no rows

The loop is that of `train.py` (`freqformer/train/run.py`) on configs/demo.py with all its data; the
figures are those of metrics.jsonl. `loop/nothing` replaces the compiled step by one that counts and
then sleeps, as the host does while a device computes: what a step takes beside that is the host's
own work, `host_ms`, and `data_ms`, in which it waits for a batch. `loop/demo` trains the model
itself, on the same cores. Neither validates; saving comes behind the last line.
"""

import dataclasses
import pathlib
import tempfile
import time
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks.rows import write_rows
from benchmarks.timing import beside_others
from benchmarks.trained.runs import ROOT
from freqformer.command import cli
from freqformer.command.files import read_config
from freqformer.data.render import DEMO, render_ucf101
from freqformer.pages.text import aligned
from freqformer.train import metrics, run

NAME = "loop_cpu"
# Goals: milliseconds beside a step that does nothing; share of the demo's steps that it waits.
BESIDE_MS = 2.0
DATA_WAIT = 0.02
_STEPS = {"loop/nothing": 500, "loop/demo": 100}
_QUICK_STEPS = 30
_SLEEP_SECONDS = 0.02  # choice: a short step; one of the demo takes ten times as long on two cores


def do_nothing(graphdef, config):
  """Stands in for `make_train_step`: a step that counts and sleeps, with metrics of its kind."""
  del graphdef, config

  @jax.jit
  def count(step):
    one = jnp.float32(1)
    told = {"loss": one, "grad_norm": one, "lr": one, "skipped": jnp.float32(0)}
    return step + 1, told | {"density": one, "cost": one}

  def step(state, batch, tables, numbers, posterior=None):
    del batch, tables, numbers, posterior
    number, told = count(state.step)
    time.sleep(_SLEEP_SECONDS)
    return dataclasses.replace(state, step=number), told

  return step


def lines(config: ConfigDict, steps: int, name: str) -> list[dict]:
  """Trains so many steps and returns the training lines; "loop/nothing" without a model's work."""
  config = config.copy_and_resolve_references()
  config.train.update(dict(steps=steps, checkpoint_every=steps, val_every=0))
  with (
    tempfile.TemporaryDirectory() as folder,
    unittest.mock.patch.object(
      run, "make_train_step", do_nothing if name == "loop/nothing" else run.make_train_step
    ),
  ):
    run.train(config, pathlib.Path(folder))
    found = metrics.read(pathlib.Path(folder) / "metrics.jsonl")
  return [row for row in found if row["kind"] == "train" and "loop" in row]


def row_of(name: str, rows: list[dict]) -> dict:
  """Returns what training lines say of a step: milliseconds, and shares of all their time.

  `beside_ms` is all that a step takes beside the call of the compiled one. Medians are over lines;
  `data_wait` is of the whole time, so that no long wait is hidden.
  """
  seconds = np.array([1 / row["steps_per_s"] for row in rows])
  host = np.array([row["loop"] for row in rows]) * seconds
  data = np.array([row["data_wait"] for row in rows]) * seconds
  return {
    "name": name,
    "lines": len(rows),
    "step_ms": 1000 * float(np.median(seconds)),
    "host_ms": 1000 * float(np.median(host)),
    "data_ms": 1000 * float(np.median(data)),
    "beside_ms": 1000 * float(np.median(host + data)),
    "beside_ms_p90": 1000 * float(np.percentile(host + data, 90)),
    "data_wait": float(data.sum() / seconds.sum()),
  }


def measure(config: ConfigDict, quick: bool) -> list[dict]:
  """Returns the row of each kind of step."""
  render_ucf101(ROOT / config.data.root, DEMO)
  config.data.root = str(ROOT / config.data.root)
  return [
    row_of(name, lines(config, _QUICK_STEPS if quick else steps, name))
    for name, steps in _STEPS.items()
  ]


def main(_):
  """Measures, prints a table and writes the rows, each with whether it reached its goal."""
  config = read_config(ROOT / "configs" / "demo.py")
  nothing, demo = beside_others(lambda: measure(config, _QUICK.value))
  rows = [
    nothing | {"goal": f"beside_ms <= {BESIDE_MS:g}", "met": nothing["beside_ms"] <= BESIDE_MS},
    demo | {"goal": f"data_wait <= {DATA_WAIT:g}", "met": demo["data_wait"] <= DATA_WAIT},
  ]
  shown = ("name", "step_ms", "host_ms", "data_ms", "beside_ms", "data_wait", "goal", "met")
  cells = (
    [f"{x:.3g}" if isinstance(x, float) else str(x) for x in map(row.get, shown)] for row in rows
  )
  print(aligned([shown, *map(tuple, cells)]))
  if not _QUICK.value:
    write_rows(NAME, rows, "python -m benchmarks.cpu.loop")


if __name__ == "__main__":
  _QUICK = flags.DEFINE_bool("quick", False, "Few steps; writes no rows.")
  cli.run(main)
