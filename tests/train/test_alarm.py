"""A run that is finite and yet lost is warned of, once."""

import dataclasses

import numpy as np
import pytest

from benchmarks.cpu.loop import Between
from freqformer.model.architectures import model_config
from freqformer.train import run
from freqformer.train.alarm import Alarm
from freqformer.train.metrics import read
from freqformer.train.step import TrainConfig
from tests.command.test_fields import small
from tests.tiny_config import get_config

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


def model(**methods):
  """Returns a model of a layer for each method: its name and what its config changes."""
  config = get_config().model.to_dict()
  layers = tuple((i, i + 1, name) for i, name in enumerate(methods))
  return model_config(config | {"depth": len(methods), "attention": methods | {"layers": layers}})


ROUTED = model(freqformer={}, octaves={"levels": 2})
BRANCHES = ("low", "mid", "high", *ROUTED.branches[3:])


def weights(layer, branch, others=0.0):
  """Returns those of `ROUTED`, in four quarters and two heads; a layer gives all to a branch."""
  found = np.zeros((2, 4, 2, 5), np.float32)
  found[0, ..., :3] = [0.3, 0.3, 0.4]
  found[1, ..., 3:] = 0.5
  own = slice(0, 3) if layer == 0 else slice(3, 5)
  found[layer, ..., own] = others
  found[layer, ..., branch] = 1 - 2 * others
  return found


def test_a_collapsed_router_is_told_from_one_that_decides_by_t():
  alarm = Alarm(CONFIG)
  assert not alarm.routed(10, weights(0, 2), ROUTED)  # while it warms up
  decides = weights(0, 2, others=0.01)
  decides[0, 0] = [1, 0, 0, 0, 0]
  one_head = weights(0, 2, others=0.01)
  one_head[0, :, 0] = [1, 0, 0, 0, 0]
  for probs in (decides, one_head, weights(0, 2, others=0.03)):
    assert not alarm.routed(11, probs, ROUTED)
  found = alarm.routed(11, weights(0, 2, others=0.02), ROUTED)
  assert found["about"] == "router" and "to high in layer 0. " in found["text"]
  assert not alarm.routed(12, weights(0, 2), ROUTED)
  found = Alarm(CONFIG).routed(11, weights(1, 4), ROUTED)
  assert f"to {BRANCHES[4]} in layer 1. " in found["text"]


def test_a_branch_that_nothing_uses_is_named():
  probs = weights(0, 1)
  probs[0] = [0.5, 0.005, 0.495, 0, 0]
  found = Alarm(CONFIG).routed(11, probs, ROUTED)
  assert found["about"] == "branch" and "to mid at step 11" in found["text"]
  probs[0, 3, 1, 1] = 0.02
  assert not Alarm(CONFIG).routed(11, probs, ROUTED)


def test_heads_without_a_router_are_not_looked_at():
  """Their branches are fixed, and other layers have nothing to do with them."""
  mixed = model(
    sliding_tile={},
    sparseflow={"allocation": (2, 0)},  # every head has the same branch, none the other
    octaves={"levels": 2},
    dense={},
    freqformer={},
  )
  assert mixed.branches == ("sparse", "linear", *BRANCHES[3:], *BRANCHES[:3])
  probs = np.zeros((3, 4, 2, 7), np.float32)
  probs[0, ..., 0] = 1
  probs[1, ..., 2:4] = 0.5
  probs[2, ..., 4:] = 1 / 3
  assert Alarm(CONFIG).routed(11, probs, mixed) is None
  probs[2, ..., 4:] = [0, 0, 1]
  found = Alarm(CONFIG).routed(11, probs, mixed)
  assert found["about"] == "router" and "to high in layer 4. " in found["text"]
  fixed = model(sparseflow={"allocation": (2, 0)}, sliding_tile={})
  assert Alarm(CONFIG).routed(11, probs[:1, ..., :2], fixed) is None


@pytest.mark.parametrize("collapsed", [False, True])
def test_a_run_warns_of_its_router(tmp_path, monkeypatch, collapsed):
  """By a step that trains nothing and a validation whose result is given."""
  config = small(steps=2)
  config.train.val_every = 1
  config.model.update(dict(depth=2, heads=2))
  config.model.attention.layers = ((0, 1, "sparseflow(allocation=(2, 0))"), (1, None, "octaves"))
  probs = np.zeros((2, 4, 2, 2 + 3), np.float32)
  probs[0, ..., 0] = 1
  probs[1, ..., 2:] = [0.97, 0.02, 0.01] if collapsed else 1 / 3
  result = {"loss": 1.0, "linear_buckets": [2.0] * 4, "probs": probs, "choice": probs}
  monkeypatch.setattr(run, "_validation", lambda *_: lambda *_: result)
  monkeypatch.setattr(run, "make_train_step", Between().make_train_step)
  run.train(config, tmp_path)
  found = [row["text"] for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "warning"]
  assert len(found) == int(collapsed)
  assert all(f"to {BRANCHES[3]} in layer 1. " in text for text in found)


def test_a_warm_up_that_is_cut_short_is_taken_as_it_runs():
  short = dataclasses.replace(CONFIG, steps=12)
  assert first_warning([1.0] * 6 + [9.0] * 6, Alarm(short)) == 8
