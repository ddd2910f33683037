"""The comparison with dense attention shows the cost of training beside the loss."""

import json

import pytest

from benchmarks.rows import RESULTS
from benchmarks.trained import demo_compare
from benchmarks.trained.runs import ROOT
from freqformer.command.files import read_config


def test_costs_stand_beside_the_loss():
  """Stored runs, and the stored count of a step against today's, sparse methods cheaper."""
  stored = json.loads((RESULTS / "demo_compare.json").read_text())
  (step,) = (r for r in stored if r["name"] == "training step")
  counted = demo_compare.training_step(read_config(ROOT / "configs" / "comparison.py"))
  assert step["over_dense"] == pytest.approx(counted["over_dense"], rel=1e-3)
  assert counted["over_dense"]["octaves"] < counted["over_dense"]["freqformer"] < 0.7
  rows = [r for r in stored if "seed" in r]
  row, text = demo_compare.summary(rows, counted)
  assert row["over_dense"]["dense"] == 1
  assert "FLOPs of a training step over dense: octaves 0." in text
  head, *lines = text.splitlines()
  assert head.split()[-2:] == ["s", "s/dense"]
  seconds = {r["name"]: r["seconds"]["train"] for r in rows}
  own = seconds["octaves/seed0"]
  (line,) = (line for line in lines if line.startswith("octaves/seed0"))
  assert line.split()[-2:] == [f"{own:.0f}", f"{own / seconds['dense/seed0']:.2f}"]
