"""Full attention: every token sees every token. The baseline, and the oracle of the sparse methods' quality."""

import dataclasses

from freqformer.cost import Cost, attention_cost
from freqformer.methods.base import Method, plain_aux
from freqformer.planners.dense import dense
from kernels.attention import attention


@dataclasses.dataclass(frozen=True)
class Dense(Method):
  """No fields: nothing to choose."""

  def tables(self, layout):
    return dense(layout)

  def __call__(self, module, qkv, cond, tables, state):
    positions = qkv.layout.positions
    q, k = qkv.rotate_q(qkv.q, positions), qkv.rotate_k(qkv.k, positions)
    out, _ = attention(q, k, qkv.v, tables, implementation=qkv.implementation)
    return out, state, plain_aux(tables, qkv.layout.layout.n, q.shape[0], q.shape[2], cond.want_masks)

  def cost(self, layout, heads, head_dim, allocation=None) -> Cost:
    return attention_cost(heads * layout.n**2, head_dim)
