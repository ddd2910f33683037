"""Measured velocities are those that were rendered or drawn."""

import dataclasses

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.data import pans
from freqformer.data.codec import CodecConfig, make_codec
from freqformer.data.fields import Fields, FieldsConfig
from freqformer.evaluate import motion
from tests.data.test_pans import scene

SIZES = pans.PansConfig(rows=64, cols=80, frames=8, speeds=(0.5, 1.0, 2.0), directions=8)
FIELDS = FieldsConfig(grid=(4, 8, 8), channels=2, labels="velocity")


@pytest.fixture(scope="module")
def clips():
  """Three clips of every direction, in the order of the classes; their velocities and labels."""
  photo = scene(3, (300, 400))
  shots = [
    pans.draw_shot(SIZES, "photo", name, number, (300, 400))
    for name in pans.DIRECTIONS
    for number in range(3)
  ]
  videos = np.stack([pans.render_clip(photo, shot, SIZES) for shot in shots])
  return videos, np.array([shot.motion.velocity for shot in shots]), np.arange(24) // 3


def test_velocities_are_those_that_were_rendered(clips):
  videos, wanted, _ = clips
  for lag in (1, 3):
    np.testing.assert_allclose(motion.velocities(videos, lag), wanted, atol=0.1)
  with pytest.raises(ValueError, match="videos of 8 frames"):
    motion.velocities(videos, lag=8)


def test_velocities_survive_the_codec(clips):
  """Blocks of 2 x 8 x 8 pixels stay where they are; frames two latents apart share none."""
  videos, wanted, _ = clips
  codec = make_codec(CodecConfig(factor=(2, 8, 8), channels=16))
  decoded = codec.decode(codec.encode(videos), videos.shape[1:4])
  error = np.abs(motion.velocities(decoded, lag=4) - wanted).max(1)
  assert np.median(error) < 0.05 and error.max() < 0.2


def test_classes_that_name_a_direction_are_judged(clips):
  videos, wanted, labels = clips
  names = list(pans.DIRECTIONS)
  rows = motion.judge_directions(videos, labels, names)
  assert [row["class"] for row in rows] == names
  assert all(row["follows"] == 1 and row["samples"] == 3 for row in rows)
  np.testing.assert_allclose(rows[0]["velocity"], [0, 1], atol=0.1)
  wrong = motion.judge_directions(videos, np.roll(labels, 3), names)
  assert all(row["follows"] == 0 for row in wrong)
  still = np.repeat(videos[:1, :1], 8, 1)
  assert motion.judge_directions(still, np.array([0]), names)[0]["follows"] == 0
  assert motion.judge_directions(still, np.array([0]), ["zoom_in"])[0]["follows"] is None


@pytest.mark.parametrize(
  "velocity, four, eight",
  [
    ((0.0, 0.05), False, False),  # stands still
    ((0.0, 0.2), True, True),
    ((0.6, 1.0), True, False),  # 31 degrees: nearer to the diagonal, if that is a class
    ((1.1, 1.0), False, False),
    ((0.0, -1.0), False, False),
  ],
)
def test_a_direction_is_followed_if_no_other_one_is_nearer(velocity, four, eight):
  found = [motion.follows(np.array(velocity), "right", count) for count in (4, 8)]
  assert found == [four, eight]


def test_fields_have_the_velocity_of_their_label():
  items = [Fields(FIELDS, "val")[i] for i in range(40)]
  latents = np.stack([item["latent"] for item in items])
  labels = np.array([item["label"] for item in items])
  rows = motion.judge_fields(FIELDS, latents, labels)
  assert sum(row["samples"] for row in rows) == 40
  assert all(row["follows"] == 1 for row in rows)
  wrong = motion.judge_fields(FIELDS, latents, (labels + 1) % 9)
  assert all(row["follows"] == 0 for row in wrong)
  assert wrong[0]["class"] == "y-1x-1"


@pytest.mark.parametrize("change", [dict(labels="none"), dict(copies=1, target="velocity")])
def test_fields_without_a_known_velocity_are_refused(change):
  config = dataclasses.replace(FIELDS, **change)
  with pytest.raises(ConfigError, match="has no velocity to judge by"):
    motion.judge_fields(config, np.zeros((1, 4, 8, 8, 2)), np.zeros(1, int))
