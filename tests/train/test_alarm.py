"""A run that is finite and yet lost is warned of, once."""

import dataclasses

import numpy as np
import pytest

from freqformer.train.alarm import Alarm
from freqformer.train.step import TrainConfig

CONFIG = TrainConfig(steps=1000, batch_size=1, warmup=10)
STEADY = [1.0, 1.2, 0.9, 1.1] * 5


def first_warning(losses, alarm=None, begin=1):
  """Returns the step of the first warning of training, logged at every step; None if none came."""
  alarm = alarm or Alarm(CONFIG)
  found = [step for step, loss in enumerate(losses, begin) if alarm.trained(step, loss)]
  assert len(found) <= 1
  return found[0] if found else None


@pytest.mark.parametrize(
  "losses, step",
  [
    (STEADY, None),
    (np.geomspace(10, 0.01, 200), None),
    (np.full(50, 1e-9), None),
    ([*STEADY, 1e17, 1e10, 177.0, 177.0], 21),
    ([*STEADY, *[3.9] * 9], 23),
    ([*STEADY, *[2.9] * 99], None),
    ([*STEADY, 5.0, *STEADY], None),  # one unlucky batch
    ([1.0] * 5 + [9.0] * 2 + STEADY, None),  # while it warms up
    ([1.0] * 6 + [9.0] * 20, 11),  # it goes on behind the warm-up
    ([*STEADY, *[float("nan")] * 9, *STEADY], None),  # steps that were skipped
    ([1.0, 1.0, 1e9], None),  # too few lines for a median
  ],
)
def test_an_explosion_is_told_from_noise(losses, step):
  assert first_warning(losses) == step


def test_a_resumed_run_knows_what_was_and_what_was_said():
  rows = [{"step": i, "kind": "train", "loss": loss} for i, loss in enumerate(STEADY, 1)]
  rows += [{"step": 20, "kind": "val", "loss": 7.0}, {"step": 20, "kind": "train", "loss": None}]
  assert first_warning([9.0], Alarm(CONFIG, rows), begin=21) == 21
  said = {"step": 20, "kind": "warning", "about": "training", "text": "x"}
  assert first_warning([9.0] * 9, Alarm(CONFIG, [*rows, said]), begin=21) is None


@pytest.mark.parametrize(
  "step, loss, warns",
  [(10, 9.0, False), (11, 9.0, True), (11, 1.5, False), (11, float("nan"), True)],
)
def test_validation_is_held_against_the_linear_predictor(step, loss, warns):
  alarm = Alarm(CONFIG)
  found = alarm.validated(step, loss, 1.57)
  assert (found is not None) == warns
  if warns:
    assert f"at step {step} is worse than the best linear prediction: {loss:.4g}" in found["text"]
    assert alarm.validated(step + 1, loss, 1.57) is None
    assert alarm.raised == {found["about"]} == {"validation"}


def test_a_warm_up_that_is_cut_short_is_taken_as_it_runs():
  short = dataclasses.replace(CONFIG, steps=12)
  assert first_warning([1.0] * 6 + [9.0] * 6, Alarm(short)) == 8
