"""Sliding tile attention (STA, arXiv 2502.04507): a 3-D window that moves tile by tile.

No block is mixed. STA's own setting is a window of 18 x 24 x 24 tokens in tiles of 6 x 8 x 8 = 384
rows that the kernel reads as 3 blocks of 128 (9.00 % of 30 x 48 x 80 tokens):

  attention.block=384  attention.tile=(6, 8, 8)  attention.method="sliding_tile"
"""

# choice: elsewhere windows are rounded up to whole tiles, and blocks of at most `rows` rows stay.

import dataclasses

from freqformer.config import require, require_one_of
from freqformer.methods.static import StaticMethod
from freqformer.tables.window import BORDERS, DEALS, count_window, deal_out, sliding_tile

UNITS = ("tokens", "tiles")


@dataclasses.dataclass(frozen=True)
class SlidingTile(StaticMethod):
  """Fields of the method.

  Attributes:
    window: extents (t, y, x); an axis shorter than its extent is covered whole.
    unit: unit of the window, "tokens" (rounded up to whole tiles, to an odd number of them where
      `deal` is "centred") or "tiles".
    border: "clamp" shifts the window inwards at the video's edges (STA's), "clip" cuts it off.
    deal: of a window that cannot be centred on a tile, as in `tables.window`: "centred" refuses it,
      "octant" gives each head one of its sides; "as_is" is what older checkpoints have.
    rows: longest tile that a kernel is given; longer ones are read in equal parts that fit.
  """

  window: tuple[int, int, int] = (18, 24, 24)
  unit: str = "tokens"
  border: str = "clamp"
  deal: str = "centred"
  rows: int = 128

  def __post_init__(self):
    require(self, "window rows", least=1)
    require_one_of(self, "unit", UNITS)
    require_one_of(self, "border", BORDERS)
    require_one_of(self, "deal", DEALS)

  def mask(self, layout):
    window, parts = self._in_tiles(layout)
    return sliding_tile(layout, window, self.border, self.deal).refine(parts)

  def table_of_heads(self, mask, heads):
    return deal_out(mask, heads)

  def pairs(self, layout, heads, allocation=None, phase=None):
    window, parts = self._in_tiles(layout)
    head = count_window(layout, window, self.border, parts, deal=self.deal, heads=heads)
    return head.scaled(heads)

  def _in_tiles(self, layout) -> tuple[tuple[int, int, int], int]:
    """Returns the window in tiles and the number of parts in which a tile is read."""
    tile = layout.tile if self.unit == "tokens" else (1, 1, 1)
    window = tuple(-(-w // e) for w, e in zip(self.window, tile, strict=True))
    if self.unit == "tokens" and self.deal == "centred":
      window = tuple(w + (w % 2 == 0) for w in window)
    # The fewest equal parts that are short enough: 384 rows are 3 x 128; 100 rows stay whole.
    parts = -(-layout.block // self.rows)
    while layout.block % parts:
      parts += 1
    return window, parts
