"""Radial attention (arXiv 2506.19852): a static O(n log n) table whose spatial width halves with every temporal band.

The formula and what of it is ours (tiles instead of tokens) stand in `freqformer/tables/radial.py`.
"""

import dataclasses

from freqformer.methods.static import StaticMethod
from freqformer.tables.radial import count_radial, radial


@dataclasses.dataclass(frozen=True)
class Radial(StaticMethod):
  """Fields of the method.

  Attributes:
    decay: multiplies every spatial width; 1 is the paper's formula, more is denser.
    sink: first frames of tiles that every query sees; the paper's is the first frame.
  """

  decay: float = 1.0
  sink: int = 1

  def __post_init__(self):
    if self.decay <= 0 or self.sink < 0:
      raise ValueError(f"{self.decay=} must be above 0 and {self.sink=} at least 0.")

  def mask(self, layout):
    return radial(layout, self.decay, self.sink)

  def counted(self, layout):
    return count_radial(layout, self.decay, self.sink)
