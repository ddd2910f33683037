"""The study's arms on a GPU, rehearsed on a CPU: equal seconds, equal clips, Hopper's kernels."""

import itertools
import types

import numpy as np
import pytest
from freqformer.kernels.around.prepare import BLOCKS, HEAD_DIMS

from benchmarks.gpu import slot_steps, study
from benchmarks.gpu.device import Deadline
from freqformer.data.fields import Fields
from freqformer.train.experiment import experiment


def test_every_arm_is_in_a_plan_and_runs_the_kernels():
  """Head dimension, tiles and type are those that the Hopper kernels take."""
  steps = (*slot_steps.STUDY_1, *slot_steps.STUDY_2)
  assert [step.name for step in steps if step.name != "facts"] == list(study.ARMS)
  for arm in study.ARMS:
    exp = experiment(study.arm_config(arm, rehearse=False))
    layout = exp.model.layout(exp.latent_shape)
    assert layout.n == 16_384 and layout.even and layout.block in BLOCKS
    assert exp.model.width // exp.model.heads in HEAD_DIMS and exp.model.dtype == "bfloat16"
    assert exp.model.attention.implementation == "hopper"


def test_batches_hold_the_clips_in_order():
  split = Fields(experiment(study.arm_config("dense", rehearse=True)).data, "val")
  ahead = study.drawn_ahead(split, 2)
  for number, batch in enumerate(itertools.islice(ahead, 3)):
    for place in range(2):
      np.testing.assert_array_equal(batch["latent"][place], split[2 * number + place]["latent"])
  ahead.close()


def test_an_arm_trains_for_its_seconds_and_judges_along_the_way(monkeypatch):
  """By a clock of its own, of which a step takes 0.01 seconds however busy the machine is."""
  reads = itertools.count()
  clock = types.SimpleNamespace(monotonic=lambda: 0.01 * next(reads))
  monkeypatch.setattr(study, "time", clock)
  config = study.arm_config("window", rehearse=True)
  config.model.attention.implementation = "reference"  # which compiles fastest
  exp = experiment(config)
  row = study.measure("window", exp, 0.5, Deadline(600))
  seconds = [point["seconds"] for point in row["curve"]]
  assert seconds == sorted(seconds) and len(seconds) == 1 + study.POINTS
  assert row["training_seconds"] == seconds[-1] >= row["wanted_seconds"] == 0.5
  assert row["correct"] and row["steps"] > 20 and row["regret"] < row["curve"][0]["regret"]
  for point in row["curve"]:
    assert np.mean(point["regret_buckets"]) == pytest.approx(point["regret"])
    assert len(point["bayes_buckets"]) == study.BUCKETS
