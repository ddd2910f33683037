"""Power of videos by band of space and of time frequency, against that of real clips.

By an orthonormal DCT of the luma over frames, rows and columns: coefficient k of n has the
frequency k / n of Nyquist, and a clip's end is not taken to be followed by its beginning, as a
Fourier transform takes it.
"""

import numpy as np

from freqformer.evaluate.motion_net import LUMA
from freqformer.grid.transforms import dct

# Upper edges of bands, as shares of Nyquist. The corners of the square of space frequencies, up to
# the root of 2, belong to the last band.
SPACE_BANDS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
TIME_BANDS = (0, 1 / 8, 1 / 4, 1 / 2, 1)
# choice: grey levels squared, the power of white noise of one level. It is added on both sides, so
# that bands in which nothing can be seen are alike.
_INVISIBLE = 1.0


def band_power(videos: np.ndarray) -> np.ndarray:
  """Returns each clip's mean power per coefficient, grey levels squared, `[b, time, space]`.

  The clip's mean is left out. A band that has no coefficient, as few frames can cause, is NaN.

  Args:
    videos: uint8 `[b, t, y, x, 3]`.
  """
  _, t, rows, cols, _ = videos.shape
  radius = np.hypot(np.arange(rows)[:, None] / rows, np.arange(cols) / cols)
  space = np.searchsorted(SPACE_BANDS, np.minimum(radius, SPACE_BANDS[-1]))
  time = np.searchsorted(TIME_BANDS, np.arange(t) / t)
  band = time[:, None, None] * len(SPACE_BANDS) + space
  bands = len(TIME_BANDS) * len(SPACE_BANDS)
  there = np.ones(band.shape)
  there[0, 0, 0] = 0
  count = np.bincount(band.ravel(), there.ravel(), bands)
  over_time, down, across = (dct(n).astype(np.float32) for n in (t, rows, cols))
  found = []
  for video in videos:
    grey = down @ (video @ LUMA) @ across.T
    power = np.square(np.tensordot(over_time, grey, 1)) * there
    found.append(np.bincount(band.ravel(), power.ravel(), bands))
  with np.errstate(invalid="ignore"):
    return (np.array(found) / count).reshape(-1, len(TIME_BANDS), len(SPACE_BANDS))


def error_by_band(power: np.ndarray, real: np.ndarray) -> np.ndarray:
  """Returns the mean power of clips over that of real ones, dB, `[time, space]`.

  Args:
    power: of `band_power`, `[b, time, space]`.
    real: the same of real clips.
  """
  return 10 * np.log10((power.mean(0) + _INVISIBLE) / (real.mean(0) + _INVISIBLE))


def error(power: np.ndarray, real: np.ndarray) -> float:
  """Returns the root mean square of `error_by_band` over bands, dB."""
  return float(np.sqrt(np.nanmean(np.square(error_by_band(power, real)))))
