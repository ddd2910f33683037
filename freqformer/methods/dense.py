"""Full attention: the baseline, and the oracle of the sparse methods' quality."""

import dataclasses

from freqformer.methods.base import Method, attend, even_lists
from freqformer.tables.dense import dense


@dataclasses.dataclass(frozen=True)
class Dense(Method):
  """Every token sees every token. It has no fields."""

  def tables(self, layout):
    return dense(layout)

  def __call__(self, module, qkv, cond, tables, state):
    out, aux = attend(qkv, tables, cond)
    return out, state, aux

  def pairs(self, layout, heads, allocation=None, phase=None):
    return even_lists(layout, heads, layout.n**2)

  def refuses_dense(self, phase):
    return None

  def only_attends(self, phase):
    return True
