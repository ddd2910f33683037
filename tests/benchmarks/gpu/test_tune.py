"""The search over kernel configurations: what it refuses, what it needs to choose and to write."""

import dataclasses
import json

import pytest
from freqformer.kernels.block_sparse import triton_tuning, tuning
from freqformer.kernels.block_sparse.tuning import Key, TuningConfig

from benchmarks.gpu import tune, tune_trials
from benchmarks.gpu.device import Deadline, open_store
from benchmarks.gpu.tune_subjects import SUBJECTS
from tools import offline

HOPPER = SUBJECTS["hopper"]
KEY = Key("h100", 64, 64, 128, "forward")
BUDGET = tune_trials.Budget(Deadline(1e9), tune._ONCE, tune._ONCE, finalists=1)
LATE = dataclasses.replace(BUDGET, deadline=Deadline(0))
GRID = (4, 8, 16)


def _trials(count=3):
  return [tune_trials.Trial(config) for config in tuning.candidates(KEY)[:count]]


def test_the_default_compiles_without_spilling():
  """For an absent H100; `python -m benchmarks.gpu.tune --static` does it for every candidate."""
  key = Key("h100", 64, 64, 64, "dq")
  trial = tune_trials.compile_candidate(HOPPER, key, tuning.default(key))
  assert not trial.refused and trial.registers > 100
  assert abs(tuning.default(key).shared_bytes(key) - trial.shared_bytes) < 4096
  assert trial.shared_bytes <= offline.SHARED_LIMIT


@pytest.mark.parametrize(
  "resources, reason",
  [
    ((168, 8, 4, 1000), "spills 12 bytes"),
    ((168, 0, 0, offline.SHARED_LIMIT + 1), "bytes of shared memory"),
    ((168, 0, 0, offline.SHARED_LIMIT), ""),
  ],
)
def test_candidates_that_spill_or_do_not_fit_are_refused(monkeypatch, resources, reason):
  # Another kernel's report must not count.
  other = offline.KernelResources("attention_dq_0", 9, 99, 99, 9)
  own = offline.KernelResources("attention_forward_1", *resources)
  found = offline.Compilation(None, (own, other))
  monkeypatch.setattr(offline, "compile_for", lambda *_, **__: found)
  refused = tune_trials.compile_candidate(HOPPER, KEY, tuning.default(KEY)).refused
  assert reason in refused and bool(refused) == bool(reason)


def test_where_nothing_compiles_ahead_the_device_decides(monkeypatch):
  untried = [tune_trials.Trial(config) for config in tuning.candidates(KEY)]

  def missing(*_, **__):
    raise RuntimeError("needs jax-cuda13-plugin")

  monkeypatch.setattr(offline, "compile_for", missing)
  assert tune.compiled(HOPPER, KEY, static=False) == untried
  with pytest.raises(RuntimeError, match="needs jax-cuda13-plugin"):
    tune.compiled(HOPPER, KEY, static=True)

  def broken(*_, **__):
    raise ValueError("no such layout")

  monkeypatch.setattr(offline, "compile_for", broken)
  assert tune.compiled(HOPPER, KEY, static=False) == untried
  assert all("no such layout" in trial.refused for trial in tune.compiled(HOPPER, KEY, static=True))


def test_right_candidates_are_timed():
  key = dataclasses.replace(KEY, direction="dkv")
  trials = [tune_trials.Trial(tuning.default(key))]
  (trial,) = tune_trials.time_candidates(HOPPER, key, trials, "reference", BUDGET, GRID)
  assert trial.seconds > 0 and trial.final and 0 <= trial.error < 2**-7 and not trial.refused


def test_wrong_and_failing_candidates_are_refused(monkeypatch):
  """Each candidate is traced under its own configuration, so that a wrong one is found out."""
  right, wrong, failing = _trials()
  run = tune_trials.run

  def by_config(direction, implementation, q, rest, mask):
    out, lse = run(direction, implementation, q, rest, mask)
    config = tuning.lookup(KEY)
    if config == failing.config and implementation != "xla":
      raise RuntimeError("launch failed")
    return (out * 1.1 if config == wrong.config and implementation != "xla" else out), lse

  monkeypatch.setattr(tune_trials, "run", by_config)
  trials = [right, wrong, failing]
  first, second, third = tune_trials.time_candidates(HOPPER, KEY, trials, "reference", BUDGET, GRID)
  assert first.seconds and not first.refused
  assert "wrong: relative error" in second.refused and second.seconds is None
  assert "launch failed" in third.refused
  assert tune_trials.choose(HOPPER, KEY, [first, second, third]) == right.config


def test_a_late_search_stops():
  (trial,) = tune_trials.time_candidates(HOPPER, KEY, _trials(1), "reference", LATE, GRID)
  assert trial.refused == "not reached in time" and tune_trials.choose(HOPPER, KEY, [trial]) is None


def test_noise_does_not_replace_the_default():
  default, other = tuning.candidates(KEY)[:2]

  def pick(seconds):
    first = tune_trials.Trial(default, seconds=1.0, final=True)
    second = tune_trials.Trial(other, seconds=seconds, final=True)
    return tune_trials.choose(HOPPER, KEY, [first, second])

  assert pick(0.995) == default and pick(0.98) == other and pick(1.2) == default
  briefly = tune_trials.Trial(other, seconds=0.5)
  assert tune_trials.choose(HOPPER, KEY, [briefly]) is None


