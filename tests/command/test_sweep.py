"""Sweeps: names, refusals, and studies that skip finished trials and go on with killed ones."""

import json
import os
import socket
import types

import pytest

from freqformer.command import sweep as sweep_module
from freqformer.command import trials
from freqformer.command.sweep import sweep
from freqformer.command.trials import result_of, trial_name
from freqformer.config import ConfigError
from freqformer.pages.study import table
from freqformer.train.experiment import experiment, recorded
from freqformer.train.lock import held
from tests.pages.markup import sections
from tests.tiny_config import get_config

CONFIG = """
from tests.tiny_config import get_config

def sweep():
  for rate in (0.5, 2.0, 3.0):
    yield {"train.lr": rate}
"""


@pytest.fixture
def config(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(CONFIG)
  return path


COST = {"own": {"attention_flops": 1.0}, "dense": {"attention_flops": 8.0}}


def finish(workdir, loss, rate, seed=0):
  """Writes what a finished train.py leaves behind."""
  workdir.mkdir(parents=True, exist_ok=True)
  values = get_config()
  values.train.lr = rate
  values.seed = seed
  (workdir / "cost.json").write_text(json.dumps({"training": COST}))
  (workdir / "config.json").write_text(json.dumps(recorded(values, experiment(values)).to_dict()))
  (workdir / "run.json").write_text(json.dumps({"finished": True}))
  rows = [
    {"step": 5, "kind": "train", "loss": 1.0, "flops": 2.5e12, "seconds": 61.2},
    {"step": 5, "kind": "val", "loss": loss, "density": 0.1, "flops": 2.5e12, "seconds": 61.2},
  ]
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_trial_names_are_readable_and_unique():
  a, b = trial_name({"model.a.rate": 0.5}), trial_name({"model.b.rate": 0.5})
  assert a.startswith("rate=0.5-") and a != b and "/" not in trial_name({"x": (1, "a/b")})


def test_finished_trials_are_skipped_and_killed_ones_run_again(config, tmp_path, monkeypatch):
  ran, study = [], tmp_path / "study"
  finish(study / trial_name({"train.lr": 0.5}), 0.9, rate=0.5)
  (study / trial_name({"train.lr": 2.0})).mkdir()  # killed: no run.json

  def fake(path, workdir, overrides, stop):
    ran.append(overrides)
    if overrides["train.lr"] == 3.0:
      return 1
    finish(workdir, 0.7, overrides["train.lr"])
    return 0

  monkeypatch.setattr(trials, "run_trial", fake)
  rows = sweep(config, study, {})
  assert [r["train.lr"] for r in ran] == [2.0, 3.0]
  assert [r["status"] for r in rows] == ["finished", "finished", "exit 1"]
  lines = table(rows).splitlines()
  for line, texts in zip(
    lines[1:],
    (("lr=2.0", "0.7000", "0.125", "2.5e+12", "61"), ("lr=0.5",), ("exit 1",)),
    strict=True,
  ):
    assert all(text in line for text in texts)
  assert len(json.loads((study / "study.json").read_text())) == 3
  assert result_of(study / trial_name({"train.lr": 3.0})) is None


@pytest.mark.parametrize("meeting", [0.5, 2.0, 3.0])
def test_sweeps_at_the_same_time_run_every_trial_once(config, tmp_path, monkeypatch, meeting):
  """The second one begins while the first one runs a trial; the trial of rate 2 fails.

  What had failed before a sweep began is tried once more by it, as by any later sweep.
  """
  study = tmp_path / "study"
  ran, beside = [], []

  def fake(path, workdir, overrides, stop):
    rate = overrides["train.lr"]
    ran.append(rate)
    if rate == meeting and not beside:
      beside.extend(sweep(config, study, {}))
      listed = [row["status"] for row in sweep(config, study, {}, list_only=True)]
      assert listed == [row["status"] for row in beside]
    if rate == 2.0:
      return 1
    finish(workdir, 0.7, rate)
    return 0

  monkeypatch.setattr(trials, "run_trial", fake)
  rows = sweep(config, study, {})
  assert sorted(ran) == sorted([0.5, 2.0, 3.0] + [2.0] * (meeting > 2.0))
  assert [row["status"] for row in rows] == ["finished", "exit 1", "finished"]
  written = json.loads((study / "study.json").read_text())
  assert [row["status"] for row in written] == ["finished", "exit 1", "finished"]
  running = beside[[0.5, 2.0, 3.0].index(meeting)]["status"]
  assert running == f"running, process {os.getpid()} on {socket.gethostname()}"
  assert running in table(beside)
  # A later sweep tries the trial that failed once more.
  del ran[:]
  sweep(config, study, {})
  assert ran == [2.0]


def test_a_trial_that_trains_without_a_sweep_is_passed_over(config, tmp_path, monkeypatch):
  study, ran = tmp_path / "study", []
  taken = study / trial_name({"train.lr": 2.0})
  taken.mkdir(parents=True)
  monkeypatch.setattr(
    trials, "run_trial", lambda path, workdir, overrides, stop: ran.append(overrides) or 0
  )
  with held(taken):
    statuses = [row["status"] for row in sweep(config, study, {})]
  assert [own["train.lr"] for own in ran] == [0.5, 3.0]
  assert statuses[0] == statuses[2] == "stopped" and statuses[1].startswith("running, process")
  # It died: nothing was ever known of it but that it ran.
  assert sweep(config, study, {}, list_only=True)[1]["status"] == "open"


def test_seeds_of_a_trial_are_summed_up(config, tmp_path, monkeypatch):
  """One seed fails at rate 2; all but one at rate 3, and one is no mean."""
  study = tmp_path / "study"
  losses = {0.5: (0.5, 0.7, 0.9), 2.0: (0.4, 0.2, None), 3.0: (None, None, 0.3)}

  def fake(path, workdir, overrides, stop):
    loss = losses[overrides["train.lr"]][overrides["seed"]]
    if loss is None:
      return 1
    finish(workdir, loss, overrides["train.lr"], overrides["seed"])
    return 0

  monkeypatch.setattr(trials, "run_trial", fake)
  rows = sweep(config, study, {}, seeds=(0, 1, 2))
  assert len(rows) == 9
  assert trial_name({"train.lr": 0.5, "seed": 2}) in [row["trial"] for row in rows]
  lines = table(rows).splitlines()
  assert lines[11].split() == ["mean", "over", "seeds", "n", "val_loss", "+-", "flops", "seconds"]
  assert [line.split() for line in lines[12:]] == [
    ["lr=2.0", "2", "of", "3", "0.3000", "0.1414", "2.5e+12", "61"],
    ["lr=0.5", "3", "of", "3", "0.7000", "0.2000", "2.5e+12", "61"],
  ]
  means = json.loads((study / "study.json").read_text())[9:]
  assert [row["overrides"] for row in means] == [{"train.lr": 2.0}, {"train.lr": 0.5}]
  assert [len(row["mean_of"]) for row in means] == [2, 3]
  # A later sweep reads that file: it runs only what failed.
  ran = []
  monkeypatch.setattr(trials, "run_trial", lambda *given: ran.append(given[2]) or 1)
  sweep(config, study, {}, seeds=(0, 1, 2))
  assert [own["seed"] for own in ran] == [2, 0, 1]
  with pytest.raises(ConfigError, match="seed=1,lr=0.5-.* sets its own seed; leave --seeds out"):
    sweep(config, study, {"seed": 1}, seeds=(0, 1))
  with pytest.raises(ConfigError, match="--seeds=1,1 must name each seed once"):
    sweep(config, study, {}, seeds=(1, 1))


def test_refusals(config, tmp_path):
  with pytest.raises(ConfigError, match="did you mean 'train.lr'"):
    sweep(config, tmp_path / "study", {"train.l": 1})
  with pytest.raises(ConfigError, match="no config file"):
    sweep(tmp_path / "none.py", tmp_path / "study", {})
  config.write_text("def get_config():\n  return {}\n")
  with pytest.raises(ConfigError, match="has no sweep"):
    sweep(config, tmp_path / "study", {})


def test_listing_writes_nothing_and_keeps_the_results(config, tmp_path, monkeypatch):
  study, ends = tmp_path / "study", {0.5: 0, 2.0: 0, 3.0: 7}
  sweep(config, study, {}, list_only=True)
  assert not study.exists()

  def fake(path, workdir, overrides, stop):
    if overrides["train.lr"] == 0.5:
      finish(workdir, 0.9, rate=0.5)
    return ends[overrides["train.lr"]]

  monkeypatch.setattr(trials, "run_trial", fake)
  given = {"_CONFIG": config, "_STUDY": study, "_OVERRIDE": [], "_LIST": False, "_SEEDS": []}
  given |= {"_SEARCH": None, "_STORAGE": None, "_PRUNE": False}
  for name, value in given.items():
    monkeypatch.setattr(sweep_module, name, types.SimpleNamespace(value=value), raising=False)
  with pytest.raises(SystemExit, match="1"):  # a trial failed
    sweep_module.main(None)
  assert (study / "losses.png").stat().st_size > 5000
  page = (study / "report.html").read_text()
  assert sections(page) == ["Trials", "Validation loss against cost", "Losses"]
  assert "exit 7" in page
  monkeypatch.setattr(sweep_module._SEEDS, "value", ["0", "x"])
  with pytest.raises(ConfigError, match="--seeds=0,x must be whole numbers"):
    sweep_module.main(None)
  text = (study / "study.json").read_text()
  for extra, statuses in (
    ({}, ["finished", "stopped", "exit 7"]),
    ({"train.steps": "9"}, ["open"] * 3),
  ):
    assert [r["status"] for r in sweep(config, study, extra, list_only=True)] == statuses
    assert (study / "study.json").read_text() == text


SHAPES = """
from tests.command.test_fields import small

def get_config():
  config = small(steps=1)
  config.train.update(samples=0, val_every=0)
  return config

def sweep():
  yield {"train.lr": 0.1}
  yield {"train.lr": 0.2, "train.steps": 2, "seed": 1}
"""


def test_trials_of_one_shape_compile_once(config, tmp_path, monkeypatch):
  """The second process finds all programs, the first weights' too, in JAX's cache."""
  config.write_text(SHAPES)
  cache = tmp_path / "cache"
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
  run_trial = trials.run_trial
  programs = []

  def counted(*given):
    code = run_trial(*given)
    programs.append({path.name for path in cache.glob("*-cache")})
    return code

  monkeypatch.setattr(trials, "run_trial", counted)
  rows = sweep(config, tmp_path / "study", {})
  assert [(row["status"], row["step"]) for row in rows] == [("finished", 1), ("finished", 2)]
  assert programs[0] == programs[1]
  assert any(name.startswith("jit_step-") for name in programs[0])


def test_trials_of_another_config_are_not_taken_for_done(config, tmp_path, monkeypatch):
  study = tmp_path / "study"
  monkeypatch.setattr(trials, "run_trial", lambda *_: pytest.fail("nothing may run"))
  finish(study / trial_name({"train.lr": 0.5}), 0.9, rate=0.5)
  changed = CONFIG.replace("import get_config", "import get_config as tiny")
  changed += "def get_config():\n  config = tiny()\n  config.train.ema = 0.5\n  return config\n"
  config.write_text(changed)
  with pytest.raises(
    ConfigError, match=r"1 of 3 trials .*lr=0.5-\w+: train.ema 0.9 -> 0.5; name another --study"
  ):
    sweep(config, study, {})
  status = sweep(config, study, {}, list_only=True)[0]["status"]
  assert status == "finished with another config: train.ema 0.9 -> 0.5"


@pytest.mark.parametrize(
  "extra, message",
  [
    ({"train.steps": "abc"}, "trial steps=abc,lr=0.5-.*--config.train.steps=abc: .*'abc'"),
    ({"train.steps": "-1"}, "trial steps=-1,.*steps"),
    ({"model.attention.method": "foo"}, "trial method=foo,.*'foo'"),
  ],
)
def test_every_trial_is_checked_before_any_runs(config, tmp_path, monkeypatch, extra, message):
  monkeypatch.setattr(trials, "run_trial", lambda *_: pytest.fail("nothing may run"))
  with pytest.raises(ConfigError, match=message):
    sweep(config, tmp_path / "study", extra)
  assert not (tmp_path / "study").exists()
