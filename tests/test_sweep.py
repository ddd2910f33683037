"""Sweeps: names, refusals, and a study that skips what is finished and goes on with what was killed."""

import json
import textwrap

import pytest

from freqformer import sweep as sweep_module
from freqformer.config import ConfigError
from freqformer.sweep import result_of, sweep, table, trial_name

CONFIG = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict(dict(model=dict(rate=1.0), seed=0))

def sweep():
  for rate in (0.5, 2.0, 3.0):
    yield {"model.rate": rate}
"""


@pytest.fixture
def config(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(textwrap.dedent(CONFIG))
  return path


def finish(workdir, loss):
  """What a finished train.py leaves behind."""
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "run.json").write_text(json.dumps({"finished": True}))
  rows = [{"step": 5, "kind": "train", "loss": 1.0}, {"step": 5, "kind": "val", "loss": loss, "density": 0.1}]
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_trial_names_are_readable_and_unique():
  a, b = trial_name({"model.a.rate": 0.5}), trial_name({"model.b.rate": 0.5})
  assert a.startswith("rate=0.5-") and a != b and "/" not in trial_name({"x": (1, "a/b")})


def test_finished_trials_are_skipped_and_killed_ones_run_again(config, tmp_path, monkeypatch):
  ran, study = [], tmp_path / "study"
  finish(study / trial_name({"model.rate": 0.5}), 0.9)
  (study / trial_name({"model.rate": 2.0})).mkdir()  # killed: no run.json

  def fake(path, workdir, overrides, stop):
    ran.append(overrides)
    if overrides["model.rate"] == 3.0:
      return 1
    finish(workdir, 0.7)
    return 0

  monkeypatch.setattr(sweep_module, "run_trial", fake)
  rows = sweep(config, study, {})
  assert [r["model.rate"] for r in ran] == [2.0, 3.0]
  assert [r["status"] for r in rows] == ["finished", "finished", "exit 1"]
  lines = table(rows).splitlines()
  assert "rate=2.0" in lines[1] and "0.7000" in lines[1] and "rate=0.5" in lines[2] and "exit 1" in lines[3]
  assert len(json.loads((study / "study.json").read_text())) == 3
  assert result_of(study / trial_name({"model.rate": 3.0})) is None


def test_refusals(config, tmp_path):
  with pytest.raises(ConfigError, match="did you mean 'model.rate'"):
    sweep(config, tmp_path / "study", {"model.rat": 1})
  with pytest.raises(ConfigError, match="no config file"):
    sweep(tmp_path / "none.py", tmp_path / "study", {})
  config.write_text("def get_config():\n  return {}\n")
  with pytest.raises(ConfigError, match="has no sweep"):
    sweep(config, tmp_path / "study", {})