def test_a_static_search_reports_and_writes_no_table(monkeypatch, tmp_path, capsys):
  def fits(_, key, config):
    refused = "" if config == tuning.default(key) else "spills 4 bytes per thread"
    return tune_trials.Trial(config, refused, 168, 1)

  monkeypatch.setattr(tune, "compile_candidate", fits)
  monkeypatch.setattr(tune, "known_trials", lambda *_: [])
  monkeypatch.setattr(tuning, "write", None)
  store = open_store("tuning_static", "command", tmp_path)
  assert tune.search(HOPPER, [KEY], store, BUDGET, static=True) == {}
  (row,) = json.loads(store.path.read_text())
  assert row["static"] and row["chosen"] is None
  assert len(row["trials"]) == len(tuning.candidates(KEY))
  assert f"1 of {len(row['trials'])} candidates fit" in capsys.readouterr().out


def test_a_static_report_of_the_same_kernels_saves_compiling(monkeypatch, tmp_path):
  monkeypatch.setattr(tune.rows, "RESULTS", tmp_path)
  row = {
    "name": tune.row_name(HOPPER, KEY),
    "kernels": tune.kernels_digest(),
    "trials": [dataclasses.asdict(t) for t in _trials()],
  }
  tune.rows.merge_rows(tmp_path / "tuning_static.json", [row])
  assert tune.known_trials(HOPPER, KEY) == _trials()
  tune.rows.merge_rows(tmp_path / "tuning_static.json", [row | {"kernels": "older"}])
  assert tune.known_trials(HOPPER, KEY) == []


def test_a_written_table_is_what_the_kernels_look_up(monkeypatch, tmp_path):
  monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuning.json")
  tuning.table.cache_clear()
  assert tuning.table() == {}
  best = TuningConfig(stages=2, step=64)
  tuning.write({KEY: best}, {"device": "test"}, tuning.TABLE)
  assert tuning.table() == {KEY: best} and tuning.lookup(KEY) == best
  tuning.table.cache_clear()


def test_the_table_comes_back_with_the_report(monkeypatch, tmp_path):
  """After each key: a search that is killed keeps its choices, and only --out is returned."""
  monkeypatch.setattr(tuning, "TABLE", tmp_path / "checkout.json")
  tuning.table.cache_clear()
  store = open_store("tuning", "command", tmp_path, rehearse=True)
  keys = [KEY, dataclasses.replace(KEY, direction="dq")]
  monkeypatch.setattr(
    tune, "time_candidates", lambda _, key, trials, *__: _killed_at_dq(key, trials)
  )
  with pytest.raises(KeyboardInterrupt):
    tune.search(HOPPER, keys, store, BUDGET, places=[tmp_path / "copy.json"])
  written = json.loads((tmp_path / "copy.json").read_text())
  assert [row["key"]["direction"] for row in written["configs"]] == ["forward"]
  assert written["facts"]["ptxas"] and written["facts"]["rehearsal"] and not tuning.TABLE.exists()
  tuning.table.cache_clear()


def _killed_at_dq(key, trials):
  if key.direction == "dq":
    raise KeyboardInterrupt
  return [dataclasses.replace(trial, seconds=1.0, final=True) for trial in trials]


def test_keys_are_read_and_named_when_not_reached(tmp_path, capsys):
  key = HOPPER.parse_key("64:64:128:forward", "h100")
  assert key == KEY and key in HOPPER.all_keys("h100")
  assert tune.search(HOPPER, [key], open_store("tuning", "command", tmp_path), LATE) == {}
  assert "unreached tune: d=64 64x128 forward" in capsys.readouterr().out
  for text in ("128", "64:64:128:sideways"):
    with pytest.raises(ValueError, match="head_dim:block_q:block_kv:direction"):
      HOPPER.parse_key(text, "h100")


TRITON = SUBJECTS["triton"]


def test_triton_s_candidates_compile_for_any_gpu():
  device = TRITON.device("rtx4090")
  assert device == "sm89"
  with pytest.raises(ValueError, match="--target='v100' is no device of triton; name one of a100"):
    TRITON.device("v100")
  key = TRITON.parse_key("64:64:64:forward", device)
  trial = tune_trials.compile_candidate(TRITON, key, triton_tuning.default(key))
  assert not trial.refused and 100 < trial.registers <= 255
  # Eight times the rows that fit the registers of four warps.
  wide = TRITON.parse_key("256:128:128:dkv", device)
  spilling = triton_tuning.TritonConfig(64, 16, 4, 2)
  assert "spills" in tune_trials.compile_candidate(TRITON, wide, spilling).refused
  names = [tune.report_name(subject, "sm89", static=True) for subject in SUBJECTS.values()]
  assert names == ["tuning_static", "tuning_static_triton_sm89"]


def test_a_table_of_triton_s_is_looked_up(monkeypatch, tmp_path):
  monkeypatch.setattr(triton_tuning, "TABLE", tmp_path / "triton_tuning.json")
  triton_tuning.table.cache_clear()
  key = TRITON.parse_key("64:64:64:forward", "sm89")
  best = triton_tuning.TritonConfig(64, 32, 4, 4)
  assert triton_tuning.lookup(key) != best
  triton_tuning.write({key: best}, {"device": "test"}, triton_tuning.TABLE)
  assert triton_tuning.lookup(key) == best
  triton_tuning.table.cache_clear()
