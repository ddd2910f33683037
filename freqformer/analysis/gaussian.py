"""Best linear denoising of stationary Gaussian latents from a part of the tokens.

The latents are periodic on their grid and have a power spectrum S (`grid.spectrum`). Of
`x_t = (1 - t) x_0 + t eps` a query sees its own token, which the residual stream carries, and means
over boxes (`contexts`). Let C and N be the covariances of these means of x_0 and of eps. Then the
least squared error of x_0 is

  1 - (1 - t)^2 c K^-1 c,   K = (1 - t)^2 C + t^2 N,   c = the own token's row of C,

and with all tokens it is the mean of `S t^2 / ((1 - t)^2 S + t^2)`. Because the own token is seen,
the error of `v = eps - x_0` is that of x_0 over t^2, and the excess in percent is the same for
both. It bounds what *linear* attention of one layer can do with these keys at the best weights: it
knows nothing of content, of how weights are found, nor of what further layers relay.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from freqformer.analysis.contexts import Boxes, Context, Table, queries
from freqformer.grid.transforms import dct_power

# Each mean's noise is taken to be larger by this part of itself, so that means that depend on each
# other linearly (a cell within a window) leave K regular. It can raise no error by more than a part
# of this order, far below what is printed.
_RIDGE = 1e-11
# Entries of the covariances that are held at a time: 1 GiB.
_MOST_ENTRIES = 1 << 27


@dataclasses.dataclass(frozen=True)
class Excess:
  """Excess error over full context.

  Attributes:
    keys: that a query sees, the mean over queries; its own token counts if it is seen.
    percent: per t: 100 (error / error with all tokens - 1), errors averaged over queries.
    queries: that were averaged.
  """

  keys: float
  percent: list[float]
  queries: int


def full_error(spectrum: np.ndarray, t: float) -> float:
  """Returns the least mean squared error of x_0 from all tokens of x_t."""
  return float(np.mean(spectrum * t**2 / ((1 - t) ** 2 * spectrum + t**2)))


def excess(
  spectrum: np.ndarray,
  context: Context | Table,
  times: Sequence[float],
  places: np.ndarray | None = None,
) -> Excess:
  """Computes how much worse the best linear denoiser is with a context than with all tokens.

  Seconds for a million tokens and some hundred keys: covariances of boxes are inverse transforms of
  S times the boxes' own transforms, one for each pair of shapes.

  Args:
    spectrum: `[t, y, x]`, see `grid.spectrum`.
    context: what a query sees.
    times: in (0, 1).
    places: int `[n, 3]`, the queries' tokens; by default those of `contexts.queries`.

  Raises:
    ValueError: for a t out of range, a spectrum that is none, or more keys than memory allows.
  """
  for t in times:
    if not 0 < t < 1:
      raise ValueError(f"t={t!r} must lie between 0 (data) and 1 (noise), both excluded.")
  _check_spectrum(spectrum)
  grid = spectrum.shape
  places = queries(context, grid) if places is None else np.asarray(places)
  seen = [context.boxes(grid, query) for query in places]
  with_own = [
    Boxes.join([Boxes(query[None], np.ones((1, 3), int)), boxes])
    for query, boxes in zip(places, seen, strict=True)
  ]
  most = max(map(len, with_own))
  if most**2 > _MOST_ENTRIES:
    raise ValueError(
      f"a query sees {most:,} keys, whose covariances need {most**2 * 8 / 2**30:.1f} GiB: give a "
      f"context of at most {math.isqrt(_MOST_ENTRIES):,} keys."
    )
  errors = np.zeros(len(times))
  for part in itertools.batched(with_own, _MOST_ENTRIES // most**2):
    for boxes, signal in zip(part, _signal_covariances(spectrum, part), strict=True):
      errors += _errors(grid, boxes, signal, times) / len(places)
  percent = [100 * (e / full_error(spectrum, t) - 1) for e, t in zip(errors, times, strict=True)]
  keys = float(np.mean([len(boxes) for boxes in seen]))
  return Excess(keys, [float(p) for p in percent], len(places))


def _errors(
  grid: Sequence[int], boxes: Boxes, signal: np.ndarray, times: Sequence[float]
) -> np.ndarray:
  """Returns the least squared error of x_0 at the first box, a token, from all boxes; per t."""
  noise = _noise_covariance(grid, boxes)
  noise[np.diag_indices(len(boxes))] *= 1 + _RIDGE
  found = []
  for t in times:
    cross = (1 - t) * signal[0]
    weights = np.linalg.solve((1 - t) ** 2 * signal + t**2 * noise, cross)
    found.append(signal[0, 0] - cross @ weights)
  return np.array(found)


def measured_spectrum(latents: Iterable[np.ndarray], per_channel: bool = False) -> np.ndarray:
  """Returns the mean spectrum of clips, `[t, y, x]`, scaled to variance 1.

  Clips are not periodic, and the jump between their opposite ends would look like power at all
  frequencies. An orthonormal DCT-II has no such jump: it continues a clip by its mirror image. Its
  index k has the frequency `pi k / n`, so that the periodic frequency `2 pi j / n` is read at
  k = 2j, and that of the last one, n, at n - 1.

  Args:
    latents: `[t, y, x, c]` each, all of one shape, as `LatentCache` gives them.
    per_channel: returns `[c, t, y, x]` instead, each channel with variance 1.

  Raises:
    ValueError: if there are no latents, or a channel is zero.
  """
  power = dct_power(latents)
  for axis, n in enumerate(power.shape[:3]):
    frequencies = np.abs(np.fft.fftfreq(n, 1 / n)).astype(int)
    power = np.take(power, np.minimum(2 * frequencies, n - 1), axis)
  power = np.moveaxis(power, -1, 0)
  spectrum = power if per_channel else power.mean(0)
  variance = spectrum.mean((-3, -2, -1), keepdims=True)
  if not (variance > 0).all():
    raise ValueError("a channel of the latents is zero everywhere and has no spectrum.")
  return spectrum / variance


# ---- covariances of boxes ------------------------------------------------------------------------
# Boxes are scaled to sum / sqrt(tokens): their noise then has variance t^2 whatever their size, and
# K is conditioned as well as it can be.


def _signal_covariances(spectrum: np.ndarray, contexts: Sequence[Boxes]) -> list[np.ndarray]:
  """Returns the covariances of x_0's boxes per context, `[n, n]` each.

  Box a at s and box b at s + d have the covariance `F^-1[S A conj(B)](d)`, A and B the transforms
  of boxes at the origin.
  """
  grid = spectrum.shape
  shapes = np.unique(np.concatenate([boxes.size for boxes in contexts]), axis=0)
  transforms = [_box_transform(grid, shape) for shape in shapes]
  half = spectrum[..., : grid[2] // 2 + 1]
  members = [
    [np.flatnonzero((boxes.size == shape).all(1)) for shape in shapes] for boxes in contexts
  ]
  found = [np.zeros((len(boxes), len(boxes))) for boxes in contexts]
  for a, b in itertools.combinations_with_replacement(range(len(shapes)), 2):
    if not any(len(m[a]) and len(m[b]) for m in members):
      continue
    covariance = np.fft.irfftn(half * transforms[a] * transforms[b].conj(), grid, (0, 1, 2))
    for boxes, own, out in zip(contexts, members, found, strict=True):
      offsets = (boxes.start[own[b]] - boxes.start[own[a], None]) % grid
      block = covariance[tuple(np.moveaxis(offsets, -1, 0))]
      out[np.ix_(own[a], own[b])] = block
      out[np.ix_(own[b], own[a])] = block.T
  return found


def _box_transform(grid: Sequence[int], shape: np.ndarray) -> np.ndarray:
  """Returns the transform of a box at the origin, `[t, y, x // 2 + 1]`."""
  axes = []
  for axis, (n, size) in enumerate(zip(grid, shape, strict=True)):
    inside = (np.arange(n) < size) / math.sqrt(size)
    axes.append(np.fft.rfft(inside) if axis == 2 else np.fft.fft(inside))
  return axes[0][:, None, None] * axes[1][:, None] * axes[2]


def _noise_covariance(grid: Sequence[int], boxes: Boxes) -> np.ndarray:
  """Returns the covariance of white noise over boxes, `[n, n]`: the tokens that two share."""
  shared = 1.0
  for axis, n in enumerate(grid):
    start = boxes.start[:, axis]
    size = boxes.size[:, axis]
    offset = (start - start[:, None]) % n
    # The second box begins within the first, or goes round the grid into it.
    ahead = np.minimum(size[:, None], offset + size) - offset
    around = np.minimum(size[:, None], offset + size - n)
    shared = shared * (np.maximum(ahead, 0) + np.maximum(around, 0))
  tokens = boxes.size.prod(1)
  return shared / np.sqrt(tokens * tokens[:, None])


def _check_spectrum(spectrum: np.ndarray) -> None:
  mirrored = spectrum[np.ix_(*(-np.arange(n) % n for n in spectrum.shape))]
  if spectrum.ndim != 3 or spectrum.min() < 0 or not np.allclose(spectrum, mirrored):
    raise ValueError(
      f"a spectrum is [t, y, x], nowhere negative and the same at k and -k; got shape "
      f"{spectrum.shape}, minimum {spectrum.min():.3g}."
    )
