"""FLOPs and seconds of a run are those of its training steps, over all its processes."""

import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from freqformer.pages.files import metric_rows
from freqformer.pages.losses import by_timestep, losses
from freqformer.train import metrics
from freqformer.train.metrics import Metrics
from freqformer.train.throughput import Throughput

THROUGHPUT = Throughput(flops=100.0, dense_flops=300.0, peak=None)


@pytest.fixture
def clock(monkeypatch):
  """The time of the process: a list of one number."""
  now = [1000.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  return now


def begin(workdir, step, totals=None):
  found = Metrics(workdir, THROUGHPUT)
  found.start(step, ConfigDict(), {}, totals)
  return found


def test_work_goes_on_where_the_checkpoint_was(tmp_path, clock):
  run = begin(tmp_path, 0)
  clock[0] += 30  # step 1 compiles
  run.start_clock(1)
  run.train(1, {"loss": 3.0})
  clock[0] += 8  # steps 2 to 5
  run.train(5, {"loss": 2.0})
  with run.paused():
    clock[0] += 100
    run.write(5, "val", loss=2.0)
  clock[0] += 2
  totals = run.totals(6)  # saved with the checkpoint
  clock[0] += 50
  run.train(9, {"loss": 1.0})  # lost in a crash

  run = begin(tmp_path, 6, totals)
  clock[0] += 30
  run.start_clock(7)
  clock[0] += 3
  run.train(10, {"loss": 1.5})
  rows = metrics.read(tmp_path / "metrics.jsonl")
  assert [(row["step"], row["flops"], row["seconds"]) for row in rows] == [
    (1, 100, 0),
    (5, 500, 8),
    (5, 500, 8),
    (10, 1000, 13),
  ]
  assert [row.get("steps_per_s") for row in rows] == [None, 0.5, None, 1.0]


def test_lines_are_json_whatever_the_numbers(tmp_path, clock):
  """Numbers that are not finite are null, also those of earlier lines; pages read NaN."""
  earlier = '{"step": 1, "kind": "val", "loss": Infinity, "buckets": [NaN, 1.5]}\n'
  (tmp_path / "metrics.jsonl").write_text(earlier)
  run = begin(tmp_path, 6)
  run.train(7, {"loss": np.float32("inf"), "grad_norm": np.nan, "skipped": 1.0})
  run.write(7, "val", loss=np.float64("nan"), buckets=np.array([1.0, -np.inf]), name="x")

  def strict(text):
    raise AssertionError(text)

  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line, parse_constant=strict) for line in lines]
  assert [row["loss"] for row in rows] == [None] * 3
  assert rows[0]["buckets"] == [None, 1.5] and rows[2]["buckets"] == [1.0, None]
  assert rows[1]["grad_norm"] is None and rows[1]["skipped"] == 1 and rows[2]["name"] == "x"
  (read,) = metric_rows(tmp_path, "train")
  assert math.isnan(read["loss"])


def test_the_report_shows_a_run_that_exploded(tmp_path):
  rows = [{"step": i, "kind": "train", "loss": 1.0 + i, "grad_norm": None} for i in range(5)]
  rows += [{"step": 5, "kind": "train", "loss": None, "grad_norm": 2.0}]
  for kind in ("val", "val_soft"):
    rows += [
      {"step": 3, "kind": kind, "loss": 1.0, "buckets": [1.0] * 4},
      {"step": 5, "kind": kind, "loss": None, "buckets": [None, 1.0, 2.0, 3.0]},
    ]
  rows += [{"step": 5, "kind": "warning", "about": "training", "text": "it has exploded"}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert "it has exploded" in losses(tmp_path) and "warning at step 5" in losses(tmp_path)
  assert "nan" in by_timestep(tmp_path)


def test_totals_unknown_to_the_checkpoint_are_not_made_up(tmp_path, clock):
  run = begin(tmp_path, 6)
  run.start_clock(7)
  clock[0] += 1
  run.train(8, {"loss": 1.0})
  assert run.totals(8) is None
  (row,) = metrics.read(tmp_path / "metrics.jsonl")
  speed = {"steps_per_s", "tflops_per_s", "dense_equivalent_tflops_per_s", "data_wait", "loop"}
  assert row.keys() == {"step", "kind", "loss"} | speed


def test_shares_of_waiting_and_of_the_loop_are_those_since_the_last_line(tmp_path, clock):
  run = begin(tmp_path, 0)
  with run.timed("data_wait"):
    clock[0] += 30  # of the step that compiles
  run.start_clock(1)
  for waiting, computing, else_ in ((2, 5, 3), (0, 4, 0)):
    with run.timed("data_wait"):
      clock[0] += waiting
    with run.timed("step"):
      clock[0] += computing
    clock[0] += else_
    run.train(int(clock[0]), {"loss": 1.0})
    with run.paused():
      clock[0] += 100
  rows = metrics.read(tmp_path / "metrics.jsonl")
  assert [row["data_wait"] for row in rows] == [0.2, 0.0]
  assert [row["loop"] for row in rows] == pytest.approx([0.3, 0.0])
