"""Exact arithmetic of attention, from the same tables that run. One multiply-add = 2 FLOPs.

Attention of `pairs` scored (query, key) pairs at head dimension d does q k^T and p v: `4 * pairs * d` FLOPs forward
(dense: 4 n^2 D with D = heads * d; FlashAttention, arXiv 2205.14135, counts the same). The backward does 5 matmuls for the
forward's 2: 2.5 times as many. Exponentials, maxima and masks are not counted; padding that a kernel happens to compute
is not useful work and is not counted either.
"""

import collections
import dataclasses
import functools

from freqformer.kernels.block_sparse.cost import (
  BACKWARD_MATMULS,
  FORWARD_MATMULS,
  CallCost,
  uniform,
)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one layer and sample, forward.

  Attributes:
    attention_flops: from scored pairs.
    linear_flops: transforms, selection, summaries, linear attention, router: products (and sums over tokens) that a method
      adds around attention. Elementwise work is in no count of FLOPs.
    linear_bytes: device memory that this extra work reads and writes (2 bytes per element), where the method says so.
    launches: kernels beside the attention call.
  """

  attention_flops: float = 0.0
  linear_flops: float = 0.0
  linear_bytes: float = 0.0
  launches: float = 0.0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
    )

  def scaled(self, factor: float) -> "Cost":
    """The cost of `factor` times the work."""
    return Cost(*(x * factor for x in dataclasses.astuple(self)))

  @property
  def total(self) -> float:
    """All FLOPs."""
    return self.attention_flops + self.linear_flops


BACKWARD_OVER_FORWARD = BACKWARD_MATMULS["one_pass"] / FORWARD_MATMULS


def attention_cost(pairs: float, head_dim: int) -> Cost:
  """`4 * pairs * head_dim` FLOPs, forward."""
  return Cost(attention_flops=4.0 * float(pairs) * head_dim)


# Device memory per pooled score that the selection moves on Hopper: 17 to 21 bytes for 512 to 8,192 tiles
# (benchmarks/compiled/memory_bound.py; 67 to 71 in XLA alone).
_SCORE_BYTES = 20.0


def selection_cost(n: int, tiles: int, heads: int, head_dim: int, read: float = 2.0) -> Cost:
  """Key tiles chosen by pooled scores: means of q and k (2 n D), q k^T of the means (2 tiles^2 D), and the search for each
  row's threshold, which moves scores and does no products (comparisons are not counted).

  Args:
    read: `[n, D]` arrays that are read for the means; 0 where another kernel makes them on its way.
  """
  width = heads * head_dim
  moved = 2.0 * read * n * width + _SCORE_BYTES * heads * tiles**2
  return Cost(linear_flops=(2.0 * n + 2.0 * tiles**2) * width, linear_bytes=moved, launches=9)


def linear_attention_cost(n: int, heads: float, head_dim: int, segments: int = 0) -> Cost:
  """Linear attention (arXiv 2006.16236): states and norms of segments `2 n d (d + 1)` per head, reading them as much again.

  Where queries read the sums of other segments (arXiv 2509.24006), `2 segments^2 d (d + 1)` more to add them up. Not counted:
  feature maps; bytes, which depend on the segments.
  """
  return Cost(linear_flops=(4.0 * n + 2.0 * segments**2) * head_dim * (head_dim + 1) * heads)


# ---- a method on a grid --------------------------------------------------------------------------------------------------


def method_call(
  method, layout, heads: int, head_dim: int, phase: str | None = None, allocation=None
) -> CallCost:
  """The attention call of a layer: the method's own lists where it knows them, else equal lists with the same pairs.

  Args:
    method: a `Method`; layout: of the grid.
    phase: of a sampling step; None is a usual step, for which alone a method states its lists.
    allocation: share of heads per branch, for methods that have some.
  """
  own = method.call_cost(layout, heads, head_dim, allocation) if phase is None else None
  if own is not None:
    return own
  cost = method.cost if phase is None else functools.partial(method.phase_cost, phase)
  pairs = cost(layout, heads, head_dim, allocation).attention_flops / (4.0 * head_dim)
  listed = pairs / (heads * layout.tiles * (layout.fill * layout.block) ** 2)
  return uniform(
    layout.tiles, listed, layout.tiles, head_dim, block=layout.block, fill=layout.fill, heads=heads
  )


def around_bytes(cost: Cost, n: int, width: int, itemsize: int = 2) -> float:
  """Device memory of the work around attention; a method that counts FLOPs but no bytes is taken to read q, k and v once."""
  return cost.linear_bytes or (3.0 * n * width * itemsize if cost.linear_flops else 0.0)


# ---- a block -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BlockShape:
  """Sizes of one transformer block, ours or a published one.

  Attributes:
    width: D. heads, head_dim: with `heads * head_dim = D`.
    mlp: hidden width of the two-matrix MLP.
    text: text tokens m.
    text_mode: "none"; "joint": text tokens pass all matrices and attend with the video (MM-DiT); "cross": video attends
      to them in a second attention (q and out on video, k and v on text).
    modulation: columns of the conditioning's matrix, in widths (adaLN: 6); 0 where the model shares one.
    modulation_rows: rows of that matrix; 0 means the width.
  """

  width: int
  heads: int
  mlp: int
  text: int = 0
  text_mode: str = "none"
  modulation: int = 6
  modulation_rows: int = 0

  @property
  def head_dim(self) -> int:
    return self.width // self.heads

  def matmuls(self, n: int) -> list[tuple[str, float, int, int]]:
    """`(name, rows, inner, columns)` of every matrix product of one sample: 2 rows inner columns FLOPs each."""
    d, rows = self.width, n + self.text * (self.text_mode == "joint")
    found = [
      ("qkv", rows, d, 3 * d),
      ("out", rows, d, d),
      ("mlp_in", rows, d, self.mlp),
      ("mlp_out", rows, self.mlp, d),
    ]
    if self.text_mode == "cross":
      found += [("cross_q", n, d, d), ("cross_kv", self.text, d, 2 * d), ("cross_out", n, d, d)]
    return found + [("modulation", 1, self.modulation_rows or d, self.modulation * d)] * bool(
      self.modulation
    )

  def linear_flops(self, n: int) -> float:
    """Everything that is linear in the tokens: matrix products and, where there is one, cross-attention (4 n m D)."""
    return sum(2.0 * r * k * c for _, r, k, c in self.matmuls(n)) + self.cross_attention_flops(n)

  def cross_attention_flops(self, n: int) -> float:
    """4 n m D, or 0 without cross-attention."""
    return 4.0 * n * self.text * self.width * (self.text_mode == "cross")

  def text_attention_flops(self, n: int) -> float:
    """What joint text adds to self-attention: text sees all and all see it, `(n + m)^2 - n^2` pairs per head, always dense."""
    return 4.0 * (2.0 * n * self.text + self.text**2) * self.width * (self.text_mode == "joint")

  def elementwise_bytes(self, n: int, itemsize: int = 2) -> float:
    """Norms, modulation, rotary, gates and residuals if each is one fused pass: 14 reads and writes of `[n, D]`, and 7 more
    around a cross-attention. Activations belong to the MLP's matmuls.

    Norm + modulate twice (2 each), QK-norm + rotary (2 in, 2 out), gated residual twice (3 each).
    """
    rows = n + self.text * (self.text_mode == "joint")
    return (14.0 + 7.0 * (self.text_mode == "cross")) * rows * self.width * itemsize

  def matmul_bytes(self, n: int, itemsize: int = 2) -> float:
    """Inputs, weights and outputs of the matrix products, each once."""
    return (
      sum(float(r) * k + float(k) * c + float(r) * c for _, r, k, c in self.matmuls(n)) * itemsize
    )


# ---- a model, a run ------------------------------------------------------------------------------------------------------


def model_cost(config, latent_shape, allocations=None, training: bool = False, phases=None) -> Cost:
  """Forward of a whole `VideoDiT` for one sample.

  Counted: attention as the methods count it; per layer 8 n D^2 (q, k, v and out projections), 4 n D H (MLP of hidden width
  H) and 12 D^2 (adaLN); patch embedding and final projection. Not counted: norms, rotary, activations, the embedders.

  Args:
    config: a `ModelConfig`; latent_shape: `(t, y, x, c)`.
    allocations: share of heads per branch for every run of layers, or None for each method's own expectation.
    training: count every branch of every head where training runs them all (soft and straight-through routing;
      `Method.training_cost`).
    phases: one per run of layers: count this sampling step (`Method.phase_cost`), not a usual one.
  """
  layout, width = config.layout(latent_shape), config.width
  total, n = Cost(), layout.n
  block = BlockShape(width, config.heads, int(width * config.mlp_ratio))
  for i, (count, method) in enumerate(config.runs()):
    allocation = None if allocations is None else allocations[i]
    cost = method.training_cost if training else method.cost
    if phases is not None:
      cost = functools.partial(method.phase_cost, phases[i])
    layer = cost(layout, config.heads, config.dims.head_dim, allocation)
    total = total + (layer + Cost(linear_flops=block.linear_flops(n))).scaled(count)
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
  steps = [
    model_cost(config, latent_shape, phases=phases).scaled(count)
    for phases, count in counts.items()
  ]
  return sum(steps, Cost()).scaled(1 + guided)


def training_flops(cost: Cost) -> float:
  """Forward and backward of a step: 3 times the linear work (2 matmuls back for 1 forward), 3.5 times attention."""
  return 3.0 * cost.linear_flops + (1.0 + BACKWARD_OVER_FORWARD) * cost.attention_flops


def utilisation(flops: float, seconds: float, peak: float) -> float:
  """Model FLOPs utilisation that knows of sparsity: *scored* work over what the device could have done in that time.

  Dense FLOPs over sparse time is not utilisation; it has no name here.
  """
  return flops / (seconds * peak)
