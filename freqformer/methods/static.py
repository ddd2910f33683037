"""Base of methods whose table depends on the grid alone: they write `mask` and nothing else."""

import dataclasses
import functools

from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.cost import CallCost, count
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.methods.base import Method, attend
from freqformer.placement import context_devices
from freqformer.tables.exchange import TileExchange


@dataclasses.dataclass(frozen=True)
class StaticMethod(Method):
  """One table for every head, sample and step; no parameters, so it runs on any checkpoint."""

  exchanges_tiles = True

  def mask(self, layout: TileLayout) -> BlockMask:
    """Returns the table, in NumPy."""
    raise NotImplementedError

  def counted(self, layout: TileLayout) -> CallCost:
    """Counts the table for one head at head dimension 1; a subclass may do it without a table."""
    return count(self.mask(layout), 1)

  def tables(self, layout):
    return self.mask(layout).with_launch()

  def table_of_heads(self, mask: BlockMask, heads: int) -> BlockMask:
    """Returns the table for so many heads."""
    return mask

  def exchange(self, tables, layout, heads):
    devices = context_devices()
    if devices == 1 or layout.tiles % devices:
      return None
    found = TileExchange.of(self.table_of_heads(tables, heads), devices)
    # k and v of the received tiles, against q, k, v and out of the own tokens.
    received = 2 * found.received * tables.block_kv
    by_heads = 4 * layout.n_buffer / devices * (1 - 1 / devices)
    return found if heads % devices or received < by_heads else None

  def __call__(self, module, qkv, cond, tables, state):
    if not isinstance(tables, TileExchange):
      tables = self.table_of_heads(tables, qkv.q.shape[2])
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
