"""Full attention: the baseline, and the oracle of the sparse methods' quality."""

import dataclasses

from freqformer.cost import Cost, attention_cost
from freqformer.methods.base import Method, attend
from freqformer.tables.dense import dense


@dataclasses.dataclass(frozen=True)
class Dense(Method):
  """Every token sees every token. It has no fields."""

  def tables(self, layout):
    return dense(layout)

  def __call__(self, module, qkv, cond, tables, state):
    out, aux = attend(qkv, tables, cond)
    return out, state, aux

  def cost(self, layout, heads, head_dim, allocation=None) -> Cost:
    """n^2 pairs per head, `4 d` each: `4 n^2 D`. Nothing lies around them but norm and rotary, which no method counts."""
    return attention_cost(heads * layout.n**2, head_dim)
