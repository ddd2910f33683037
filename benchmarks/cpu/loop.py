"""Milliseconds of the training loop's own work a step, and how long it waits for data and disk.

  python -m benchmarks.cpu.loop            # 1 minute on 2 cores: results/loop_cpu.json
  python -m benchmarks.cpu.loop --quick    # few steps, no rows

The loop is that of `train.py` (`freqformer/train/run.py`) on configs/demo.py with all its data.
`loop/nothing` replaces the compiled step by one that counts and then sleeps, as the host does while
a device computes. `work_ms` is the processor time of the loop's thread from the end of one such
step to the beginning of the next, `beside_ms` the wall clock between them: with the wait for a
batch, and for cores that the loader or another program has. `loop/demo` trains the model itself, on
the same cores; its figures are those of metrics.jsonl. Neither validates; saving comes at the end.

`save/waits` and `save/background` save a state, in turns: `held_ms` is how long the loop stands
still, `written_ms` how long it takes until the checkpoint is on disk (medians). Nothing else runs.
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
from freqformer.train import metrics, run
from freqformer.train.checkpoint import Checkpoints

NAME = "loop_cpu"
WORK_MS = 2.0  # goal: the loop's work a step
DATA_WAIT = 0.02  # goal: share of the demo's training that waits for data
_STEPS = {"loop/nothing": 500, "loop/demo": 100}
_QUICK_STEPS = 30
_SLEEP_SECONDS = 0.02  # choice: a short step; one of the demo takes ten times as long on two cores
_STATE = (100, 640_000)  # arrays, numbers of each: 256 MB
_SAVES = 5


@jax.jit
def _count(step):
  one = jnp.float32(1)
  told = {"loss": one, "grad_norm": one, "lr": one, "skipped": jnp.float32(0)}
  return step + 1, told | {"density": one, "cost": one}


@dataclasses.dataclass
class Between:
  """Seconds between the calls of a step that does nothing: wall clock, and of the loop's thread."""

  wall: list[float] = dataclasses.field(default_factory=list)
  work: list[float] = dataclasses.field(default_factory=list)

  def make_train_step(self, graphdef, config, dense=0):
    """Stands in for the function of this name: returns a step that counts and sleeps."""
    del graphdef, config, dense
    ended = None

    def step(state, batch, tables, numbers, posterior=None):
      nonlocal ended
      del batch, tables, numbers, posterior
      if ended is not None:
        self.wall.append(time.perf_counter() - ended[0])
        self.work.append(time.thread_time() - ended[1])
      number, told = _count(state.step)
      time.sleep(_SLEEP_SECONDS)
      ended = time.perf_counter(), time.thread_time()
      return dataclasses.replace(state, step=number), told

    return step

  def row(self) -> dict:
    """Returns milliseconds a step, of all steps that log and that do not."""
    return {
      "work_ms": 1000 * float(np.mean(self.work)),
      "beside_ms": 1000 * float(np.mean(self.wall)),
      "beside_ms_median": 1000 * float(np.median(self.wall)),
    }


def shares(rows: list[dict]) -> dict:
  """Returns what training lines of metrics.jsonl say of all their time together."""
  seconds = np.array([1 / row["steps_per_s"] for row in rows])
  parts = {name: np.array([row[name] for row in rows]) for name in ("data_wait", "loop")}
  found = {name: float((seconds * part).sum() / seconds.sum()) for name, part in parts.items()}
  return {"step_ms": 1000 * float(np.mean(seconds)), **found}


def measure(config: ConfigDict, quick: bool) -> list[dict]:
  """Returns the row of each kind of step."""
  render_ucf101(ROOT / config.data.root, DEMO)
  config.data.root = str(ROOT / config.data.root)
  between = Between()
  own = {"loop/nothing": between.make_train_step, "loop/demo": run.make_train_step}
  rows = []
  for name, make_train_step in own.items():
    steps = _QUICK_STEPS if quick else _STEPS[name]
    config.train.update(dict(steps=steps, checkpoint_every=steps, val_every=0))
    with tempfile.TemporaryDirectory() as folder:
      with unittest.mock.patch.object(run, "make_train_step", make_train_step):
        run.train(config, pathlib.Path(folder))
      lines = metrics.read(pathlib.Path(folder) / "metrics.jsonl")
    rows.append({"name": name, "steps": steps, **shares([x for x in lines if "loop" in x])})
  rows[0] |= between.row()
  return rows


def saves(arrays: int, numbers: int, rounds: int) -> list[dict]:
  """Returns the row of each kind of saving, of a state of so many arrays of so many numbers."""
  keys = jax.random.split(jax.random.key(0), arrays)
  state = {str(i): jax.random.normal(key, (numbers,)) for i, key in enumerate(keys)}
  times = {"save/waits": [], "save/background": []}
  with tempfile.TemporaryDirectory() as folder:
    kinds = {
      name: Checkpoints(pathlib.Path(folder) / name, keep=1, in_background="background" in name)
      for name in times
    }
    for turn in range(rounds + 1):
      for name, checkpoints in kinds.items():
        began = time.perf_counter()
        checkpoints.save(turn, state, {})
        held = time.perf_counter()
        checkpoints.wait()
        times[name].append((held - began, time.perf_counter() - began))
  rows = []
  for name, found in times.items():
    held, written = 1000 * np.median(found[1:], 0)  # the first one warms up
    row = {"name": name, "bytes": 4 * arrays * numbers, "saves": rounds}
    rows.append({**row, "held_ms": float(held), "written_ms": float(written)})
  return rows


def main(_):
  """Measures, prints a table and writes the rows, each with its goal."""
  config = read_config(ROOT / "configs" / "demo.py")
  quick = _QUICK.value
  nothing, demo = beside_others(lambda: measure(config, quick))
  saving = beside_others(lambda: saves(*((2, 100, 1) if quick else (*_STATE, _SAVES))))
  goals = {"work_ms": (nothing, WORK_MS), "data_wait": (demo, DATA_WAIT)}
  rows = [
    row | {"goal": f"{key} <= {most:g}", "met": row[key] <= most}
    for key, (row, most) in goals.items()
  ] + saving
  for row in rows:
    print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
  if not quick:
    write_rows(NAME, rows, "python -m benchmarks.cpu.loop")


if __name__ == "__main__":
  _QUICK = flags.DEFINE_bool("quick", False, "Few steps; writes no rows.")
  cli.run(main)
