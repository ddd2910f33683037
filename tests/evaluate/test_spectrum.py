"""Power lies in the band that a pattern has, and errors are in dB."""

import numpy as np

from freqformer.evaluate import spectrum

T, SIDE = 16, 32


def waves(k_time: int, k_space: int, size: float = 40) -> np.ndarray:
  """Returns a grey clip of one DCT coefficient and faint noise, uint8 `[1, T, SIDE, SIDE, 3]`."""
  t = np.cos(np.pi * k_time * (np.arange(T) + 0.5) / T)
  x = np.cos(np.pi * k_space * (np.arange(SIDE) + 0.5) / SIDE)
  noise = np.random.default_rng(0).normal(size=(T, SIDE, SIDE))
  clip = 128 + size * t[:, None, None] * x + noise
  return np.repeat(np.rint(clip)[None, ..., None], 3, -1).astype(np.uint8)


def test_power_lies_in_the_pattern_s_band():
  # 3 / 16 of Nyquist in time lies in (1/8, 1/4], 6 / 32 in space, too.
  power = spectrum.band_power(waves(3, 6))[0]
  assert np.unravel_index(np.argmax(power), power.shape) == (2, 2)
  assert np.sort(power.ravel())[-2] < 1e-2 * power.max()
  # Parseval: all power is the variance.
  still = spectrum.band_power(waves(0, 30))[0]
  assert np.unravel_index(np.argmax(still), still.shape) == (0, 4)


def test_error_is_in_db_per_band():
  real = spectrum.band_power(waves(3, 6, 40))
  half = spectrum.band_power(waves(3, 6, 20))
  errors = spectrum.error_by_band(half, real)
  np.testing.assert_allclose(errors[2, 2], -6.02, atol=0.2)
  assert np.abs(np.delete(errors.ravel(), 12)).max() < 1.5
  assert spectrum.error(real, real) == 0
  assert 1 < spectrum.error(half, real) < 2
