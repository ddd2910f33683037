"""Exact arithmetic of attention, from the same tables that run. One multiply-add = 2 FLOPs.

Attention of `pairs` scored (query, key) pairs at head dimension d does q k^T and p v: `4 * pairs * d` FLOPs forward
(dense: 4 n^2 D with D = heads * d; FlashAttention, arXiv 2205.14135, counts the same). The backward does 5 matmuls for the
forward's 2: 2.5 times as many. Exponentials, maxima and masks are not counted; padding that a kernel happens to compute
is not useful work and is not counted either.
"""

import collections
import dataclasses
import functools


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


def model_cost(config, latent_shape, allocations=None, training: bool = False, phases=None) -> Cost:
  """Forward of a whole `VideoDiT` for one sample.

  Counted: attention as the methods count it; per layer 8 n D^2 (q, k, v and out projections), 4 n D H (MLP of hidden width
  H) and 12 D^2 (adaLN); patch embedding and final projection. Not counted: norms, rotary, activations, the embedders.

  Args:
    config: a `ModelConfig`; latent_shape: `(t, y, x, c)`.
    allocations: share of heads per branch for every run of layers, or None for each method's own expectation.
    training: count every branch of every head where training runs them all (soft and straight-through routing).
    phases: one per run of layers: count this sampling step (`Method.phase_cost`), not a usual one.
  """
  layout, width = config.layout(latent_shape), config.width
  total, n = Cost(), layout.n
  for i, (count, method) in enumerate(config.runs()):
    allocation = None if allocations is None else allocations[i]
    every = len(method.branches) if training and method.trains_all_branches else 0
    cost = method.cost if phases is None else functools.partial(method.phase_cost, phases[i])
    layer = cost(layout, config.heads, config.dims.head_dim, (1,) * every or allocation)
    layer = Cost(layer.attention_flops * max(every, 1), layer.linear_flops)
    dense = 8.0 * n * width**2 + 4.0 * n * width * int(width * config.mlp_ratio) + 12.0 * width**2
    total = total + (layer + Cost(linear_flops=dense)).scaled(count)
  patch = latent_shape[3] * config.patch[0] * config.patch[1] * config.patch[2]
  return total + Cost(linear_flops=2 * 2.0 * n * width * patch)


def sampling_cost(config, latent_shape, schedule, guided: bool = True) -> Cost:
  """All forwards of one sample: every step by its own phase (warm-up, searches, reuse), two forwards a step if guided.

  Args:
    config: a `ModelConfig`; latent_shape: `(t, y, x, c)`.
    schedule: phases per step and run of layers, of `VideoDiT.schedule`.
    guided: whether each step runs the conditional and the unconditional half; what only one of them does (a search whose
      masks both run with) is counted twice, so this is an upper bound there.
  """
  counts = collections.Counter(schedule)
  steps = [model_cost(config, latent_shape, phases=phases).scaled(count) for phases, count in counts.items()]
  return sum(steps, Cost()).scaled(1 + guided)
