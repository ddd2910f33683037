"""The study: trials and shards, two tiny paired runs, what is skipped or stopped, the table."""

import json
import math
import re
import time
import types

import numpy as np
import pytest

from benchmarks.rows import RESULTS, Store, read_rows
from benchmarks.trained import study
from benchmarks.trained.study_summary import difference, equal_flops, equal_steps, summary
from freqformer.config import ConfigError
from freqformer.train.experiment import experiment

pytestmark = pytest.mark.xdist_group("study")
CONTEXT = {"command": "test", "device": "cpu"}


def test_shards_share_the_trials_of_a_stage():
  stage = study.STAGES["core"]
  every = study.trials(stage)
  assert len({trial.name for trial in every}) == len(stage.arms) * len(stage.seeds)
  shards = [study.trials(stage, (i, 3)) for i in (1, 2, 3)]
  assert sorted(t.name for shard in shards for t in shard) == sorted(t.name for t in every)
  # Pairs are soon complete: a seed's arms are neighbours.
  assert {trial.seed for trial in every[: len(stage.arms)]} == {0}


@pytest.mark.parametrize("name", study.STAGES)
def test_stored_rows_are_of_the_trials_that_the_stage_has(name):
  trials = {trial.name: trial for trial in study.trials(study.STAGES[name])}
  for row in read_rows(RESULTS / f"study_{name}.json"):
    own = json.loads(json.dumps(trials[row["name"]].overrides))
    # What was the config's default then may be said since.
    assert {**own, **row["overrides"]} == own, row["name"]
    assert row["digest"] == trials[row["name"]].digest, row["name"]


def test_every_arm_is_a_valid_config_of_its_own():
  trials = [trial for stage in study.STAGES.values() for trial in study.trials(stage)]
  for trial in trials:
    experiment(trial.config())  # refuses unknown keys and invalid values
  digests = [trial.digest for trial in trials]
  assert len(set(digests)) == len(digests)
  split = study.Trial(study.STAGES["screen"], "freqformer_fixed", 3)
  config = split.config()
  assert config.model.attention.freqformer.allocation == (1, 0, 1) and config.seed == 3
  assert config.train.schedule == "constant" and config.train.steps == 300
  # What is left out when a trial is judged does not make it another trial.
  octaves = study.Trial(study.STAGES["core"], "octaves", 0)
  assert octaves.config().model.attention.octaves.threshold == 0.05
  wrong = study.Stage(("dense",), (0,), 1, {"data.copeis": 1})
  with pytest.raises(ConfigError, match="did you mean 'data.copies'"):
    study.Trial(wrong, "dense", 0).config()


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
  """The two trials of the rehearsal, run in this process."""
  folder = tmp_path_factory.mktemp("study")
  store = Store(folder / "rows.json", CONTEXT, rehearsal=True)
  return folder, store, [study.run(trial, folder, store) for trial in trials()]


def trials():
  return study.trials(study.REHEARSAL)


def test_a_row_says_what_was_run_and_how_well(rehearsed):
  folder, store, rows = rehearsed
  dense = rows[0]
  assert read_rows(folder / "rows.json") == rows and dense["rehearsal"]
  assert [point["step"] for point in dense["curve"]] == [1, 2, 3, 4]
  assert dense["training_flops"] == dense["curve"][-1]["flops"] > 0
  assert len(dense["curve"][0]["density_buckets"]) == 4
  final = dense["final"]
  for name in ("buckets", "regret_buckets", "bayes_buckets", "density_buckets"):
    assert len(final[name]) == 8
  # In expectation: the noise of the draw is not correlated with the model's error.
  np.testing.assert_allclose(
    final["buckets"], np.add(final["regret_buckets"], final["bayes_buckets"]), rtol=0.1
  )
  assert study.listing(trials(), store, folder)[1:] == [
    (trial.name, trial.digest, "finished") for trial in trials()
  ]


def test_trials_of_a_seed_are_paired(rehearsed):
  """The window covers the grid: same weights, clips, timesteps and noise give the same curve."""
  dense, window = ([p["regret"] for p in row["curve"]] for row in rehearsed[2])
  np.testing.assert_allclose(dense, window, rtol=1e-4)


class Process:
  """A trial's process, which ends after some polls, or when it is told to."""

  def __init__(self, polls, returncode=0):
    self.polls = polls
    self.code = returncode
    self.returncode = None
    self.terminated = False

  def poll(self):
    self.polls -= 1
    if self.polls < 0:
      self.returncode = self.code
    return self.returncode

  def terminate(self):
    self.terminated = True

  def wait(self):
    self.returncode = 0


