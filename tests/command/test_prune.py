"""Pruning: whom the median at equal FLOPs stops, and that such a trial can be gone on with."""

import json

import optuna
import pytest

from freqformer.command import trials
from freqformer.command.prune import MedianRule, earlier_losses
from freqformer.command.search import search
from freqformer.command.sweep import sweep
from freqformer.command.trials import Trial
from tests.command.test_sweep import finish

STEPS = 40  # of tests/tiny_config.py


def write(workdir, losses, flops_per_step=1e11, finished=True):
  """Writes validations of a run, `losses` by step."""
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "run.json").write_text(json.dumps({"finished": finished}))
  (workdir / "metrics.jsonl").write_text("")
  for step, loss in losses.items():
    validate(workdir, step, loss, step * flops_per_step)


def validate(workdir, step, loss, flops):
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": step, "kind": "val", "loss": loss, "flops": flops}) + "\n")


def test_curves_are_read_at_equal_flops(tmp_path):
  """One that costs twice as much per step is read at half as many steps."""
  write(tmp_path / "same", {10: 1.0, 20: 0.5, 30: 0.9})
  write(tmp_path / "dear", {10: 1.0, 20: 0.2}, flops_per_step=2e11)
  write(tmp_path / "running", {10: 0.1, 40: 0.1}, finished=False)
  write(tmp_path / "pruned", {10: 2.0, 15: 2.0}, finished=False)
  (tmp_path / "study.json").write_text(
    json.dumps([{"trial": "pruned", "status": "pruned at 1.5 TFLOP"}])
  )
  trial = Trial(tmp_path / "config.py", tmp_path, {})
  for step, losses in (
    (9, []),
    (10, [2.0, 1.0]),
    (15, [2.0, 0.75]),  # between two validations
    (16, [0.7]),  # behind the end of the pruned one
    (30, [0.6, 0.5]),  # the best so far
    (99, [0.2, 0.5]),
  ):
    assert earlier_losses(trial, step * 1e11) == pytest.approx(losses), step
  write(trial.workdir, {10: 1.0})
  assert len(earlier_losses(trial, 1e12)) == 2  # it is no earlier one of itself


def trains(ran, losses):
  """Returns a training that validates every 5 steps, at `losses(rate, step)`, and resumes."""

  def fake(path, workdir, overrides, stop):
    rate = overrides["train.lr"]
    file = workdir / "metrics.jsonl"
    begun = len(file.read_text().splitlines()) * 5 if file.exists() else 0
    assert not stop()  # a process that has just begun would die of it
    for step in range(begun + 5, STEPS + 1, 5):
      validate(workdir, step, losses(rate, step), step * 1e11)
      if stop():
        ran.append((rate, step))
        return 0
    ran.append((rate, STEPS))
    finish(workdir, losses(rate, STEPS), rate)
    write(workdir, {step: losses(rate, step) for step in range(5, STEPS + 1, 5)})
    return 0

  return fake


@pytest.fixture
def config(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(
    "from tests.tiny_config import get_config\n"
    "def sweep():\n"
    "  for rate in (1.0, 2.0, 3.0, 4.0, 5.0, 1.5):\n"
    '    yield {"train.lr": rate}\n'
    "def space():\n"
    '  return {"train.lr": ("choice", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])}\n'
  )
  return path


def test_a_trial_above_the_median_is_stopped_and_can_go_on(config, tmp_path, monkeypatch):
  """Rate 4 is worst from the beginning, rate 5 gets worse late, rate 1.5 is good."""
  study, ran = tmp_path / "study", []

  def losses(rate, step):
    return 0.1 if rate == 5.0 and step < 30 else rate + 10 / step

  monkeypatch.setattr(trials, "run_trial", trains(ran, losses))
  rows = sweep(config, study, {}, prune=True)
  # The first three have too few before them; a quarter of the steps is never judged.
  assert ran == [(1.0, 40), (2.0, 40), (3.0, 40), (4.0, 10), (5.0, 40), (1.5, 40)]
  statuses = [row["status"] for row in rows]
  assert statuses == ["finished"] * 3 + ["pruned at 1 TFLOP"] + ["finished"] * 2
  assert json.loads((study / "study.json").read_text())[3]["status"] == "pruned at 1 TFLOP"
  del ran[:]
  sweep(config, study, {}, prune=True)
  assert ran == [] and sweep(config, study, {}, list_only=True)[3]["status"] == statuses[3]
  assert [row["status"] for row in sweep(config, study, {})] == ["finished"] * 6
  assert ran == [(4.0, 40)]


def test_when_a_trial_is_judged(config, tmp_path):
  """Others had 1, 2 and 3 all along: 2.5 is above their median, 2 is not."""
  for loss in (1.0, 2.0, 3.0):
    write(tmp_path / str(loss), {5: loss, STEPS: loss})
  trial = Trial(config, tmp_path, {"train.lr": 1.0})
  write(trial.workdir, {5: 2.5, 10: 2.5}, finished=False)
  rule = MedianRule(trial)
  assert not rule()  # of an earlier process
  validate(trial.workdir, 20, 2.5, 2e12)
  assert rule() and rule() and rule.status == "pruned at 2 TFLOP"
  for losses, stopped in (({20: 2.0}, False), ({20: 2.1}, True), ({STEPS: 9.0}, False)):
    write(trial.workdir, {}, finished=False)
    rule = MedianRule(trial)
    write(trial.workdir, losses, finished=False)
    assert rule() is stopped and bool(rule.status) is stopped


def test_without_the_flag_nothing_is_stopped(config, tmp_path, monkeypatch):
  ran = []
  monkeypatch.setattr(trials, "run_trial", trains(ran, lambda rate, step: rate))
  sweep(config, tmp_path / "study", {})
  assert [step for _, step in ran] == [40] * 6


def test_a_search_tells_what_was_pruned(config, tmp_path, monkeypatch):
  """Rates are proposed in this order: 1, 2, 3, 4."""
  study = tmp_path / "study"
  url = f"sqlite:///{tmp_path}/own.db"
  ran = []
  monkeypatch.setattr(trials, "run_trial", trains(ran, lambda rate, step: rate + 10 / step))
  opened = optuna.create_study(study_name="study", storage=url)
  for rate in ("1.0", "2.0", "3.0", "4.0"):
    opened.enqueue_trial({"train.lr": rate})
  rows = search(config, study, {}, 4, url, prune=True)
  assert ran[-1] == (4.0, 10) and rows[3]["status"] == "pruned at 1 TFLOP"
  told = opened.trials
  assert [own.state.name for own in told] == ["COMPLETE"] * 3 + ["PRUNED"]
  assert told[3].intermediate_values == {5: 6.0, 10: 5.0} and told[3].value == 5.0
  search(config, study, {}, 4, url, prune=True)
  assert len(ran) == 4 and len(opened.trials) == 4
  for _ in range(2):
    rows = search(config, study, {}, 4, url)
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert len(ran) == 5 and [own.value for own in opened.trials[4:]] == [4.25]
