"""What spectral transforms cost, from a basis and a layout alone: no matrix is made, however large the grid."""

import dataclasses
import math

import numpy as np

from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.transforms import rows_below


@dataclasses.dataclass(frozen=True)
class TransformSizes:
  """Of every block along each axis (t, y, x); a global transform has one block per axis.

  Attributes:
    tokens, cells, box: int arrays, one per axis: tokens of each block, its coarse cells, its rows inside the box.
    tiled: whether blocks are tiles, so that one product serves all three axes.
  """

  tokens: tuple[np.ndarray, ...]
  cells: tuple[np.ndarray, ...]
  box: tuple[np.ndarray, ...]
  tiled: bool

  @classmethod
  def of(cls, basis: SpectralBasis, layout: TileLayout) -> "TransformSizes":
    tiled = basis.kind == "block_dct"
    lengths = layout.lengths if tiled else tuple((length,) for length in layout.grid)

    def rows(cuts):
      return tuple(
        np.array([rows_below(e, cut) for e in v]) for v, cut in zip(lengths, cuts, strict=True)
      )

    return cls(tuple(np.array(v) for v in lengths), rows(basis.low), rows(basis.mid), tiled)

  @property
  def n_coarse(self) -> int:
    """Coarse tokens."""
    return math.prod(int(cells.sum()) for cells in self.cells)

  @property
  def most_cells(self) -> int:
    """Coarse tokens of a full tile."""
    return math.prod(int(cells.max()) for cells in self.cells)

  def reduce(self, rows: tuple[np.ndarray, ...]) -> float:
    """FLOPs per channel from tokens to `rows` (`cells`, `box`, or `tokens` for a square matrix).

    In tiles: `2 e k` for a tile of e tokens and k rows, a product over the axes. Of whole axes: one after the other, t first,
    `2 k` for every number that is left.
    """
    return self._product(rows, self.tokens)

  def expand(self, rows: tuple[np.ndarray, ...]) -> float:
    """FLOPs per channel from `rows` back to tokens, in the same order of axes."""
    return self._product(self.tokens, rows)

  def _product(self, to, source) -> float:
    if self.tiled:
      return 2.0 * math.prod(float((a * b).sum()) for a, b in zip(to, source, strict=True))
    sizes, total = [float(s.sum()) for s in source], 0.0
    for axis, rows in enumerate(to):
      total += 2.0 * float(rows.sum()) * math.prod(sizes)
      sizes[axis] = float(rows.sum())
    return total
