"""Measures how samples move, against how their class says that they should.

  python -m freqformer.evaluate --workdir=runs/pans --samples=samples --metrics=motion

A class that names a direction (camera moves over photographs) is judged by phase correlation of
decoded frames. A class that is a velocity (`data.labels="velocity"` of random fields) is judged by
the latents' likelihood.
"""

import math
from collections.abc import Sequence

import numpy as np

from freqformer.config import ConfigError
from freqformer.data.fields import Fields, FieldsConfig
from freqformer.data.pans import DIRECTIONS

# choice: cycles per pixel, the width of the Gaussian band that frames are compared in. Decoded
# latents have little above it, and what they have is the codec's blocks, which never move.
BAND = 0.06
# choice: pixels per frame; what is slower stands still.
LEAST_SPEED = 0.1
# choice: the noise level at which fields are judged. It hides what samples get wrong at the highest
# frequencies, whose power in the data is almost zero.
FIELD_TIME = 0.1


def velocities(videos: np.ndarray, lag: int = 1) -> np.ndarray:
  """Returns the median velocity of each video, (down, across) in pixels per frame, `[b, 2]`.

  Phase correlation: the cross-spectrum of two frames has the phase of their displacement at every
  frequency. With magnitude 1 below a Gaussian band limit, its inverse transform is a Gaussian
  around the displacement, whose peak a parabola through three logarithms finds between pixels.

  Args:
    videos: `[b, t, y, x, 3]`.
    lag: frames from one of a pair to the other.

  Raises:
    ValueError: if a video has no such pair.
  """
  if videos.shape[1] <= lag:
    raise ValueError(f"videos of {videos.shape[1]} frames have none that are {lag=} apart.")
  return np.stack([_velocity(video, lag) for video in videos])


def _velocity(video: np.ndarray, lag: int) -> np.ndarray:
  frames = video.astype(np.float64).mean(-1)
  frames -= frames.mean((1, 2), keepdims=True)
  rows, cols = frames.shape[1:]
  # A frame is not periodic: its borders fade out.
  window = np.hanning(rows + 2)[1:-1, None] * np.hanning(cols + 2)[1:-1]
  spectra = np.fft.fft2(frames * window)
  cross = spectra[lag:] * spectra[:-lag].conj()
  squared = np.fft.fftfreq(rows)[:, None] ** 2 + np.fft.fftfreq(cols) ** 2
  cross *= np.exp(-squared / (2 * BAND**2)) / np.maximum(np.abs(cross), 1e-12)
  surfaces = np.fft.ifft2(cross).real
  return np.median([_peak(surface) for surface in surfaces], 0) / lag


def _peak(surface: np.ndarray) -> np.ndarray:
  """Returns the place of the greatest value between pixels, (down, across), 0 at the origin."""
  place = np.unravel_index(surface.argmax(), surface.shape)
  found = []
  for axis, at in enumerate(place):
    line = np.take(surface, place[1 - axis], 1 - axis)
    size = len(line)
    before, peak, after = np.log(np.maximum(line[[at - 1, at, (at + 1) % size]], 1e-12))
    bend = before - 2 * peak + after
    between = (before - after) / (2 * bend) if bend < 0 else 0.0
    found.append((at + between + size / 2) % size - size / 2)
  return np.array(found)


def follows(velocity: np.ndarray, name: str, directions: int) -> bool:
  """Tells whether a velocity is nearer to a class's direction than to any other.

  Args:
    velocity: (down, across), pixels per frame.
    name: one of `DIRECTIONS`.
    directions: 4 or 8, the number that there are classes of.
  """
  speed = math.hypot(*velocity)
  return speed > LEAST_SPEED and velocity @ DIRECTIONS[name] > speed * math.cos(
    math.pi / directions
  )


def judge_directions(
  videos: np.ndarray, labels: np.ndarray, class_names: Sequence[str], lag: int = 1
) -> list[dict]:
  """Returns a row per class: its samples, their median velocity, and the share that follows.

  Args:
    videos: `[b, t, y, x, 3]`.
    labels: int `[b]`.
    class_names: index = label; the share is None for those that name no direction.
    lag: see `velocities`.
  """
  found = velocities(videos, lag)
  directions = 8 if any("_" in name and name in DIRECTIONS for name in class_names) else 4
  rows = []
  for label in np.unique(labels):
    name = class_names[label]
    own = found[labels == label]
    share = None
    if name in DIRECTIONS:
      share = float(np.mean([follows(velocity, name, directions) for velocity in own]))
    median = np.round(np.median(own, 0), 3).tolist()
    rows.append({"class": name, "samples": len(own), "velocity": median, "follows": share})
  return rows


def judge_fields(config: FieldsConfig, latents: np.ndarray, labels: np.ndarray) -> list[dict]:
  """Returns a row per class: its samples, and the share whose likeliest velocity is the label.

  Args:
    config: of the fields, labelled by velocity.
    latents: `[b, t, y, x, c]`.
    labels: int `[b]`.

  Raises:
    ConfigError: labels are no velocities, or the fields' likelihood is not known.
  """
  posterior = Fields(config, "val").reference
  if config.labels != "velocity" or posterior is None:
    raise ConfigError(
      f"data.labels={config.labels!r} with data.copies={config.copies} has no velocity to "
      "judge by; only runs with labels='velocity' and copies=0 have."
    )
  noisy = (1 - FIELD_TIME) * latents
  likelihood = posterior.log_likelihood(noisy, np.full(len(latents), FIELD_TIME, np.float32))
  right = np.asarray(likelihood).argmax(-1) == labels
  return [
    {
      "class": config.class_names[label],
      "samples": int(np.sum(labels == label)),
      "follows": float(right[labels == label].mean()),
    }
    for label in np.unique(labels)
  ]
