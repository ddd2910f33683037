"""The spectral matrices by tile, as the kernels around attention take them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from freqformer.grid.basis import SpectralTables
from freqformer.grid.operators import Matrices, TileOperators, halves
from freqformer.grid.rotary import angle_tables
from freqformer.kernels.around.lift import Expansion
from freqformer.kernels.around.prepare import Cells


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TileCells:
  """A basis whose transform stays inside a tile. NumPy until passed to jit.

  Attributes:
    compress: float32 `[classes, cells, block]`; lift: `[classes, block, cells]`; zero beyond a class's own cells and tokens.
    classes: int32 `[tiles]`, which of them a tile has; starts: int32 `[tiles]`, its first coarse token.
    rows: int32 `[n_coarse]`, `tile * cells + j` of each coarse token; None where all tiles are alike.
    front: static; rows of the packed buffer before the tokens.
    filters: float32 `[classes, 2, block, block]`, P_mid and P_high of a tile, or None.
  """

  compress: np.ndarray
  lift: np.ndarray
  classes: np.ndarray
  starts: np.ndarray
  rows: np.ndarray | None
  front: int = dataclasses.field(metadata={"static": True})
  filters: np.ndarray | None = None

  @jax.named_scope("prepare")
  def cells(self, centres, head_dim: int) -> Cells:
    """For `kernels.around.prepare`; `centres` as in `SpectralTables`."""
    return Cells(
      self.compress,
      self.classes,
      self.rows,
      *angle_tables(centres, head_dim),
      self.front,
      self.filters,
    )

  @property
  def expansion(self) -> Expansion:
    """For `kernels.around.lift`."""
    return Expansion(self.lift, self.classes, self.starts, self.front)


def tile_cells(spectral: SpectralTables, front: int, filtered: bool = False) -> TileCells | None:
  """None where the transform leaves the tile; `filtered`: whether filters are wanted."""
  operators, layout = spectral.operators, spectral.layout
  if not isinstance(operators, TileOperators):
    return None
  counts = [m.compress.shape for m in operators.classes]  # cells and tokens of a tile
  most = max(k for k, _ in counts)

  def pad(m, shape):
    return np.pad(m, [(0, full - size) for full, size in zip(shape, m.shape, strict=True)])

  compress = np.stack([pad(m.compress, (most, layout.block)) for m in operators.classes]).astype(
    np.float32
  )
  lift = np.stack([pad(m.lift, (layout.block, most)) for m in operators.classes]).astype(np.float32)
  classes = np.zeros(layout.tile_grid, np.int32)
  for axis, lengths in enumerate(layout.lengths):  # in the order of `TileOperators.classes`
    parts = halves(lengths)
    ragged = np.repeat(np.arange(len(parts)), [part.stop - part.start for part in parts])
    classes = classes * len(parts) + ragged.reshape([-1 if a == axis else 1 for a in range(3)])
  classes = classes.reshape(-1).astype(np.int32)
  cells = np.array([k for k, _ in counts])[classes]
  starts = np.cumsum([0, *cells[:-1]]).astype(np.int32)
  rows = np.concatenate([tile * most + np.arange(k) for tile, k in enumerate(cells)]).astype(
    np.int32
  )
  filters = (
    np.stack([pad(_bands(m), (2, layout.block, layout.block)) for m in operators.classes])
    if filtered
    else None
  )
  return TileCells(
    compress, lift, classes, starts, None if len(operators.classes) == 1 else rows, front, filters
  )


def _bands(m: Matrices) -> np.ndarray:
  """P_mid and P_high of one class of tiles, float32 `[2, e, e]`."""
  low, box = (
    a.astype(np.float64) @ b.astype(np.float64)
    for a, b in ((m.lift, m.compress), (m.synthesise, m.analyse))
  )
  return np.stack([box - low, np.eye(len(box)) - box]).astype(np.float32)
