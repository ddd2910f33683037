"""Searches: what Optuna is asked and told, killed trials, two commands at once, wrong spaces."""

import json
import math
import os
import socket
import sys
import types

import optuna
import pytest

from freqformer.command import search as search_module
from freqformer.command import sweep as sweep_module
from freqformer.command import trials
from freqformer.command.search import Space, search
from freqformer.command.trials import trial_name
from freqformer.config import ConfigError
from freqformer.pages.study import table
from tests.command.test_sweep import finish

CONFIG = """
from tests.tiny_config import get_config

def space():
  return {"train.lr": ("log", 0.5, 8.0)}
"""


@pytest.fixture
def config(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(CONFIG)
  return path


def training(ran, code=0):
  """Returns a training that does not train: its loss is the rate over 10."""

  def fake(path, workdir, overrides, stop):
    ran.append(overrides["train.lr"])
    if not code:
      finish(workdir, overrides["train.lr"] / 10, overrides["train.lr"])
    return code

  return fake


def stored(study, url=None):
  return optuna.load_study(study_name="study", storage=url or f"sqlite:///{study}/optuna.db")


def test_results_are_told_and_a_search_ends_at_its_number(config, tmp_path, monkeypatch):
  study, ran = tmp_path / "study", []
  monkeypatch.setattr(trials, "run_trial", training(ran))
  assert search(config, study, {}, 4, list_only=True) == [] and not study.exists()
  rows = search(config, study, {}, 4)
  assert len(ran) == len(set(ran)) == 4 and all(0.5 <= rate <= 8.0 for rate in ran)
  told = stored(study).trials
  assert [own.value for own in told] == [rate / 10 for rate in ran]
  assert [row["trial"] for row in rows] == [trial_name({"train.lr": rate}) for rate in ran]
  assert len(json.loads((study / "study.json").read_text())) == 4
  assert search(config, study, {}, 4) == search(config, study, {}, 4, list_only=True)
  search(config, study, {}, 5)
  assert len(ran) == 5


def test_a_killed_trial_is_finished_before_new_ones(config, tmp_path, monkeypatch):
  study, ran = tmp_path / "study", []

  def killed(path, workdir, overrides, stop):
    ran.append(overrides["train.lr"])
    raise SystemExit("killed")

  monkeypatch.setattr(trials, "run_trial", killed)
  with pytest.raises(SystemExit, match="killed"):
    search(config, study, {}, 3)
  assert [own.state.name for own in stored(study).trials] == ["RUNNING"]
  monkeypatch.setattr(trials, "run_trial", training(ran))
  rows = search(config, study, {}, 3)
  assert ran[0] == ran[1] and len(ran) == 4 and len(rows) == 3
  assert [own.value for own in stored(study).trials] == [rate / 10 for rate in ran[1:]]


def test_two_searches_share_a_study(config, tmp_path, monkeypatch):
  study = tmp_path / "study"
  ran = []
  beside = []

  def fake(path, workdir, overrides, stop):
    if not ran:
      ran.append(overrides["train.lr"])
      beside.extend(search(config, study, {}, 4))
      ran.pop(0)
    return training(ran)(path, workdir, overrides, stop)

  monkeypatch.setattr(trials, "run_trial", fake)
  rows = search(config, study, {}, 4)
  assert len(ran) == len(set(ran)) == 4
  assert [row["status"] for row in rows] == ["finished"] * 4
  here = f"running, process {os.getpid()} on {socket.gethostname()}"
  assert [row["status"] for row in beside] == [here, *["finished"] * 3]
  assert len(json.loads((study / "study.json").read_text())) == 4


def test_failures_count_and_are_not_run_again(config, tmp_path, monkeypatch):
  study, ran = tmp_path / "study", []
  monkeypatch.setattr(trials, "run_trial", training(ran, code=7))
  for _ in range(2):
    assert [row["status"] for row in search(config, study, {}, 2)] == ["exit 7"] * 2
  assert len(ran) == 2
  assert [own.state.name for own in stored(study).trials] == ["FAIL"] * 2


def test_a_space_that_is_exhausted_ends_the_search(config, tmp_path, monkeypatch):
  config.write_text(CONFIG.replace('("log", 0.5, 8.0)', '("choice", [0.5, 2.0])'))
  study, ran = tmp_path / "study", []
  monkeypatch.setattr(trials, "run_trial", training(ran))
  rows = search(config, study, {}, 3)
  assert sorted(ran) == [0.5, 2.0] and len(rows) == 2
  asked = stored(study).trials
  assert [own.state.name for own in asked if "host" in own.user_attrs] == ["COMPLETE"] * 2
  search(config, study, {}, 3)
  assert len(ran) == 2 and len(stored(study).trials) == len(asked)


def test_a_proposal_that_is_known_is_no_trial(config, tmp_path, monkeypatch):
  """The sampler always proposes the same rate."""
  study, ran = tmp_path / "study", []
  monkeypatch.setattr(trials, "run_trial", training(ran))
  monkeypatch.setattr(Space, "overrides", lambda self, proposed: {"train.lr": 2.0})
  monkeypatch.setattr(search_module, "_REPEATED", 3)
  assert len(search(config, study, {}, 2)) == 1 and ran == [2.0]
  assert [own.state.name for own in stored(study).trials] == ["COMPLETE", *["FAIL"] * 3]


def test_machines_share_a_storage(config, tmp_path, monkeypatch):
  """The other machine has folders of its own; its results are in the table, also when listed."""
  ran, url = [], f"sqlite:///{tmp_path}/shared.db"
  monkeypatch.setattr(trials, "run_trial", training(ran))
  with monkeypatch.context() as patch:
    patch.setattr(socket, "gethostname", lambda: "far")
    search(config, tmp_path / "far" / "study", {}, 2, url)
    # A trial that is begun there is not taken here.
    proposal = stored(None, url).ask(Space({"train.lr": ("log", 0.5, 8.0)}).distributions())
    proposal.set_user_attr("host", "far")
  rows = search(config, tmp_path / "here" / "study", {}, 4, url)
  assert len(ran) == 3
  assert [row["status"] for row in rows] == ["finished on far"] * 2 + ["begun on far", "finished"]
  assert [row["val_loss"] for row in rows[:2]] == [rate / 10 for rate in ran[:2]]
  assert "2.5e+12" in table(rows[:1])


@pytest.mark.parametrize(
  "space, message",
  [
    ({"train.l": ("log", 0.1, 1.0)}, "did you mean 'train.lr'"),
    ({"train.steps": ("int", -1, 9)}, "trial steps=-1-.*steps"),
    ({"train.steps": ("uniform", 1.5, 9.5)}, "steps=1.5 must be a whole number"),
    ({"train.optimizer": ("choice", ["adamw", "adm"])}, "trial optimizer=adm-.*'adm'"),
    ({"train.lr": ("log", 0.0, 1.0)}, r"'train.lr': \('log', 0.0, 1.0\); it must read"),
    ({"train.lr": ("log", 2.0, 1.0)}, "low < high"),
    ({"train.lr": ("uniform", 1.0)}, "must read"),
    ({"train.lr": ("int", 0.5, 2)}, "must read"),
    ({"train.lr": ("choice", [])}, "must read"),
    ({"train.lr": 0.1}, "'train.lr': 0.1; it must read"),
    ({}, "let it return a dict"),
  ],
)
def test_wrong_spaces_are_refused_before_anything_runs(tmp_path, monkeypatch, space, message):
  monkeypatch.setattr(trials, "run_trial", lambda *_: pytest.fail("nothing may run"))
  config = tmp_path / "config.py"
  text = f"from tests.tiny_config import get_config\n\ndef space():\n  return {space!r}\n"
  config.write_text(text)
  with pytest.raises(ConfigError, match=message):
    search(config, tmp_path / "study", {}, 3)
  assert not (tmp_path / "study").exists()


def test_other_refusals(config, tmp_path, monkeypatch):
  study = tmp_path / "study"
  monkeypatch.setattr(trials, "run_trial", training([]))
  with pytest.raises(ConfigError, match="--override=train.lr=1 is in space"):
    search(config, study, {"train.lr": "1"}, 3)
  with pytest.raises(ConfigError, match="--storage=nonsense cannot be used"):
    search(config, study, {}, 3, "nonsense")
  search(config, study, {}, 1)
  with pytest.raises(ConfigError, match="has searched .* name another --study"):
    search(config, study, {"train.ema": "0.5"}, 3)
  with pytest.raises(ConfigError, match="has no sweep"):
    sweep_module.sweep(config, study, {})
  given = {"_CONFIG": config, "_STUDY": study, "_OVERRIDE": [], "_LIST": False, "_SEEDS": []}
  given |= {"_STORAGE": None, "_SEARCH": 3, "_PRUNE": False}
  for name, value in given.items():
    monkeypatch.setattr(sweep_module, name, types.SimpleNamespace(value=value), raising=False)
  monkeypatch.setattr(sweep_module._SEEDS, "value", ["0", "1"])
  with pytest.raises(ConfigError, match="--seeds=0,1 does not go with --search"):
    sweep_module.main(None)
  monkeypatch.setattr(sweep_module._SEARCH, "value", None)
  monkeypatch.setattr(sweep_module._STORAGE, "value", "sqlite:///a.db")
  with pytest.raises(ConfigError, match="--storage=sqlite:///a.db is Optuna's; add --search"):
    sweep_module.main(None)


def test_without_optuna_the_install_line_is_given(config, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "optuna", None)
  with pytest.raises(ConfigError, match=r"pip install 'freqformer\[search\]'"):
    search(config, tmp_path / "study", {}, 3)


def test_choices_may_be_anything():
  space = Space({"a": ("choice", [(1, 2), None, True]), "b": ("int", 1, 3), "c": ("uniform", 0, 1)})
  assert space.distributions()["a"].choices == ("(1, 2)", "None", "True")
  proposed = {"a": "(1, 2)", "b": 2, "c": 0.123456}
  assert space.overrides(proposed) == {"a": (1, 2), "b": 2, "c": 0.1235}
  assert len(list(space.corners())) == 1 + 2 + 1 + 1
  assert space.size() == math.inf
  assert Space({"a": ("choice", [1, 2]), "b": ("int", 1, 3)}).size() == 6