@pytest.fixture
def launched(monkeypatch):
  """Processes that `run_all` will be given, and the names of the trials that it started."""
  given = []
  names = []

  def start(command, cwd):
    names.extend(part[6:] for part in command if part.startswith("--run="))
    return given.pop(0)

  fake = types.SimpleNamespace(Popen=start)
  monkeypatch.setattr(study, "subprocess", fake)
  monkeypatch.setattr(study, "_POLL_SECONDS", 0.01)
  return given, names


def test_finished_trials_are_skipped_and_failures_named(rehearsed, launched, tmp_path):
  given, names = launched
  assert study.run_all(trials(), rehearsed[1], [], lambda: False, None) == [] and not names
  given += [Process(1, returncode=2), Process(1)]
  empty = Store(tmp_path / "rows.json", CONTEXT)
  assert study.run_all(trials(), empty, [], lambda: False, None) == ["dense/seed0"]
  assert names == ["dense/seed0", "window/seed0"]


def test_the_budget_ends_a_trial_softly_and_begins_no_other(launched, tmp_path):
  given, names = launched
  store = Store(tmp_path / "rows.json", CONTEXT)
  process = Process(10**9)
  given.append(process)
  deadline = time.monotonic() + study._WORTH_SECONDS + 0.05
  clock = iter([time.monotonic(), *[deadline + 1] * 10])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(time, "monotonic", lambda: next(clock))
    assert study.run_all(trials(), store, [], lambda: False, deadline) == []
  assert process.terminated and names == ["dense/seed0"]


def row(arm, seed, final, flops, steps=40, curve=()):
  """A row of a curve `[(share of the FLOPs, regret), ...]` that ends at `final`."""
  points = [{"flops": share * flops, "regret": value} for share, value in (*curve, (1.0, final))]
  return {
    "arm": arm,
    "seed": seed,
    "steps": steps,
    "overrides": {"train.time_range": (0.3, 1.0)},
    "training_flops": flops,
    "training_seconds": 1.0,
    "curve": points,
    "final": {"regret": final, "regret_buckets": [final] * 8, "buckets": [1] * 8, "density": 1.0},
  }


ROWS = [
  row("dense", 0, 0.5, 4e12, curve=[(0.1, 1.1), (0.25, 0.9)]),
  row("dense", 1, 0.7, 4e12, curve=[(0.1, 1.1), (0.25, 0.9)]),
  row("window", 0, 0.6, 1e12, curve=[(0.1, 2.0)]),
  row("window", 1, 0.9, 1e12, curve=[(0.1, 2.0)]),
  row("window", 2, 9.9, 1e12),
]


def test_differences_are_paired_by_seed():
  found = difference(ROWS, "window", "dense", equal_steps)
  assert found["seeds"] == 2 and found["mean"] == pytest.approx(0.15)
  assert found["relative"] == pytest.approx(0.15 / 0.6)
  # The 97.5 % quantile of t with one degree of freedom is 12.7062.
  spread = math.sqrt(2) * 0.05
  assert found["half"] == pytest.approx(12.7062 * spread / math.sqrt(2), rel=1e-4)
  # Dense attention is read off its curve where it had the window's FLOPs.
  equal = difference(ROWS, "window", "dense", equal_flops)
  assert equal["mean"] == pytest.approx(-0.15)
  assert difference(ROWS, "dense", "window", equal_flops)["mean"] == pytest.approx(0.15)
  assert difference(ROWS[:3], "window", "dense", equal_steps)["half"] is None
  assert difference(ROWS, "octaves", "dense", equal_steps) is None
  other = [ROWS[0], {**ROWS[2], "steps": 41}]
  assert difference(other, "window", "dense", equal_steps) is None
  late = [row("dense", 0, 0.5, 40e12, curve=[(0.1, 1.1)]), ROWS[2]]
  assert difference(late, "window", "dense", equal_flops) is None


def test_between_points_a_curve_is_linear_in_log_flops():
  middle = row("window", 0, 0.5, math.sqrt(0.1 * 0.25) * 4e12)
  assert equal_flops(middle, ROWS[0]) == pytest.approx((0.5, 1.0))


def test_the_table_ranks_arms():
  text = summary(ROWS[:4], "dense")
  lines = text.splitlines()
  assert lines[1].startswith("dense") and lines[2].startswith("window")
  assert "+0.1500 +-0.6353 (+25.0%, 2 seeds)" in lines[2]
  assert "-0.1500 +-1.9059 (-16.7%, 2 seeds)" in lines[2]
  # Beside the mean the middle of the first of eight parts of .3 to 1.
  assert re.search(r"regret at t +all +0\.34", text)
