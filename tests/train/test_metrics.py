"""FLOPs and seconds of a run are those of its training steps, over all its processes."""

import pytest
from ml_collections import ConfigDict

from freqformer.train import metrics
from freqformer.train.metrics import Metrics
from freqformer.train.throughput import Throughput

THROUGHPUT = Throughput(flops=100.0, peak=None)


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


def test_totals_unknown_to_the_checkpoint_are_not_made_up(tmp_path, clock):
  run = begin(tmp_path, 6)
  run.start_clock(7)
  clock[0] += 1
  run.train(8, {"loss": 1.0})
  assert run.totals(8) is None
  (row,) = metrics.read(tmp_path / "metrics.jsonl")
  assert row.keys() == {"step", "kind", "loss", "steps_per_s", "tflops_per_s"}
