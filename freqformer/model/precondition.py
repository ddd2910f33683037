"""Preconditions the network, frequency by frequency, with the power of the training latents.

EDM's preconditioning (arXiv 2206.00364, section 5) for the rectified flow, and for each frequency
of the DCT instead of for whole latents. At a frequency where x_0 has the power S,
`x_t = (1 - t) x_0 + t eps` has `D = (1 - t)^2 S + t^2`, the best linear prediction of the velocity
is `a x_t` with `a = (t - (1 - t) S) / D`, and what it leaves has the power S / D. So the model is

  v = a x_t + sqrt(S / D) F(S / D x_t / r),   r the root mean square of S / D x_t,

where F is the transformer. It starts at the best linear prediction, sees a linear estimate of x_0
instead of noise, and what it adds has the spectrum of the latents: borders of patches, whose power
is at high frequencies, are damped as much as these are rare in the data.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.grid.transforms import dct, dct_power

# choice: power below this share of the mean is counted as this much. Frequencies that the data
# never have must not be divided by.
LEAST_POWER = 1e-5
# choice: bins of half a cycle per cell, in time and in space.
TIME_BINS = 8
SPACE_BINS = 16

# Rows are (channel, time bin), columns the length of the frequency in space. Empty: white.
Table = tuple[tuple[float, ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preconditioner:
  """The power of each frequency of a grid, and the DCT that leads there.

  Attributes:
    power: S, float32 `[t, y, x, c]`.
    maps: the orthonormal DCT of each axis, `[n, n]`.
  """

  power: jax.Array
  maps: tuple[jax.Array, jax.Array, jax.Array]

  @classmethod
  def of(cls, table: Table, latent_shape: Sequence[int]) -> "Preconditioner":
    """Returns the preconditioner of a grid, which need not be that of training.

    Args:
      table: of `measured_power`, or empty for white latents of variance 1.
      latent_shape: (t, y, x, c).
    """
    *sizes, channels = latent_shape
    power = np.ones(latent_shape)
    if table:
      rows = np.log(np.reshape(table, (channels, TIME_BINS + 1, SPACE_BINS + 1)))
      at_t, at_s = _bins(sizes)
      power = np.exp(_between(_between(rows, at_s, 2), at_t, 1)).transpose(1, 2, 3, 0)
    maps = tuple(jnp.asarray(dct(n), jnp.float32) for n in sizes)
    return cls(jnp.asarray(power, jnp.float32), maps)

  def inputs(self, x: jax.Array, time: jax.Array) -> jax.Array:
    """Returns what the transformer sees of noisy latents `[b, t, y, x, c]`, of mean square 1."""
    _, _, below = self._parts(time)
    share = self.power / below
    size = jnp.mean(self.power * share, (1, 2, 3, 4), keepdims=True)
    return self._back(self._forth(x) * share) / jnp.sqrt(size)

  def velocity(self, x: jax.Array, output: jax.Array, time: jax.Array) -> jax.Array:
    """Returns the velocity from noisy latents and the transformer's output, both `[b, ...]`."""
    t, rest, below = self._parts(time)
    linear = (t - rest * self.power) / below * self._forth(x)
    return self._back(linear + jnp.sqrt(self.power / below) * self._forth(output))

  def _parts(self, time) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns t, 1 - t and D for `time` `[b]`."""
    t = time.reshape(-1, 1, 1, 1, 1)
    return t, 1 - t, (1 - t) ** 2 * self.power + t**2

  def _forth(self, x):
    for axis, matrix in enumerate(self.maps, 1):
      x = jnp.moveaxis(jnp.tensordot(x, matrix, (axis, 1)), -1, axis)
    return x

  def _back(self, x):
    for axis, matrix in enumerate(self.maps, 1):
      x = jnp.moveaxis(jnp.tensordot(x, matrix, (axis, 0)), -1, axis)
    return x


def measured_power(latents: Iterable[np.ndarray]) -> Table:
  """Measures the power of the DCT's frequencies, over latents `[t, y, x, c]` of one shape.

  Bins are linear in cycles per cell. In space they are rings, in time each frequency counts; bin 0
  of either holds the constants alone. Bins without any frequency are filled from their neighbours.

  Raises:
    ValueError: there are no latents.
  """
  power = dct_power(latents)
  at_t, at_s = (np.rint(at).astype(int) for at in _bins(power.shape[:3]))
  place = at_t[:, None, None] * (SPACE_BINS + 1) + at_s
  bins = (TIME_BINS + 1) * (SPACE_BINS + 1)
  cells = np.bincount(place.ravel(), minlength=bins)
  rows = []
  for channel in np.moveaxis(power, -1, 0):
    sums = np.bincount(place.ravel(), channel.ravel(), bins)
    mean = np.where(cells, sums / np.maximum(cells, 1), np.nan).reshape(TIME_BINS + 1, -1)
    filled = _filled(_filled(np.log(np.maximum(mean, LEAST_POWER * power.mean())), 1), 0)
    rows += [tuple(float(f"{x:.4g}") for x in row) for row in np.exp(filled)]
  return tuple(rows)


def _bins(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the places of a grid's frequencies among the bins: `[t]` in time, `[y, x]` in space.

  Constants have place 0, the lowest other frequencies at least 1.
  """
  t, y, x = (np.arange(n) / n for n in sizes)
  space = np.minimum(np.hypot(y[:, None], x), 1)
  return tuple(
    np.where(at > 0, np.clip(at * bins, 1, bins), 0)
    for at, bins in ((t, TIME_BINS), (space, SPACE_BINS))
  )


def _between(rows: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
  """Interpolates along an axis at the places `at`, whose axes take its place."""
  low = np.minimum(np.floor(at).astype(int), rows.shape[axis] - 2)
  share = (at - low).reshape(at.shape + (1,) * (rows.ndim - axis - 1))
  return np.take(rows, low, axis) * (1 - share) + np.take(rows, low + 1, axis) * share


def _filled(rows: np.ndarray, axis: int) -> np.ndarray:
  """Returns rows whose NaN are interpolated along an axis; lines of NaN alone stay."""

  def line(values):
    known = np.flatnonzero(np.isfinite(values))
    return np.interp(np.arange(len(values)), known, values[known]) if len(known) else values

  return np.apply_along_axis(line, axis, rows)
