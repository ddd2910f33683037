"""The convnet sees no colour, has the size that it says, and knows motion that it is shown."""

import numpy as np
import pytest

from freqformer.evaluate import motion_net

RNG = np.random.default_rng(0)


def drifting(speed: float, clips: int = 4, frames: int = 16, side: int = 48) -> np.ndarray:
  """Returns stripes of random phase that move to the right: frame sides per clip."""
  u = (np.arange(side) + 0.5) / side
  t = (np.arange(frames) + 0.5) / frames
  phase = RNG.uniform(0, 1, (clips, 1, 1, 1))
  wave = np.sin(2 * np.pi * (3 * (u - speed * t[:, None, None]) + phase))
  wave = np.broadcast_to(wave, (clips, frames, side, side))
  return np.uint8(128 + 60 * wave)[..., None] * np.ones(3, np.uint8)


def test_input_has_no_brightness_and_no_contrast():
  values = RNG.integers(0, 80, (2, 10, 20, 30, 3), np.uint8)
  videos = 2 * values + 60
  clips = motion_net.prepare(videos)
  assert clips.shape == (2, motion_net.FRAMES, motion_net.SIDE, motion_net.SIDE)
  np.testing.assert_allclose(motion_net.prepare(values + 20), clips, atol=1e-3)
  np.testing.assert_allclose(clips.std((1, 2, 3)), 1, rtol=1e-3)
  flat = motion_net.prepare(np.full_like(videos, 90))
  assert not np.abs(flat).max() > 1e-3
  with pytest.raises(ValueError, match="at least 8 frames"):
    motion_net.prepare(videos[:, :7])


def test_resizing_keeps_what_fits():
  place = np.linspace(0, 2 * np.pi, 97)[:-1]
  small = motion_net.resize_matrix(96, 24) @ np.sin(place)
  np.testing.assert_allclose(small, np.sin(place).reshape(24, 4).mean(1), atol=0.03)
  for n in (7, 48, 100):
    np.testing.assert_allclose(motion_net.resize_matrix(n, 48).sum(1), 1, rtol=1e-5)
  np.testing.assert_array_equal(motion_net.resize_matrix(48, 48), np.eye(48))


def test_frames_are_taken_in_equal_steps():
  ramp = np.arange(31, dtype=np.uint8)[None, :, None, None, None] * np.ones((8, 8, 3), np.uint8)
  times = motion_net.prepare(ramp)[0, :, 0, 0]
  np.testing.assert_allclose(np.diff(times), np.diff(times).mean(), rtol=1e-4)
  np.testing.assert_allclose(
    motion_net.prepare(ramp[:, :9])[0, ::15, 0, 0], times[[0, -1]], atol=0.1
  )


def test_features_do_not_depend_on_the_batch():
  videos = drifting(0.5, clips=3)
  together = motion_net.features([videos])
  assert together.shape == (3, motion_net.FEATURES)
  apart = motion_net.features([videos[:1], videos[1:]])
  np.testing.assert_allclose(apart, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("speed", [-0.4, 0.4])
def test_the_committed_weights_tell_which_way_stripes_move(speed):
  params = motion_net.load()
  found = motion_net.regress(params, motion_net.features([drifting(speed)]))
  found = dict(zip(motion_net.TARGETS, np.asarray(found).mean(0), strict=True))
  assert found["across"] * np.sign(speed) > 0.1
  assert abs(found["down"]) < 0.1
  assert found["orientation_cos"] > 0.7
  assert found["coherence"] > 0.8
