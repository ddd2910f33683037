"""Records of a run: `metrics.jsonl` (rows), `run.json`, `config.json` and `routing.json`."""

import contextlib
import json
import pathlib
import time

import numpy as np
from ml_collections import ConfigDict

from freqformer.diffusion.flow import BUCKETS
from freqformer.model.config import ModelConfig
from freqformer.train.throughput import Throughput


class Metrics:
  """Writes a run's records into its folder."""

  def __init__(self, workdir, throughput: Throughput | None = None):
    self.workdir = pathlib.Path(workdir)
    self.path = self.workdir / "metrics.jsonl"
    self._run = self.workdir / "run.json"
    self._throughput = throughput
    self._last_line: tuple[int, float] | None = None  # step and time of the last training line

  def start(self, step: int, config: ConfigDict, run: dict):
    """Begins the records with facts for `run.json`; a resumed run drops lines of later steps."""
    rows = [row for row in read(self.path) if row["step"] <= step] if step else []
    self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (self.workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    old = json.loads(self._run.read_text()) if self._run.exists() and step else {}
    self._run.write_text(json.dumps(old | run | {"finished": False}, indent=2))

  def write(self, step: int, kind: str, **values):
    """Appends one line; arrays become lists."""
    plain = {name: np.asarray(value).tolist() for name, value in values.items()}
    with self.path.open("a") as file:
      file.write(json.dumps({"step": step, "kind": kind, **plain}) + "\n")

  def train(self, step: int, values: dict):
    """Appends a training line, with the speed since the last one."""
    now = time.monotonic()
    speed = {}
    if self._last_line is not None:
      rate = (step - self._last_line[0]) / (now - self._last_line[1])
      speed = self._throughput.rates(rate)
    self._last_line = (step, now)
    self.write(step, "train", **values, **speed)

  def finish(self, seconds: dict[str, float], finished: bool):
    """Adds wall-clock seconds to `run.json`, summed over resumed processes."""
    run = json.loads(self._run.read_text())
    total = run.get("seconds", {})
    for name, value in seconds.items():
      total[name] = total.get(name, 0.0) + value
    run |= {"seconds": total, "finished": finished}
    self._run.write_text(json.dumps(run, indent=2))


def read(path) -> list[dict]:
  """Reads all lines of a metrics file; a line cut off by a crash is dropped."""
  path = pathlib.Path(path)
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(json.JSONDecodeError):
      rows.append(json.loads(line))
  return rows


def write_routing(workdir, result: dict, model: ModelConfig):
  """Writes `routing.json`, mean probability and share of hard choices of each branch.

  Nothing is written if the `result` of `evaluate` tells of no routed head.
  """
  if "probs" not in result:
    return
  branches = next(method.branches for _, method in model.runs() if method.branches)
  routing = {
    "branches": list(branches),
    "bucket_edges": [i / BUCKETS for i in range(BUCKETS + 1)],
    # [layers][quarters of t][heads][branches]
    "probs": np.round(result["probs"], 5).tolist(),
    "choice": np.round(result["choice"], 5).tolist(),
  }
  (pathlib.Path(workdir) / "routing.json").write_text(json.dumps(routing))
