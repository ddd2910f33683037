"""Time beside a step is told from the step's own; shares of lines are weighed by their seconds."""

import types

import jax.numpy as jnp
import pytest

from benchmarks.cpu import loop
from freqformer.train.step import TrainState


def test_what_lies_between_steps_is_measured(monkeypatch):
  clocks = types.SimpleNamespace(now=0.0, work=0.0)

  def sleep(seconds):
    clocks.now += seconds

  stand_in = types.SimpleNamespace(
    sleep=sleep, perf_counter=lambda: clocks.now, thread_time=lambda: clocks.work
  )
  monkeypatch.setattr(loop, "time", stand_in)
  between = loop.Between()
  step = between.make_train_step(None, None)
  state = TrainState(jnp.int32(3), None, None, None, None)
  for beside, work in ((9.0, 9.0), (1.0, 0.25), (4.0, 0.75)):  # the first is before any step
    clocks.now += beside
    clocks.work += work
    state, told = step(state, None, None, None)
  assert int(state.step) == 6 and float(told["skipped"]) == 0
  wanted = {"work_ms": 500.0, "beside_ms": 2500.0, "beside_ms_median": 2500.0}
  assert between.row() == pytest.approx(wanted)


def test_saves_are_rows_of_both_kinds():
  rows = loop.saves(arrays=2, numbers=50, rounds=1)
  assert [row["name"] for row in rows] == ["save/waits", "save/background"]
  for row in rows:
    assert row["bytes"] == 400 and 0 < row["held_ms"] <= row["written_ms"]


def test_shares_are_of_all_seconds():
  lines = [
    {"steps_per_s": 1.0, "data_wait": 0.5, "loop": 0.25},
    {"steps_per_s": 1 / 3, "data_wait": 0.1, "loop": 0.05},
  ]
  wanted = {"step_ms": 2000.0, "data_wait": 0.8 / 4, "loop": 0.4 / 4}
  assert loop.shares(lines) == pytest.approx(wanted)
