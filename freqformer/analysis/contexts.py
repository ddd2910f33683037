"""Contexts: the means of latents over boxes of tokens that a query token sees.

A context is a window of tokens, cells of coarser levels, or whatever a `BlockMask` lists. Windows
go round the grid, because the latents of `gaussian` are periodic; a table's lists are taken as they
are.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from freqformer.grid.layout import TileLayout, Triple
from freqformer.grid.spectrum import cells_of, most_levels, suggested_levels
from freqformer.kernels.block_sparse.table import BlockMask

# choice: places of a query among its cells; more move the printed figures by some per cent of them.
QUERIES = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Boxes:
  """Boxes of tokens, each of which stands for the mean of its latents.

  Attributes:
    start: int `[n, 3]`, the first token (t, y, x).
    size: int `[n, 3]`, tokens per axis; a box that leaves the grid comes in again at its other end.
  """

  start: np.ndarray
  size: np.ndarray

  def __len__(self) -> int:
    return len(self.start)

  @classmethod
  def join(cls, parts: "Sequence[Boxes]") -> "Boxes":
    """Returns the boxes of all parts in turn, each once."""
    rows = np.concatenate([np.concatenate([p.start, p.size], axis=1) for p in parts])
    _, first = np.unique(rows, axis=0, return_index=True)
    rows = rows[np.sort(first)]
    return cls(rows[:, :3], rows[:, 3:])


@dataclasses.dataclass(frozen=True)
class Level:
  """Cells of one size around the query's own.

  Attributes:
    cell: tokens of a cell per axis (t, y, x); at a grid's end a cell may hold fewer.
    window: cells per axis, odd, the query's in the middle; None: all cells of the grid.
  """

  cell: Triple
  window: Triple | None

  def __post_init__(self):
    if min(self.cell) < 1:
      raise ValueError(f"{self.cell=} must have at least one token per axis.")
    if self.window is not None and not all(w > 0 and w % 2 for w in self.window):
      raise ValueError(
        f"{self.window=} must be odd along each axis: a window is centred on its query."
      )

  def boxes(self, grid: Triple, query: Sequence[int]) -> Boxes:
    """Returns the cells that the token `query` (t, y, x) sees.

    Raises:
      ValueError: if a cell is longer than the grid.
    """
    if any(c > n for c, n in zip(self.cell, grid, strict=True)):
      raise ValueError(
        f"cells of {_text(self.cell)} tokens do not fit into a grid of {_text(grid)}: choose "
        "smaller ones."
      )
    axes = []
    for axis, (n, c) in enumerate(zip(grid, self.cell, strict=True)):
      count = -(-n // c)
      seen = np.arange(count)
      if self.window is not None and self.window[axis] < count:
        seen = (query[axis] // c - self.window[axis] // 2 + seen[: self.window[axis]]) % count
      axes.append(seen)
    index = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    start = index * self.cell
    return Boxes(start, np.minimum(self.cell, np.array(grid) - start))


@dataclasses.dataclass(frozen=True)
class Context:
  """All cells of some levels that a query sees."""

  levels: tuple[Level, ...]

  def boxes(self, grid: Triple, query: Sequence[int]) -> Boxes:
    """Returns what the token `query` (t, y, x) sees; see `Level.boxes`."""
    return Boxes.join([level.boxes(grid, query) for level in self.levels])

  def period(self, grid: Triple) -> Triple:
    """Returns the extents of a box of queries that stands for every box of that size."""
    lengths = [math.lcm(*(level.cell[axis] for level in self.levels)) for axis in range(3)]
    return tuple(p if n % p == 0 else n for p, n in zip(lengths, grid, strict=True))


def window(extent: Triple) -> Context:
  """Returns the tokens of a box around the query; extents are odd."""
  return Context((Level((1, 1, 1), tuple(extent)),))


def cells(cell: Triple, seen: Triple | None = None) -> Context:
  """Returns cells of one size: all of them, or a window of odd extents around the query's."""
  return Context((Level(tuple(cell), seen),))


def octaves(grid: Triple, levels: int = 0, radius: int = 1) -> Context:
  """Returns a pyramid: a window of 2 radius + 1 cells per axis at every level, all of the coarsest.

  Args:
    grid: tokens per axis.
    levels: the tokens' own among them; 0: `suggested_levels`.
    radius: cells to either side.

  Raises:
    ValueError: if the grid has fewer levels.
  """
  levels = levels or suggested_levels(grid)
  if levels < 0 or levels > most_levels(grid):
    raise ValueError(
      f"a grid of {_text(grid)} has 1 to {most_levels(grid)} levels (their cells double until one "
      f"is left), got {levels}."
    )
  found = []
  for l in range(levels):
    cell = tuple(min(2**l, n) for n in grid)
    found.append(Level(cell, (2 * radius + 1,) * 3 if l < levels - 1 else None))
  return Context(tuple(found))


def coarse(grid: Triple, levels: int = 0, radius: int = 1) -> Context:
  """Returns a pyramid without its finest level; arguments and errors are those of `octaves`."""
  found = octaves(grid, levels, radius).levels[1:]
  if not found:
    raise ValueError("a pyramid of one level has no coarse ones: take levels >= 2.")
  return Context(found)


_SIZE = r"\d+(?:x\d+x\d+)?"
_WORD = re.compile(
  rf"window(?P<window>{_SIZE})|cells(?P<cell>{_SIZE})(w(?P<seen>{_SIZE}))?"
  r"|(?P<pyramid>octaves|coarse)(?P<levels>\d+)?(r(?P<radius>\d+))?"
)


