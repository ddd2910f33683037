"""Power spectra of latents on a token grid, and what they say about a pyramid's levels; NumPy.

Level l of a pyramid has cells of 2^l tokens per axis; level 0 are the tokens. A spectrum S is
float64 `[t, y, x]` over the frequencies of `np.fft.fftfreq`, for latents that are periodic on the
grid, stationary and of variance `S.mean()`.
"""

import math
from collections.abc import Sequence

import numpy as np

# choice: the rows of a usual tile, so that every query sees the coarsest level whole for the price
# of one tile.
COARSEST_CELLS = 128
# choice: a level's weight before training is never below this.
LEAST_MASS = 1e-6


def power_law(grid: Sequence[int], slope: float, scale: float | None = None) -> np.ndarray:
  """Returns the spectrum `(|k|^2 + 1 / scale^2)^(-slope / 2)`, scaled to variance 1.

  Slope 0 is white.

  Args:
    grid: tokens per axis (t, y, x).
    slope: the power's fall per octave, in octaves; k is in radians per token.
    scale: length in tokens above which the spectrum is flat; by default half the height.

  Raises:
    ValueError: if `slope` is not finite or negative, or `scale` is not positive.
  """
  scale = grid[1] / 2 if scale is None else scale
  if not 0 <= slope < math.inf:
    raise ValueError(f"{slope=} must be a number of at least 0 (white).")
  if not scale > 0:
    raise ValueError(f"{scale=} is a length in tokens: give one above 0.")
  axes = [2 * np.pi * np.fft.fftfreq(n) for n in grid]
  squared = sum(k**2 for k in np.meshgrid(*axes, indexing="ij", sparse=True))
  spectrum = (1 + squared * scale**2) ** (-slope / 2)  # at most 1: no slope overflows
  return spectrum / spectrum.mean()


def wiener(spectrum: np.ndarray, t: float) -> np.ndarray:
  """Returns the best linear estimate of x_0 from `x_t = (1 - t) x_0 + t eps` as a filter.

  In frequencies it is `(1 - t) S / ((1 - t)^2 S + t^2)`, `[t, y, x]`. Its inverse transform is the
  weight of a token at each offset: the positional pattern of an ideal attention head at t.
  """
  return (1 - t) * spectrum / ((1 - t) ** 2 * spectrum + t**2)


def level_mass(
  spectrum: np.ndarray, levels: int, times: Sequence[float], radius: int = 1
) -> np.ndarray:
  """Returns the share of each level in the Wiener kernel's absolute mass, `[times, levels]`.

  A level's shell are the offsets that its window reaches and no finer one does: a window of
  2 radius + 1 cells of f tokens reaches a Chebyshev distance below `(radius + 1/2) f + 1/2` around
  its middle. The coarsest level has all offsets beyond. Rows sum to 1.
  """
  offsets = [np.abs(np.fft.fftfreq(n, 1 / n)) for n in spectrum.shape]
  distance = np.max(np.broadcast_arrays(*np.meshgrid(*offsets, indexing="ij", sparse=True)), axis=0)
  edges = [(radius + 0.5) * 2**l + 0.5 for l in range(levels - 1)]
  shell = np.searchsorted(edges, distance, side="right")
  found = []
  for t in times:
    kernel = np.abs(np.fft.ifftn(wiener(spectrum, t)).real)
    found.append(np.bincount(shell.ravel(), kernel.ravel(), levels) / kernel.sum())
  return np.array(found)


def level_prior(
  spectrum: np.ndarray, levels: int, times: Sequence[float], radius: int = 1
) -> np.ndarray:
  """Returns logits of mixing weights, `[times, levels]`: the log of `level_mass`, never -inf."""
  return np.log(np.maximum(level_mass(spectrum, levels, times, radius), LEAST_MASS))


def cells_of(grid: Sequence[int], factor: int) -> tuple[int, int, int]:
  """Returns a level's cells per axis; the last one of an axis may hold fewer tokens."""
  return tuple(-(-n // factor) for n in grid)


def most_levels(grid: Sequence[int]) -> int:
  """Returns the levels of a grid until one cell is left, the tokens' own among them."""
  return 1 + (max(grid) - 1).bit_length()


def suggested_levels(grid: Sequence[int], cells: int = COARSEST_CELLS) -> int:
  """Returns the fewest levels of which the coarsest has at most `cells` cells; at least 1.

  8x16x16 has 3, 16x32x32 has 4, 64x128x128 has 6.
  """
  levels = 1
  while math.prod(cells_of(grid, 2 ** (levels - 1))) > cells:
    levels += 1
  return levels
