"""Several runs on one page: what differs, what is shared, and which are refused."""

import json

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.pages.mp4 import write_mp4
from freqformer.pages.runs import figures, write_runs
from tests.pages.markup import sections

COST = {
  "method": "octaves",
  "training": {"own": {"total_flops": 1.0}, "dense": {"total_flops": 4.0}},
}


def run(folder, loss, real=False):
  clip = np.zeros((3, 16, 16, 3), np.uint8)
  write_mp4(folder / "samples" / "Kicks" / "0.mp4", clip, 8)
  if real:
    write_mp4(folder / "real" / "Kicks.mp4", clip, 8)
  rows = [
    {"step": 1, "kind": "train", "loss": 2.0, "flops": 5e9, "seconds": 1.0},
    {"step": 1, "kind": "val", "loss": loss, "density": 0.2, "flops": 5e9, "seconds": 1.0},
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = {"train": {"lr": loss}, "model": {"width": 8}}
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def test_two_runs(tmp_path):
  first = run(tmp_path / "x" / "run", 0.75)
  second = run(tmp_path / "y" / "run", 0.5, real=True)
  (first / "cost.json").write_text(json.dumps(COST))
  page = write_runs([first, second], tmp_path / "new" / "page.html").read_text()
  assert sections(page) == ["Samples", "Losses", "Figures", "Configs"]
  # A sample of each, and one real clip for both; folders of one name go by their paths.
  assert page.count("data:video/mp4;base64,") == 3
  assert page.count(f"{first}<") >= 3
  plain = page.replace(' class="n"', "")
  assert "<td>train.lr</td><td>0.75</td><td>0.5</td>" in plain and "model.width" not in page
  found = figures(first)
  assert found["training_of_dense"] == 0.25 and found["val_loss"] == 0.75
  assert found["method"] is None and found["seconds_per_sample"] is None


def test_refusals(tmp_path):
  own = run(tmp_path / "a", 1.0)
  for runs, says in (
    ([own], "two runs at least, got 1"),
    ([own, tmp_path], "no metrics.jsonl"),
    ([own, own], "names a run twice"),
  ):
    with pytest.raises(ConfigError, match=says):
      write_runs(runs, tmp_path / "page.html")
  assert not (tmp_path / "page.html").exists()
