"""The demo's row is of a finished run, and of what that run wrote."""

import json

import pytest

from benchmarks.trained.demo import row_of
from freqformer.config import ConfigError

RUN = {
  "git": "abc",
  "versions": {"jax": "1"},
  "device": "cpu",
  "method": "octaves",
  "params": 3,
  "tokens": 64,
  "seconds": {"train": 12.345},
  "finished": True,
}
JUDGE = {"name": "judge_x", "unit": "share named", "value": 0.75, "protocol": {"drawn": "samples"}}


def _write(folder, run=RUN):
  (folder / "run.json").write_text(json.dumps(run))
  lines = [{"step": step, "kind": "val", "loss": 1 / step} for step in (2, 4)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_row_holds_the_last_loss_and_the_metrics(tmp_path):
  _write(tmp_path)
  with pytest.raises(ConfigError, match="run make demo first"):
    row_of(tmp_path)
  (tmp_path / "evaluation.json").write_text(json.dumps([JUDGE]))
  row = row_of(tmp_path)
  assert row["steps"] == 4 and row["validation_loss"] == 0.25
  assert row["seconds"] == {"train": 12.3}
  assert row["metrics"] == [{"name": "judge_x", "unit": "share named", "value": 0.75}]


def test_a_run_that_goes_on_is_refused(tmp_path):
  _write(tmp_path, RUN | {"finished": False})
  (tmp_path / "evaluation.json").write_text("[]")
  with pytest.raises(ConfigError, match="is not finished"):
    row_of(tmp_path)
