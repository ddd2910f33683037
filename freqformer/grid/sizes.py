"""Sizes of the coarse grid, from a basis and a layout alone: no matrix is made, however large."""

import math

from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.transforms import rows_below


def _cells(basis: SpectralBasis, layout: TileLayout) -> list[list[int]]:
  """Returns per axis the coarse cells of each block: of each tile, or of the whole axis."""
  lengths = layout.lengths if basis.tiled else tuple((length,) for length in layout.grid)
  return [
    [rows_below(length, cut) for length in blocks]
    for blocks, cut in zip(lengths, basis.low, strict=True)
  ]


def coarse_grid(basis: SpectralBasis, layout: TileLayout) -> tuple[int, int, int]:
  """Returns coarse tokens per axis."""
  return tuple(sum(cells) for cells in _cells(basis, layout))


def coarse_tokens(basis: SpectralBasis, layout: TileLayout) -> int:
  """Returns the number of coarse tokens of a grid."""
  return math.prod(coarse_grid(basis, layout))


def most_cells(basis: SpectralBasis, layout: TileLayout) -> int:
  """Returns the coarse tokens of a full tile; of a transform of whole axes, of the grid."""
  return math.prod(max(cells) for cells in _cells(basis, layout))
