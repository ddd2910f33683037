"""Stored costs of the demo's steps are those that the program counts today."""

import json

import pytest

from benchmarks.cpu import steps
from benchmarks.rows import RESULTS
from benchmarks.timing import Timing


def test_a_row_is_over_dense():
  times = {"dense": Timing((4.0, 4.0, 9.0)), "octaves": Timing((1.0, 1.0, 9.0))}
  row = steps.over_dense("training/1152", "octaves", times, {"dense": 10.0, "octaves": 5.0})
  assert row["name"] == "training/1152/octaves"
  assert row["seconds_over_dense"] == 0.25 and row["flops_over_dense"] == 0.5


@pytest.mark.parametrize("side, tokens", list(zip(steps.SIDES, (1152, 4608), strict=True)))
def test_stored_rows_are_of_todays_model(side, tokens):
  stored = json.loads((RESULTS / f"{steps.NAME}.json").read_text())
  exp = steps.of_side(side)
  for kind in ("training", "sampling"):
    flops = steps.counted(exp, kind)
    for name in steps.METHODS:
      (row,) = (row for row in stored if row["name"] == f"{kind}/{tokens}/{name}")
      assert row["flops_over_dense"] == pytest.approx(flops[name] / flops["dense"], rel=1e-6)
      assert row["seconds_over_dense"] > 0