def parse(text: str, grid: Triple) -> Context:
  """Reads a context: words joined by "+", whose cells are seen together.

  Args:
    text: `window5` or `window3x5x5` (tokens), `cells16` (all cells of 16 tokens per axis),
      `cells4w5` (of those a window of 5 per axis), `octaves`, `octaves5r2` (levels, radius),
      `coarse` and `coarse5r2` (the same without the finest level).
    grid: tokens per axis.

  Raises:
    ValueError: for another word, an even window, or what the grid cannot have.
  """
  found = []
  for word in text.split("+"):
    match = _WORD.fullmatch(word.strip())
    if not match:
      raise ValueError(
        f"{word!r} is no set of keys; write window5, cells16, cells4w5, octaves, octaves5r2 or "
        "coarse, and + between sets that are seen together."
      )
    if match["window"]:
      context = window(_extents(match["window"]))
    elif match["cell"]:
      context = cells(_extents(match["cell"]), match["seen"] and _extents(match["seen"]))
    else:
      pyramid = octaves if match["pyramid"] == "octaves" else coarse
      context = pyramid(grid, int(match["levels"] or 0), int(match["radius"] or 1))
    found += context.levels
  context = Context(tuple(found))
  context.boxes(grid, (0, 0, 0))  # refuses cells that do not fit
  return context


def default_sets(grid: Triple) -> tuple[str, ...]:
  """Names three windows, a window with one low level of at most 256 cells, and two pyramids.

  The low level has as many keys as the windows that it is compared with, our choice.
  """
  factor = 2
  while math.prod(cells_of(grid, factor)) > 256:
    factor *= 2
  cell = "x".join(str(min(factor, n)) for n in grid)
  return ("window3", "window5", "window7", f"window5+cells{cell}", "octaves", "coarse")


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """The cells that the lists of a `BlockMask` name, over all of its heads and levels.

  A query's token is a row at every level, as a part of its cell; the query sees what any of these
  rows lists. Cells are means over boxes of one size, as a pyramid of even tiles makes them.

  Attributes:
    mask: concrete; queries and keys share the buffer. Of a batch, the first sample is read.
    levels: per level, in the order of the buffer: the layout of its cells, and the tokens of a cell
      per axis.
  """

  mask: BlockMask
  levels: tuple[tuple[TileLayout, Triple], ...]

  def __post_init__(self):
    rows = sum(layout.n_buffer for layout, _ in self.levels)
    sizes = (self.mask.q_tiles * self.mask.block_q, self.mask.kv_tiles * self.mask.block_kv)
    if sizes != (rows, rows):
      raise ValueError(
        f"the layouts have {rows} rows together, but the table has {sizes[0]} query rows and "
        f"{sizes[1]} key rows: give the layouts of all levels, in the order of the buffer."
      )

  def boxes(self, grid: Triple, query: Sequence[int]) -> Boxes:
    """Returns what the token `query` (t, y, x) sees.

    Raises:
      ValueError: if a layout's grid is not that of the cells.
    """
    counts = np.asarray(self.mask.kv_counts)[0]
    lists = np.asarray(self.mask.indices())[0]
    tiles = set()
    first = 0
    for layout, cell in self.levels:
      if layout.grid != tuple(-(-n // c) for n, c in zip(grid, cell, strict=True)):
        raise ValueError(
          f"a layout of {_text(layout.grid)} cells of {_text(cell)} tokens is none of the grid "
          f"{_text(grid)}."
        )
      own = np.ravel_multi_index([q // c for q, c in zip(query, cell, strict=True)], layout.grid)
      tile = (first + layout.arrays().scatter[own]) // self.mask.block_q
      for listed, count in zip(lists[:, tile], counts[:, tile], strict=True):
        tiles.update(listed[:count].tolist())
      first += layout.n_buffer
    seen = np.zeros(first, bool)
    seen.reshape(-1, self.mask.block_kv)[sorted(tiles)] = True
    parts = [Boxes(np.zeros((0, 3), int), np.zeros((0, 3), int))]
    first = 0
    for layout, cell in self.levels:
      arrays = layout.arrays()
      rows = np.flatnonzero(seen[first : first + layout.n_buffer] & arrays.valid)
      start = arrays.positions[rows].astype(int) * cell
      parts.append(Boxes(start, np.minimum(cell, np.array(grid) - start)))
      first += layout.n_buffer
    return Boxes.join(parts)

  def period(self, grid: Triple) -> Triple:
    """Returns the grid: every query may have another list."""
    return grid


def queries(
  context: Context | Table, grid: Triple, count: int = QUERIES, seed: int = 0
) -> np.ndarray:
  """Returns tokens (t, y, x) that stand for all queries, int `[at most count, 3]`.

  They are all places in the context's period if these are no more than `count`, else a sample.
  """
  period = context.period(grid)
  places = math.prod(period)
  chosen = np.arange(places)
  if places > count:
    chosen = np.sort(np.random.default_rng(seed).choice(places, count, replace=False))
  return np.stack(np.unravel_index(chosen, period), -1)


def _extents(text: str) -> Triple:
  sizes = [int(s) for s in text.split("x")]
  return tuple(sizes * 3 if len(sizes) == 1 else sizes)


def _text(sizes: Sequence[int]) -> str:
  return "x".join(map(str, sizes))
