"""Exact arithmetic of attention, from the same tables that run. One multiply-add = 2 FLOPs.

Attention of `pairs` scored (query, key) pairs at head dimension d does q k^T and p v: `4 * pairs * d` FLOPs forward
(dense: 4 n^2 D with D = heads * d; FlashAttention, arXiv 2205.14135, counts the same). The backward does 5 matmuls for the
forward's 2: 2.5 times as many. Exponentials, maxima and masks are not counted; padding that a kernel happens to compute
is not useful work and is not counted either.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one layer and sample, forward.

  Attributes:
    attention_flops: from scored pairs.
    linear_flops: transforms, selection, router: what a method adds around attention.
  """

  attention_flops: float = 0.0
  linear_flops: float = 0.0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(self.attention_flops + other.attention_flops, self.linear_flops + other.linear_flops)

  def scaled(self, factor: float) -> "Cost":
    """The cost of `factor` times the work."""
    return Cost(self.attention_flops * factor, self.linear_flops * factor)

  @property
  def total(self) -> float:
    """All FLOPs."""
    return self.attention_flops + self.linear_flops


BACKWARD_OVER_FORWARD = 2.5


def attention_cost(pairs: float, head_dim: int) -> Cost:
  """`4 * pairs * head_dim` FLOPs, forward."""
  return Cost(attention_flops=4.0 * float(pairs) * head_dim)
