"""Spectral matrices on a tile-ordered buffer: per tile where possible, else per axis."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.grid.layout import LayoutTables, TileLayout

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value
class Matrices:
  """Matrices of one axis or one class of tiles: e tokens, k coarse cells, m >= k rows of the box.

  Attributes:
    compress: U^T / s, `[k, e]`.
    lift: U s, `[e, k]`.
    analyse: orthonormal rows of the box, `[m, e]`; the first k are the low band.
  """

  compress: Array
  lift: Array
  analyse: Array

  @property
  def synthesise(self) -> Array:
    """The transpose of `analyse`, `[e, m]`: synthesise @ analyse = P_box."""
    return self.analyse.T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value
class TileOperators:
  """Transforms that stay inside a tile: one matmul per class of equally shaped tiles.

  Attributes:
    classes: one entry per tile shape: one where no tile is ragged, at most eight.
    order, inverse: int32 `[n_coarse]`, place in class order of each coarse token in tile order,
      and the inverse; None for a single class.
  """

  classes: tuple[Matrices, ...]
  order: Array | None
  inverse: Array | None
  layout: TileLayout = dataclasses.field(metadata={"static": True})

  def reduce(self, x: jax.Array, name: str) -> list[jax.Array]:
    """`[b, n_buffer, ...]` -> per class `[b, *its tiles (t, y, x), rows of matrix "name", ...]`."""
    return [_matmul("kr,btyxr...->btyxk...", getattr(m, name), part) for m, part in self._split(x)]

  def expand(self, coefficients: list[jax.Array], name: str) -> jax.Array:
    """Returns `[b, n_buffer, ...]` of `[b, *tiles, columns, ...]` per class; padding is zero."""
    parts = []
    for m, part in zip(self.classes, coefficients, strict=True):
      part = _matmul("rk,btyxk...->btyxr...", getattr(m, name), part)
      padding = self.layout.block - part.shape[4]
      parts.append(jnp.pad(part, [(0, padding if axis == 4 else 0) for axis in range(part.ndim)]))
    for axis in (3, 2, 1):  # classes are in raster order of (t, y, x) halves: join x first
      count = len(halves(self.layout.lengths[axis - 1]))
      parts = [jnp.concatenate(parts[i : i + count], axis) for i in range(0, len(parts), count)]
    return parts[0].reshape(parts[0].shape[0], self.layout.n_buffer, *parts[0].shape[5:])

  def flatten(self, coefficients: list[jax.Array]) -> jax.Array:
    """Per class `[b, *its tiles, k, ...]` -> `[b, n_coarse, ...]`, tile by tile without gaps."""
    parts = [c.reshape(c.shape[0], math.prod(c.shape[1:5]), *c.shape[5:]) for c in coefficients]
    if self.order is None:
      return parts[0]
    return jnp.take(
      jnp.concatenate(parts, axis=1), self.order, axis=1, mode="clip", unique_indices=True
    )

  def unflatten(self, y: jax.Array) -> list[jax.Array]:
    """The inverse of `flatten`."""
    if self.inverse is not None:
      y = jnp.take(y, self.inverse, axis=1, mode="clip", unique_indices=True)
    parts = []
    start = 0
    for m, tiles in zip(self.classes, _class_slices(self.layout), strict=True):
      shape = (*(s.stop - s.start for s in tiles), m.lift.shape[1])
      stop = start + math.prod(shape)
      parts.append(y[:, start:stop].reshape(y.shape[0], *shape, *y.shape[2:]))
      start = stop
    return parts

  def band_energy(self, x: jax.Array) -> jax.Array:
    """`[b, n_buffer, h, d]` -> `[b, h, 3]`, squared norms of low, mid and high."""
    energy = 0.0
    for (m, part), box in zip(self._split(x), self.reduce(x, "analyse"), strict=True):
      k = m.compress.shape[0]
      box = squares(box)  # [b, *tiles, m, h]
      total = squares(part).sum(axis=4)
      low = box[..., :k, :].sum(axis=4)
      mid = box[..., k:, :].sum(axis=4)
      high = _rest(total - low - mid, [m])
      energy += jnp.stack([low, mid, high], axis=-1).sum(axis=(1, 2, 3))
    return energy

  def _split(self, x):
    """Yields (matrices, `[b, *tiles, e, ...]`) of each class; padding rows are sliced off."""
    x = x.reshape(x.shape[0], *self.layout.tile_grid, self.layout.block, *x.shape[2:])
    for m, tiles in zip(self.classes, _class_slices(self.layout), strict=True):
      yield m, x[:, *tiles, : m.compress.shape[1]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value
class GridOperators:
  """Transforms of whole axes t, y, x: raster order, one matmul per axis, tile order again."""

  axes: tuple[Matrices, ...]
  arrays: LayoutTables

  def reduce(self, x: jax.Array, name: str) -> jax.Array:
    """`[b, n_buffer, ...]` -> `[b, t, y, x, ...]` with the rows of matrix `name` per axis."""
    x = self.arrays.unpack(x)
    return self._per_axis(x.reshape(x.shape[0], *self.arrays.layout.grid, *x.shape[2:]), name)

  def expand(self, coefficients: jax.Array, name: str) -> jax.Array:
    """Returns `[b, n_buffer, ...]` of `[b, t, y, x, ...]` in columns of "name"; padding is zero."""
    x = self._per_axis(coefficients, name)
    return self.arrays.pack(x.reshape(x.shape[0], self.arrays.n, *x.shape[4:]))

  def flatten(self, coefficients: jax.Array) -> jax.Array:
    """`[b, kt, ky, kx, ...]` -> `[b, n_coarse, ...]`."""
    b, *axes = coefficients.shape
    return coefficients.reshape(b, math.prod(axes[:3]), *axes[3:])

  def unflatten(self, y: jax.Array) -> jax.Array:
    """The inverse of `flatten`."""
    return y.reshape(y.shape[0], *(m.lift.shape[1] for m in self.axes), *y.shape[2:])

  def band_energy(self, x: jax.Array) -> jax.Array:
    """`[b, n_buffer, h, d]` -> `[b, h, 3]`, squared norms of low, mid and high."""
    total = squares(self.arrays.unpack(x)).sum(axis=1)
    box = squares(self.reduce(x, "analyse"))  # [b, mt, my, mx, h]
    t, y, x = (m.compress.shape[0] for m in self.axes)
    # Mid is the box without its low corner; a difference of nearly equal sums would lose digits.
    slabs = (box[:, :t, :y, :x], box[:, t:], box[:, :t, y:], box[:, :t, :y, x:])
    low, *mid = (s.sum(axis=(1, 2, 3)) for s in slabs)
    mid = sum(mid)
    return jnp.stack([low, mid, _rest(total - low - mid, self.axes)], axis=-1)

  def _per_axis(self, x, name):
    for i, m in enumerate(self.axes):
      axis = "tyx"[i]
      x = _matmul(f"k{axis},btyx...->{'btyx'.replace(axis, 'k')}...", getattr(m, name), x)
    return x


def _rest(difference, matrices):
  """Returns the energy of the high band from what low and mid leave.

  Where these hold all coefficients it is 0: the difference is rounding, and a router would be given
  its logarithm. Elsewhere rounding may bring it below zero.
  """
  complete = all(m.analyse.shape[0] == m.analyse.shape[1] for m in matrices)
  return jnp.zeros_like(difference) if complete else jnp.maximum(difference, 0)


def check_floating(name, x):
  """Raises TypeError unless x is real floating point; `name` is the caller's."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f"{name} got dtype {x.dtype}, but takes real floating point: cast the input first"
    )


def _matmul(subscripts, matrix, x):
  """Einsum in at least float32: TF32 would leave 1e-3 of a constant in the high band."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  if x.dtype != dtype:
    # Makes XLA widen inside the product instead of once, into a copy in memory twice as large.
    x = jax.lax.optimization_barrier(x)
  return jnp.einsum(
    subscripts, matrix.astype(dtype), x.astype(dtype), precision=jax.lax.Precision.HIGHEST
  )


def squares(x):
  """Squared norm over the last axis, in at least float32."""
  return jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).sum(axis=-1)


def halves(lengths):
  """Slices of equally long tiles along an axis: the full ones and, if ragged, the last one."""
  full = lengths.count(lengths[0])
  return [slice(0, full), slice(full, len(lengths))][: 1 + (full < len(lengths))]


def _class_slices(layout):
  """Slices (t, y, x) of the tile grid, one triple per class of equally shaped tiles."""
  return list(itertools.product(*map(halves, layout.lengths)))
