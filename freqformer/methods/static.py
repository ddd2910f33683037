"""Base of methods whose table depends on the grid alone: they write `mask` and nothing else."""

import dataclasses
import functools

from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.cost import CallCost, count
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.methods.base import Method, attend


@dataclasses.dataclass(frozen=True)
class StaticMethod(Method):
  """One table for every head, sample and step; no parameters, so it runs on any checkpoint."""

  def mask(self, layout: TileLayout) -> BlockMask:
    """Returns the table, in NumPy."""
    raise NotImplementedError

  def counted(self, layout: TileLayout) -> CallCost:
    """Counts the table for one head at head dimension 1; a subclass may do it without a table."""
    return count(self.mask(layout), 1)

  def tables(self, layout):
    return self.mask(layout).with_launch()

  def __call__(self, module, qkv, cond, tables, state):
    out, aux = attend(qkv, tables, cond)
    return out, state, aux

  def pairs(self, layout, heads, allocation=None, phase=None):
    return _counted(self, layout).scaled(heads)

  def refuses_dense(self, phase):
    return None

  def only_attends(self, phase):
    return True


@functools.lru_cache(maxsize=64)
def _counted(method: StaticMethod, layout: TileLayout) -> CallCost:
  """Keeps the counts of a method on a grid: a long grid's table takes seconds to build."""
  return method.counted(layout)
