"""Metrics of a run: `metrics.jsonl` (one JSON object a line), `run.json`, `config.json`, `routing.json`."""

import json
import pathlib
import time

import numpy as np

from freqformer.diffusion.flow import BUCKETS


class Metrics:
  """Writes a run's records; resuming drops lines from after the checkpoint, so that no step stands twice."""

  def __init__(self, workdir, throughput=None):
    self.throughput = throughput
    self.workdir = pathlib.Path(workdir)
    self.path = self.workdir / "metrics.jsonl"
    self._clock = None

  def start(self, step: int, config, run: dict):
    """Call once, with the step that the run goes on from and what `run.json` says of it."""
    rows = [row for row in read(self.path) if row["step"] <= step] if step else []
    self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (self.workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    old = json.loads(self._run.read_text()) if self._run.exists() and step else {}
    self._run.write_text(json.dumps({**old, **run, "finished": False}, indent=2))

  @property
  def _run(self):
    return self.workdir / "run.json"

  def write(self, step: int, kind: str, **values):
    """Appends one line; arrays become lists."""
    plain = {k: np.asarray(v).tolist() if not isinstance(v, str) else v for k, v in values.items()}
    with self.path.open("a") as file:
      file.write(json.dumps({"step": step, "kind": kind, **plain}) + "\n")

  def train(self, step: int, values: dict):
    """A training line, with the speed since the last one (of a `Throughput`: what the device does in that time, too)."""
    now, speed = time.monotonic(), {}
    if self._clock is not None:
      rate = (step - self._clock[0]) / (now - self._clock[1])
      speed = {"steps_per_s": rate} if self.throughput is None else self.throughput.rates(rate)
    self._clock = (step, now)
    self.write(step, "train", **values, **speed)

  def finish(self, seconds: dict, finished: bool):
    """Adds wall-clock seconds to `run.json` (summed over resumed processes)."""
    run = json.loads(self._run.read_text())
    total = run.get("seconds", {})
    run["seconds"] = {**total, **{k: total.get(k, 0.0) + v for k, v in seconds.items()}}
    self._run.write_text(json.dumps({**run, "finished": finished}, indent=2))


def read(path) -> list[dict]:
  """All lines of a metrics file; a line cut off by a crash is dropped."""
  rows = []
  if pathlib.Path(path).exists():
    for line in pathlib.Path(path).read_text().splitlines():
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        continue
  return rows


def channel_power(cache, limit: int = 256) -> np.ndarray:
  """Mean square of the normalised latents per channel `[c]`, over at most `limit` of them."""
  count = min(len(cache), limit)
  return np.mean(
    [np.mean(np.square(cache[i]["latent"]), axis=(0, 1, 2)) for i in range(count)], 0
  ).astype(np.float32)


def write_routing(workdir, result: dict, model):
  """`routing.json`: mean probability and share of hard choices, [layers][quarters of t][heads][branches]."""
  if "probs" not in result:
    return
  branches = next(m.branches for _, m in model.runs() if m.branches)
  (pathlib.Path(workdir) / "routing.json").write_text(
    json.dumps(
      {
        "branches": list(branches),
        "bucket_edges": [i / BUCKETS for i in range(BUCKETS + 1)],
        "probs": np.round(result["probs"], 5).tolist(),
        "choice": np.round(result["choice"], 5).tolist(),
      }
    )
  )
