"""The spectral matrices by tile, as the kernels around attention take them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from freqformer.grid.basis import SpectralTables
from freqformer.grid.operators import Matrices, TileOperators, halves
from freqformer.kernels.around.lift import Expansion
from freqformer.kernels.around.prepare import Cells


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TileCells:
  """A basis whose transform stays inside a tile. NumPy until passed to jit.

  Attributes:
    compress, lift: float32 `[classes, cells, block]`, `[classes, block, cells]`, zero beyond a
      class's own cells and tokens.
    classes, starts: int32 `[tiles]`, the class and the first coarse token of each tile.
    rows: int32 `[n_coarse]`, `tile * cells + j` of each coarse token; None if all tiles are alike.
    front: rows of the packed buffer before the tokens; static.
    filters: float32 `[classes, 2, block, block]`, P_mid and P_high of a tile, or None.
  """

  compress: np.ndarray
  lift: np.ndarray
  classes: np.ndarray
  starts: np.ndarray
  rows: np.ndarray | None
  front: int = dataclasses.field(metadata={"static": True})
  filters: np.ndarray | None = None

  def cells(self, angles: tuple[jax.Array, jax.Array]) -> Cells:
    """Argument of `kernels.around.prepare`; `angles` are rotary's at the cells' centres."""
    return Cells(self.compress, self.classes, self.rows, *angles, self.front, self.filters)

  @property
  def expansion(self) -> Expansion:
    """Argument of `kernels.around.lift`."""
    return Expansion(self.lift, self.classes, self.starts, self.front)


def tile_cells(spectral: SpectralTables, front: int, filtered: bool = False) -> TileCells | None:
  """Returns a fitted basis's matrices by tile, or None if its transform leaves the tile.

  `front` rows of the packed buffer come before the tokens; `filters` are made if `filtered`.
  """
  operators = spectral.operators
  layout = spectral.layout
  if not isinstance(operators, TileOperators):
    return None
  counts = [len(m.compress) for m in operators.classes]  # coarse tokens of a tile of each class
  most = max(counts)

  def stack(matrices, *shape):
    """Zero-pads each class's matrix to `shape` and stacks them."""
    padded = [
      np.pad(m, [(0, full - size) for full, size in zip(shape, m.shape, strict=True)])
      for m in matrices
    ]
    return np.stack(padded).astype(np.float32)

  classes = _class_of_tile(layout)
  cells = np.array(counts)[classes]
  starts = np.cumsum([0, *cells[:-1]]).astype(np.int32)
  rows = np.concatenate([tile * most + np.arange(k) for tile, k in enumerate(cells)])
  filters = None
  if filtered:
    filters = stack(map(_band_projections, operators.classes), 2, layout.block, layout.block)
  return TileCells(
    compress=stack((m.compress for m in operators.classes), most, layout.block),
    lift=stack((m.lift for m in operators.classes), layout.block, most),
    classes=classes,
    starts=starts,
    rows=None if len(counts) == 1 else rows.astype(np.int32),
    front=front,
    filters=filters,
  )


def _class_of_tile(layout) -> np.ndarray:
  """Number of each tile's class in the order of `TileOperators.classes`, int32 `[tiles]`."""
  classes = np.zeros(layout.tile_grid, np.int32)
  for axis, lengths in enumerate(layout.lengths):
    parts = halves(lengths)
    ragged = np.repeat(np.arange(len(parts)), [part.stop - part.start for part in parts])
    classes = classes * len(parts) + ragged.reshape([-1 if a == axis else 1 for a in range(3)])
  return classes.reshape(-1).astype(np.int32)


def _band_projections(m: Matrices) -> np.ndarray:
  """P_mid and P_high of one class of tiles, float64 `[2, e, e]`."""
  low = m.lift.astype(np.float64) @ m.compress.astype(np.float64)
  box = m.synthesise.astype(np.float64) @ m.analyse.astype(np.float64)
  return np.stack([box - low, np.eye(len(box)) - box])
