"""The comparison with dense attention shows the cost of training beside the loss."""

import json

import pytest

from benchmarks.rows import RESULTS
from benchmarks.trained import demo_compare
from tests.earlier_configs import earlier_config


def test_costs_stand_beside_the_loss():
  """The stored runs, and the stored count of a step against today's of the same config."""
  stored = json.loads((RESULTS / "demo_compare.json").read_text())
  (step,) = (r for r in stored if r["name"] == "training step")
  counted = demo_compare.training_step(earlier_config("comparison"))
  assert step["freqformer_over_dense"] == pytest.approx(counted["freqformer_over_dense"], rel=1e-3)
  row, text = demo_compare.summary([r for r in stored if "seed" in r], counted)
  assert row["freqformer_over_dense"] < 0.9 and "training step over dense: 0." in text
  head, first, *_ = text.splitlines()
  assert head.split()[-2:] == ["s", "s/dense"]
  # Seed 0 took 504.7 s, dense 443.8 s.
  assert first.startswith("freqformer/seed0") and first.split()[-2:] == ["505", "1.14"]
