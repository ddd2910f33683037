"""Base of methods whose table depends on the grid alone: they write `mask` and nothing else."""

import dataclasses
import functools

from freqformer.cost import Cost, attention_cost
from freqformer.kernels.block_sparse.cost import CallCost, count
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.methods.base import Method, attend


@dataclasses.dataclass(frozen=True)
class StaticMethod(Method):
  """One table for every head, sample and step; no parameters, so it runs on any checkpoint."""

  def mask(self, layout) -> BlockMask:
    """The table of a `TileLayout`, in NumPy."""
    raise NotImplementedError

  def counted(self, layout) -> CallCost:
    """What `kernels.block_sparse.cost.count` finds in the table, of one head at head dimension 1; a subclass may know it without a table."""
    return count(self.mask(layout), 1)

  def tables(self, layout):
    return self.mask(layout).with_launch()

  def __call__(self, module, qkv, cond, tables, state):
    out, aux = attend(qkv, tables, cond)
    return out, state, aux

  def cost(self, layout, heads, head_dim, allocation=None) -> Cost:
    """The table's own pairs, `4 d` each: exact on any grid. Nothing else is done around attention (norm and rotary are not
    counted here: `BlockShape.elementwise_bytes`)."""
    return attention_cost(heads * _counted(self, layout).pairs, head_dim)

  def call_cost(self, layout, heads, head_dim, allocation=None) -> CallCost:
    return dataclasses.replace(_counted(self, layout), head_dim=head_dim).scaled(heads)


@functools.lru_cache(maxsize=64)
def _counted(method: StaticMethod, layout) -> CallCost:
  """A long grid's table takes seconds to build, its counts are a few numbers: those are kept."""
  return method.counted(layout)
