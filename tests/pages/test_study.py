"""A study's page: who is on the fronts, means over seeds, and studies of which little is known."""

import json
import re

import pytest

from freqformer.pages.study import pareto, write_study
from tests.pages.markup import sections


def row(name, loss, flops, seconds, **overrides):
  status = "open" if loss is None else "finished"
  return {
    "trial": name,
    "val_loss": loss,
    "flops": flops,
    "seconds": seconds,
    "status": status,
    "overrides": overrides,
  }


ROWS = [
  row("slow", 0.5, 4e12, 90.0, seed=0),
  row("wrong", 0.9, 5e12, 50.0, seed=1),
  row("cheap", 0.8, 1e12, 40.0, rate=2),
  row("quick", 0.7, 6e12, 10.0, rate=3),
  row("twin", 0.8, 1e12, 40.0, rate=4),
  row("costless", 0.1, None, None, rate=5),
  row("open", None, None, None, rate="<6>"),
]


@pytest.mark.parametrize(
  "cost, names", [("flops", ["cheap", "slow"]), ("seconds", ["quick", "slow"])]
)
def test_nobody_beats_a_trial_on_the_front(cost, names):
  assert [own["trial"] for own in pareto(ROWS, cost)] == names


def test_the_page_names_who_is_on_a_front(tmp_path):
  (tmp_path / "slow").mkdir()
  line = {"step": 5, "kind": "val", "loss": 0.5, "flops": 4e12, "seconds": 90.0}
  (tmp_path / "slow" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  page = write_study(tmp_path, ROWS).read_text()
  assert sections(page) == ["Trials", "Validation loss against cost", "Losses"]
  assert page.count("data:image/png") == 2 and (tmp_path / "losses.png").exists()
  plain = page.replace(' class="n"', "")
  front = re.findall(r"<tr><td>([A-Z])</td><td>(\w+)</td>.*?<td>([^<]*)</td></tr>", plain)
  assert front == [
    ("A", "slow", "training FLOPs, seconds of training"),
    ("B", "quick", "seconds of training"),
    ("C", "cheap", "training FLOPs"),
  ]
  assert "<td>default</td><td>2 of 2</td><td>0.7</td><td>0.2828</td>" in plain
  assert "&lt;6&gt;" in page


def test_a_study_that_has_only_begun(tmp_path):
  page = write_study(tmp_path, ROWS[-1:]).read_text()
  assert "No trial has finished yet." in page and "No trial has a validation yet." in page
  assert not (tmp_path / "losses.png").exists()
