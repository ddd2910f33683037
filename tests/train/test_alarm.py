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


def weights(layer, branch, others=0.0):
  """Two layers, four quarters, two heads, three branches; one layer gives all to a branch."""
  found = np.tile(np.float32([0.3, 0.3, 0.4]), (2, 4, 2, 1))
  found[layer] = others
  found[layer, ..., branch] = 1 - 2 * others
  return found


def test_a_collapsed_router_is_told_from_one_that_decides_by_t():
  names = ("low", "mid", "high")
  alarm = Alarm(CONFIG)
  assert not alarm.routed(10, weights(1, 2), names)  # while it warms up
  decides = weights(1, 2)
  decides[1, 0] = [1, 0, 0]
  one_head = weights(1, 2)
  one_head[1, :, 0] = [1, 0, 0]
  for probs in (decides, one_head, weights(1, 2, others=0.03)):
    assert not alarm.routed(11, probs, names)
  found = alarm.routed(11, weights(1, 2, others=0.02), names)
  assert found["about"] == "router" and "to high in layer 1 (of" in found["text"]
  assert not alarm.routed(12, weights(1, 2), names)


def test_a_branch_that_nothing_uses_is_named():
  probs = np.tile(np.float32([0.5, 0.005, 0.495]), (2, 4, 2, 1))
  found = Alarm(CONFIG).routed(11, probs, ("low", "mid", "high"))
  assert found["about"] == "branch" and "to mid at step 11" in found["text"]
  probs[1, 3, 1, 1] = 0.02
  assert not Alarm(CONFIG).routed(11, probs, ("low", "mid", "high"))


def test_a_warm_up_that_is_cut_short_is_taken_as_it_runs():
  short = dataclasses.replace(CONFIG, steps=12)
  assert first_warning([1.0] * 6 + [9.0] * 6, Alarm(short)) == 8
