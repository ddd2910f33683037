"""A pyramid of token grids: each level is the one before, compressed alike along every axis.

Every level has tiles of its own, so that windows are boxes of cells at any level. Compression is a
`SpectralBasis` that keeps the lowest half (or less) of its rows; lifting interpolates between the
cells' centres, so that no edge of a cell or tile is drawn into the result.

A row is interpolated from at most eight cells. Gathering them is one pass over the rows, which XLA
joins with what adds the result up; the gradient, which would be a scatter, is a product per axis.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.grid.basis import SpectralBasis, SpectralTables
from freqformer.grid.layout import LayoutTables, TileLayout
from freqformer.grid.operators import Array
from freqformer.grid.sizes import coarse_grid
from freqformer.kernels.core.cotangents import no_gradient

LIFTS = ("linear", "basis")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """The way from a level to the next coarser one and back. NumPy until passed to jit.

  Attributes:
    spectral: the transform of the finer level.
    fine, coarse: arrays of the levels' layouts.
    order, inverse: int32 `[coarse.n]`, the transform's number of each cell in raster order, and
      the raster number of each of the transform's cells.
    interpolate: per axis float32 `[fine extent, coarse extent]`, rows that sum to one, of at most
      two neighbouring cells; None lifts by the transform.
  """

  spectral: SpectralTables
  fine: LayoutTables
  coarse: LayoutTables
  order: Array
  inverse: Array
  interpolate: tuple[Array, Array, Array] | None

  @jax.named_scope("compress")
  def compress(self, x: jax.Array) -> jax.Array:
    """`[b, fine buffer, ...]` -> `[b, coarse buffer, ...]`; padding is not read and comes out 0."""
    cells = self.spectral.compress(x)
    return self.coarse.pack(jnp.take(cells, self.order, axis=1, mode="clip", unique_indices=True))

  @jax.named_scope("lift")
  def lift(self, y: jax.Array) -> jax.Array:
    """`[b, coarse buffer, ...]` -> `[b, fine buffer, ...]`; a constant stays that constant."""
    if self.interpolate is not None:
      return _interpolate(self, y)
    cells = jnp.take(self.coarse.unpack(y), self.inverse, axis=1, mode="clip", unique_indices=True)
    return self.spectral.lift(cells)


@jax.custom_vjp
def _interpolate(step: Step, y: jax.Array) -> jax.Array:
  """`[b, coarse buffer, ...]` -> `[b, fine buffer, ...]`, summed in at least float32."""
  dtype = jnp.promote_types(y.dtype, jnp.float32)
  total = 0
  # The barrier: XLA would find the corners anew for every channel.
  for rows, shares in jax.lax.optimization_barrier(list(_corners(step))):
    shares = jnp.expand_dims(shares.astype(dtype), range(1, y.ndim - 1))
    total += jnp.take(y, rows, axis=1, mode="clip").astype(dtype) * shares
  return total.astype(y.dtype)


def _corners(step: Step) -> Iterator[tuple[jax.Array, jax.Array]]:
  """Yields the rows of the cells around each fine row, and what it takes of them; padding: 0.

  They are numbers of rows, not of channels, and cost little to make; stored, they would be the
  largest tables of a million tokens.
  """
  grid = step.coarse.layout.grid
  places = jnp.unravel_index(step.fine.gather, step.fine.layout.grid)
  axes = [
    _neighbours(jnp.asarray(matrix), place)
    for matrix, place in zip(step.interpolate, places, strict=True)
  ]
  valid = jnp.asarray(step.fine.valid, jnp.float32)
  for (t, of_t), (y, of_y), (x, of_x) in itertools.product(*axes):
    cell = (t * grid[1] + y) * grid[2] + x
    yield jnp.asarray(step.coarse.scatter)[cell], valid * of_t * of_y * of_x


def _neighbours(matrix: jax.Array, place: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
  """Returns the one or two cells of an axis around each place on it, and their shares."""
  extent = matrix.shape[1]
  first = (matrix > 0).argmax(1)
  shares = [jnp.take_along_axis(matrix, first[:, None], 1)[:, 0]]
  cells = [first]
  if extent > 1:
    cells.append(jnp.minimum(first + 1, extent - 1))
    shares.append(1 - shares[0])  # rows sum to one
  return [(cell[place], share[place]) for cell, share in zip(cells, shares, strict=True)]


def _interpolate_by_axis(step: Step, y: jax.Array) -> jax.Array:
  """Computes the same as a product per axis, whose gradient is one, too."""
  dtype = jnp.promote_types(y.dtype, jnp.float32)
  cells = step.coarse.unpack(y)
  b, _, *rest = cells.shape
  x = cells.reshape(b, *step.coarse.layout.grid, *rest).astype(dtype)
  for axis, matrix in enumerate(step.interpolate, 1):
    x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(matrix, dtype).T, (axis, 0)), -1, axis)
  return step.fine.pack(x.reshape(b, -1, *rest).astype(y.dtype))


def _interpolate_forward(step, y):
  return _interpolate(step, y), step


@jax.named_scope("lift")
def _interpolate_backward(step, cotangent):
  b, _, *rest = cotangent.shape
  y = jax.ShapeDtypeStruct((b, step.coarse.layout.n_buffer, *rest), cotangent.dtype)
  (d_y,) = jax.linear_transpose(functools.partial(_interpolate_by_axis, step), y)(cotangent)
  return jax.tree.map(no_gradient, step), d_y


_interpolate.defvjp(_interpolate_forward, _interpolate_backward)


@functools.lru_cache(maxsize=32)
def level_layouts(
  layout: TileLayout, levels: int, kind: str, factor: int
) -> tuple[TileLayout, ...]:
  """Returns the layouts of all levels, the finest first; no matrix is made, however large.

  Raises:
    ValueError: for more levels than the grid has.
  """
  found = [layout]
  for _ in range(levels - 1):
    fine = found[-1]
    if fine.n == 1:
      raise ValueError(
        f"{levels=} are too many for {layout.grid}: level {len(found)} has one cell already; "
        f"choose at most {len(found)}."
      )
    found.append(TileLayout.fit(coarse_grid(compression(kind, factor), fine), layout.block))
  return tuple(found)


def compression(kind: str, factor: int) -> SpectralBasis:
  """Returns the transform between two levels, which keeps 1 of `factor` cells along each axis."""
  cuts = (1 / factor,) * 3
  return SpectralBasis(kind, cuts, cuts)


@functools.lru_cache(maxsize=8)
def steps(
  layout: TileLayout, levels: int, kind: str, lift: str, factor: int = 2
) -> tuple[Step, ...]:
  """Returns the `levels - 1` steps of a pyramid, the finest first.

  Args:
    kind: of the `SpectralBasis`.
    factor: tokens, or cells, of a cell of the next level along an axis.
    lift: "linear", or "basis": by the transform itself, which draws its tiles' edges.
  """
  layouts = level_layouts(layout, levels, kind, factor)
  found = []
  for fine, coarse in zip(layouts, layouts[1:], strict=False):
    spectral = compression(kind, factor).fit(fine)
    centres = spectral.centres
    order = np.lexsort(centres.T[::-1]).astype(np.int32)
    matrices = None
    if lift == "linear":
      axes = [np.unique(centres[:, axis]) for axis in range(3)]
      matrices = tuple(map(_between, axes, fine.grid))
    inverse = np.argsort(order).astype(np.int32)
    found.append(Step(spectral, fine.arrays(), coarse.arrays(), order, inverse, matrices))
  return tuple(found)


def _between(centres: np.ndarray, extent: int) -> np.ndarray:
  """Weights of linear interpolation between centres, float32 `[extent, cells]`; flat outside."""
  places = np.arange(extent)
  return np.stack([np.interp(places, centres, one) for one in np.eye(len(centres))], -1).astype(
    np.float32
  )


def cell_widths(layouts: tuple[TileLayout, ...]) -> tuple[tuple[float, float, float], ...]:
  """Returns the mean tokens of a cell per level and axis."""
  finest = layouts[0].grid
  return tuple(
    tuple(whole / cells for whole, cells in zip(finest, layout.grid, strict=True))
    for layout in layouts
  )
