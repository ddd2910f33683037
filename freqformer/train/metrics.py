"""Records of a run: `metrics.jsonl` (rows), `run.json`, `config.json` and `routing.json`."""

import collections
import contextlib
import json
import math
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from freqformer.diffusion.flow import BUCKETS
from freqformer.disk import write_whole
from freqformer.model.config import ModelConfig
from freqformer.train.throughput import Throughput
from freqformer.train.trackers import Trackers


class Metrics:
  """Writes a run's records into its folder.

  Lines carry what training has taken so far, over all processes of a run: `flops` of its steps, and
  `seconds` of them, without compiling (with which a process begins) and validation. A run that goes
  on from a checkpoint without these totals, of an earlier version, has lines without them.
  """

  def __init__(self, workdir, throughput: Throughput | None = None):
    self.workdir = pathlib.Path(workdir)
    self.path = self.workdir / "metrics.jsonl"
    self._run = self.workdir / "run.json"
    self._throughput = throughput
    self.trackers = Trackers()  # which show lines elsewhere
    self._before: dict | None = None  # `totals` where this process began, and its `step`
    self._seconds = 0.0  # of training in this process, until the clock was last stopped
    self._clock: float | None = None  # when it was last started; None while it stands
    self._last_line: tuple[int, float] | None = None  # step and seconds of the last training line
    self._parts = collections.Counter()  # `timed` seconds since that line

  def start(
    self,
    step: int,
    config: ConfigDict,
    run: dict,
    totals: dict | None = None,
    trackers: Sequence[str] | None = None,
  ):
    """Begins the records; a run that is resumed or rolled back drops lines of later steps.

    Args:
      step: of the checkpoint that training goes on from, or 0.
      config: for `config.json`.
      run: facts for `run.json`.
      totals: `totals` at that checkpoint.
      trackers: `train.trackers`; None: those that there are.
    """
    if not step:
      totals = {"flops": 0.0, "seconds": 0.0}
    self._before = totals and {"step": step, **totals}
    self._seconds = 0.0
    self._clock = None
    rows = [row for row in read(self.path) if row["step"] <= step] if step else []
    write_whole(self.path, "".join(map(_line, rows)))
    write_whole(self.workdir / "config.json", json.dumps(config.to_dict(), indent=2))
    old = json.loads(self._run.read_text()) if self._run.exists() and step else {}
    write_whole(self._run, json.dumps(old | run | {"finished": False}, indent=2))
    if trackers is not None:
      self.trackers = Trackers.open(trackers, self.workdir, step, config.to_dict())

  def change(self, step: int, throughput: Throughput):
    """Counts the steps behind this one by a throughput, those up to it by the one before."""
    if self._before is not None:
      self._before |= {"flops": self._flops(step), "step": step}
    self._throughput = throughput

  def start_clock(self, step: int):
    """Begins to count seconds, behind the steps that compiled."""
    self._clock = time.monotonic()
    self._last_line = (step, self._seconds)
    self._parts.clear()

  @contextlib.contextmanager
  def timed(self, part: str):
    """Adds the time of what is done inside to a part of training: "data_wait" or "step"."""
    clock = time.monotonic()
    yield
    self._parts[part] += time.monotonic() - clock

  @contextlib.contextmanager
  def paused(self):
    """Leaves the time of what is done inside out of the seconds of training."""
    self._seconds = self._trained()
    self._clock = None
    yield
    self._clock = time.monotonic()

  def _trained(self) -> float:
    """Returns seconds of training in this process."""
    running = 0.0 if self._clock is None else time.monotonic() - self._clock
    return self._seconds + running

  def totals(self, step: int) -> dict[str, float] | None:
    """Returns FLOPs and seconds of the run up to a step, for its checkpoint; None if unknown."""
    if self._before is None:
      return None
    seconds = self._before["seconds"] + self._trained()
    return {"flops": self._flops(step), "seconds": seconds}

  def _flops(self, step: int) -> float:
    """Returns FLOPs of the run up to a step, where they are known."""
    return self._before["flops"] + (step - self._before["step"]) * self._throughput.flops

  def write(self, step: int, kind: str, **values):
    """Appends one line with the totals of the run; arrays become lists, as `finite` has them."""
    plain = {name: np.asarray(value).tolist() for name, value in values.items()}
    plain |= self.totals(step) or {}
    with self.path.open("a") as file:
      file.write(_line({"step": step, "kind": kind, **plain}))
    self.trackers.scalars(step, kind, plain)

  def train(self, step: int, values: dict):
    """Appends a training line, with the speed of the steps since the last one.

    `data_wait` is the share of their seconds in which the loop waits for data, `loop` the share in
    which it waits neither for data nor for the step: its own work, with saving.
    """
    now = self._trained()
    speed = {}
    if self._last_line is not None and step > self._last_line[0]:
      seconds = now - self._last_line[1]
      speed = self._throughput.rates((step - self._last_line[0]) / seconds)
      speed["data_wait"] = self._parts["data_wait"] / seconds
      speed["loop"] = max(0.0, 1 - self._parts.total() / seconds)
    self._parts.clear()
    self._last_line = (step, now)
    self.write(step, "train", **values, **speed)

  def finish(self, seconds: dict[str, float], finished: bool, best: dict | None = None):
    """Closes the trackers and adds wall-clock seconds to `run.json`, summed over processes.

    Args:
      best: `step` and `val_loss` of the best checkpoint, if it is known.
    """
    self.trackers.close()
    run = json.loads(self._run.read_text())
    total = run.get("seconds", {})
    for name, value in seconds.items():
      total[name] = total.get(name, 0.0) + value
    run |= {"seconds": total, "finished": finished}
    if best is not None:
      run["best"] = best
    write_whole(self._run, json.dumps(run, indent=2))


def finite(value):
  """Returns plain JSON with None for each number that is not finite: JSON has no such numbers."""
  if isinstance(value, dict):
    return {key: finite(own) for key, own in value.items()}
  if isinstance(value, list | tuple):
    return [finite(own) for own in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: dict) -> str:
  return json.dumps(finite(row), allow_nan=False) + "\n"


def read(path) -> list[dict]:
  """Reads all lines of a metrics file; a line cut off by a crash is dropped."""
  path = pathlib.Path(path)
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(json.JSONDecodeError):
      rows.append(json.loads(line))
  return rows


def write_routing(workdir, result: dict, model: ModelConfig, time_range: tuple[float, float]):
  """Writes `routing.json`, mean weight and share of hard choices of each branch.

  Nothing is written if the `result` of `evaluate` tells of no routed head.
  """
  if "probs" not in result:
    return
  routing = {
    "branches": list(model.branches),
    "bucket_edges": np.linspace(*time_range, BUCKETS + 1).tolist(),
    # [layers][quarters of t][heads][branches]
    "probs": np.round(result["probs"], 5).tolist(),
    "choice": np.round(result["choice"], 5).tolist(),
  }
  write_whole(pathlib.Path(workdir) / "routing.json", json.dumps(finite(routing)))
