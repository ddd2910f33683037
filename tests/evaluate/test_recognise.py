"""The judge names classes by motion and shape, and colours tell it nothing."""

import dataclasses

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.data import render
from freqformer.evaluate import motion_net, recognise

# One worker: what the file prepares is then made once.
pytestmark = pytest.mark.xdist_group("judge")

NAMES = ("DriftingStripes", "RotatingPetals", "SwayingStripes")


def clips(first: int, each: int):
  """Returns clips of every class, no two of one group, and their labels."""
  videos = [
    render.render_clip(name, first + i, 0, 31, 48, 64)[::2] for name in NAMES for i in range(each)
  ]
  return np.stack(videos), np.repeat(np.arange(len(NAMES)), each)


@pytest.fixture(scope="module")
def judge():
  return recognise.fit(*clips(1, 8), NAMES)


@pytest.fixture(scope="module")
def real():
  return clips(20, 5)


def test_real_clips_are_named_and_controls_are_not(judge, real):
  videos, labels = real
  report = judge.report(videos, labels, videos, labels)
  assert report["real"]["named"] >= 0.8
  assert report["real"]["classes_named"] == 3
  assert report["real"] == report["samples"]
  assert set(report["controls"]) == {"colour_noise", "shuffled", "frozen"}
  for name, share in report["controls"].items():
    assert share <= 0.25, name
  assert np.sum(report["real"]["confusion"], 1).tolist() == [5, 5, 5]


def test_labels_in_another_order_are_wrong(judge, real):
  videos, labels = real
  verdict = judge._verdict(judge.named(videos), (labels + 1) % 3)
  assert verdict["named"] <= 0.2
  assert verdict["classes_named"] == 0


def test_palettes_of_other_classes_change_no_answer(judge, real, monkeypatch):
  looks = dict(render.LOOKS)
  for name, other in zip(NAMES, (NAMES[1], NAMES[0], NAMES[1]), strict=True):
    palette = looks[other].palette
    monkeypatch.setitem(render.LOOKS, name, dataclasses.replace(looks[name], palette=palette))
  videos, labels = clips(20, 5)
  assert np.abs(videos.mean((1, 2, 3)) - real[0].mean((1, 2, 3))).max() > 20  # grey levels
  assert np.mean(judge.named(videos) == labels) >= 0.8


def test_controls_are_what_they_say(real):
  videos, _ = real
  still = recognise.frozen(videos)
  assert not np.diff(still.astype(int), axis=1).any()
  mixed = recognise.shuffled(videos)
  assert (mixed != videos).any()
  np.testing.assert_array_equal(
    np.sort(mixed.mean((2, 3, 4)), 1), np.sort(videos.mean((2, 3, 4)), 1)
  )
  noise = recognise.colour_noise(videos)
  # Of low contrast, so that 0 and 255 cut nothing off: rounding alone is left.
  soft = videos // 4 + 96
  np.testing.assert_allclose(
    recognise.colour_noise(soft).mean((1, 2, 3)), soft.mean((1, 2, 3)), atol=0.05
  )
  for own, clip in zip(noise, videos, strict=True):
    colours, wanted = (np.cov(x.reshape(-1, 3).T.astype(float)) for x in (own, clip))
    assert np.linalg.norm(colours - wanted) < 0.25 * np.linalg.norm(wanted)
  # White, smooth in space, and of clip 4 also slow.
  steps = [np.abs(np.diff(noise.astype(int), axis=axis)).mean((1, 2, 3, 4)) for axis in (1, 2)]
  assert steps[1][0] > 3 * steps[1][2]
  assert steps[0][2] > 2 * steps[0][4]


def test_what_is_far_from_all_clips_is_none(judge, real):
  videos, labels = real
  assert np.isfinite(judge.limit)
  squares = judge._squares(motion_net.features([videos])).min(1)
  near = dataclasses.replace(judge, limit=np.median(squares))
  assert ((near.named(videos) == recognise.NONE) == (squares > near.limit)).all()
  assert squares.max() < judge.limit


def test_a_class_needs_clips():
  with pytest.raises(ConfigError, match="'b' has 0 clips"):
    recognise.fit(np.zeros((4, 8, 8, 8, 3), np.uint8), [0] * 4, ["a", "b"])
