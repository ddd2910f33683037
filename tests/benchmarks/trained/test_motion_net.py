"""Rendered motion is what its targets say, and mirroring a clip mirrors them."""

import numpy as np
import pytest

from benchmarks.trained import motion_net as trained
from freqformer.evaluate import motion_net

NAMES = list(motion_net.TARGETS)


@pytest.mark.parametrize("kind", [trained.affine, trained.bent, trained.polar])
def test_coordinates_are_carried_by_the_velocity(kind):
  step = 1e-4  # clips
  for seed in range(12):
    rng = np.random.default_rng(seed)
    motion = kind(rng)
    # Far from the middle, where polar coordinates are rounded off.
    u, v = rng.uniform(0.45, 0.5, (2, 20, 1, 1)) * rng.choice([-1, 1], (2, 1, 1, 1))
    t = np.full((20, 1, 1), 0.31)
    across, down = motion.velocity(t, u, v)
    before = motion.coordinates(t, u, v)
    after = motion.coordinates(t + step, u + step * across, v + step * down)
    still = motion.coordinates(t + step, u, v)
    carried = np.abs(np.subtract(after, before)).max()
    assert carried < 0.03 * np.abs(np.subtract(still, before)).max() + 1e-5 * step, seed


@pytest.fixture(scope="module")
def clips():
  return trained.render(seed=77, count=64)


def test_targets_follow_a_clip_that_is_mirrored_or_run_backwards(clips):
  videos, targets = trained.augmented(*clips, np.random.default_rng(1))
  assert (videos != clips[0]).any((1, 2, 3)).mean() > 0.9
  scores = trained.r_squared(motion_net.load(), videos, targets)
  for name in ("across", "down", "rotation", "divergence", "orientation_cos", "orientation_sin"):
    assert scores[name] > 0.3, name
  again = [trained._texture(video) for video in videos]
  for name in ("orientation_cos", "orientation_sin", "isotropy"):
    # Targets are of every second frame: in clips without order others are seen backwards.
    error = np.array([one[name] for one in again]) - targets[:, NAMES.index(name)]
    assert np.mean(np.abs(error) < 0.06) > 0.9, name


def test_clips_and_targets_are_a_function_of_their_number(clips):
  again, targets = trained.clip_and_targets(77, 5)
  np.testing.assert_array_equal(again.astype(np.float16), clips[0][5])
  np.testing.assert_array_equal(targets, clips[1][5])
  # Frames in no order have no velocity, and some clips are such.
  coherence = clips[1][:, NAMES.index("coherence")]
  assert (np.isnan(clips[1][:, NAMES.index("speed")]) == (coherence < 0.5)).all()
  assert 0 < (coherence == 0).mean() < 0.4


def test_a_few_steps_of_training_learn(clips):
  params = trained.train(*clips, steps=4, seed=0)
  assert set(params) == set(motion_net.load())
  assert params["bias"][NAMES.index("frequency")] > 1
  assert np.abs(params["head"]).max() > 0
