"""Places that dense attention looks at, beside those of an ideal linear denoiser of fields.

Two measures of one head's matrix A on one clip. Its mass per shell: shells are those of
`freqformer.grid.spectrum.level_mass` around a token, Chebyshev distances that double, around the
period of the fields. And what it moves between two bands: the shares of `|P_b A P_c v|^2`, v the
head's values, P_low the means of cells and P_high the rest. Attention that treats bands separately
can do what has b = c.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.grid.layout import LayoutTables, TileLayout
from freqformer.grid.spectrum import cells_of, wiener
from freqformer.methods.base import attend
from freqformer.methods.dense import Dense

FACTOR = 4  # tokens per axis of a cell: the arm `low4`
# From low, from high; each into low, into high.
PATHS = ("low to low", "low to high", "high to low", "high to high")
_PADDING = -1
_DRAWS = 32


def shell_edges(grid: Sequence[int]) -> list[float]:
  """Returns distances in tokens, each the upper end of a shell; one more shell lies beyond.

  They are those of `level_mass` with radius 1, as many as a periodic grid has room for.
  """
  edges = []
  while (edge := 1.5 * 2 ** len(edges) + 0.5) <= max(grid) // 2:
    edges.append(edge)
  return edges


def shells(layout: TileLayout) -> np.ndarray:
  """Returns the shell of each (query, key), int8 `[n_buffer, n_buffer]`; -1 with a padding row."""
  arrays = layout.arrays()
  distance = 0
  for place, size in zip(arrays.positions.T, layout.grid, strict=True):
    apart = np.abs(place[:, None] - place)
    distance = np.maximum(distance, np.minimum(apart, size - apart))
  found = np.searchsorted(shell_edges(layout.grid), distance, side="right")
  return np.where(arrays.valid[:, None] & arrays.valid, found, _PADDING).astype(np.int8)


def mass(attention: jax.Array, shell: jax.Array, count: int) -> jax.Array:
  """Returns the share of each of `count` shells in a matrix `[n_buffer, n_buffer]`."""
  found = jnp.stack([jnp.where(shell == s, attention, 0).sum() for s in range(count)])
  return found / found.sum()


def cells(layout: TileLayout) -> np.ndarray:
  """Returns C, float32 `[cells, n_buffer]`, with C^T C x the means of x over cells of `FACTOR`^3.

  Cells at the end of an axis may have fewer tokens. Columns of padding rows are 0.
  """
  arrays = layout.arrays()
  places = arrays.positions.astype(int).T // FACTOR
  cell = np.ravel_multi_index(places, cells_of(layout.grid, FACTOR))
  found = (cell == np.arange(cell.max() + 1)[:, None]) & arrays.valid
  return (found / np.sqrt(found.sum(1, keepdims=True))).astype(np.float32)


def between_bands(
  apply: Callable[[jax.Array], jax.Array], values: jax.Array, cells: jax.Array
) -> jax.Array:
  """Returns the shares `[4]` of `PATHS` in the energy of a linear map's output.

  Args:
    apply: from `[n_buffer, d]` to the same shape; padding rows are 0 in what it is given and must
      be 0 in what it returns.
    values: what it is applied to, band by band.
    cells: of the function of that name.
  """

  def split(x):
    low = cells.T @ (cells @ x)
    return low, x - low

  parts = [part for source in split(values) for part in split(apply(source))]
  energy = jnp.stack([jnp.square(part).sum() for part in parts])
  return energy / energy.sum()


@dataclasses.dataclass(frozen=True)
class Observed(Dense):
  """Dense attention that reports `mass` and `between_bands` of each head, one after the other.

  They are in aux in the place of a router's shares, over which validation takes the mean.
  """

  def tables(self, layout):
    return {"dense": super().tables(layout), "shells": shells(layout), "cells": cells(layout)}

  def __call__(self, module, qkv, cond, tables, state):
    rotated = qkv.rotated()
    out, aux = attend(qkv, tables["dense"], cond, rotated)
    count = len(shell_edges(qkv.layout.layout.grid)) + 1
    valid = jnp.asarray(qkv.layout.valid)
    tokens = valid[:, None]

    def head(qkv_of_head):
      q, k, v = (x.astype(jnp.float32) for x in qkv_of_head)
      scores = jnp.where(valid, q @ k.T * q.shape[-1] ** -0.5, -jnp.inf)
      attention = jnp.where(tokens, jax.nn.softmax(scores), 0)
      bands = between_bands(lambda x: attention @ x, jnp.where(tokens, v, 0), tables["cells"])
      return jnp.concatenate([mass(attention, tables["shells"], count), bands])

    # One matrix in memory at a time.
    b, n, h, d = qkv.v.shape
    by_head = [x.swapaxes(1, 2).reshape(b * h, n, d) for x in (*rotated, qkv.v)]
    shares = jax.lax.map(head, by_head).reshape(b, h, -1)
    return out, state, aux | {"probs": shares, "choice": jnp.zeros((b, h), int)}


def wiener_between_bands(
  spectra: Sequence[np.ndarray], times: Sequence[float], arrays: LayoutTables
) -> np.ndarray:
  """Returns `between_bands` of the Wiener filter applied to noisy fields, the mean over spectra.

  Args:
    spectra: power of the fields `[t, y, x]`, each.
    times: t of the noise.
    arrays: of the grid's layout.

  Returns:
    float64 `[times, 4]`, over a fixed set of random fields.
  """
  low = cells(arrays.layout)
  axes = (0, 1, 2)
  white = np.random.default_rng(0).standard_normal((*arrays.layout.grid, _DRAWS))
  white = np.fft.fftn(white, axes=axes)

  def filtered(x, gain):
    field = np.asarray(arrays.unpack(x[None])[0]).reshape(white.shape)
    field = np.fft.ifftn(np.fft.fftn(field, axes=axes) * gain[..., None], axes=axes).real
    return _packed(field, arrays)

  found = []
  for t in times:
    shares = []
    for spectrum in spectra:
      noisy = np.sqrt((1 - t) ** 2 * spectrum + t**2)[..., None]
      x = _packed(np.fft.ifftn(white * noisy, axes=axes).real, arrays)
      gain = wiener(spectrum, t)
      shares.append(between_bands(lambda x, gain=gain: filtered(x, gain), x, low))
    found.append(np.mean(shares, 0))
  return np.array(found, np.float64)


def _packed(field: np.ndarray, arrays: LayoutTables) -> jax.Array:
  """Returns fields `[t, y, x, d]` in the buffer's order, float32 `[n_buffer, d]`."""
  rows = field.reshape(1, -1, field.shape[-1]).astype(np.float32)
  return arrays.pack(jnp.asarray(rows))[0]
