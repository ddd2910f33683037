"""Counts of FLOPs: of attention by its exact pairs, of all else by the matrix products that run.

One multiply-add is 2 FLOPs. Attention of `pairs` scored (query, key) pairs at head dimension d does
q k^T and p v: `4 * pairs * d` FLOPs forward (dense: 4 n^2 D with D = heads * d; FlashAttention,
arXiv 2205.14135, counts the same). The backward does 5 matmuls for the forward's 2: 2.5 times as
many. Exponentials, maxima, masks and sums over tokens are not counted, nor is attention's padding.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jax.extend import core

from freqformer.kernels.block_sparse.cost import BACKWARD_MATMULS, FORWARD_MATMULS

# Phase of a sampling step in which a layer attends densely in the place of its method
# (`attention.schedule`).
DENSE = "dense"
BACKWARD_OVER_FORWARD = BACKWARD_MATMULS["one_pass"] / FORWARD_MATMULS


@dataclasses.dataclass(frozen=True)
class Cost:
  """FLOPs of one sample, forward: of attention's scored pairs, of all other matrix products."""

  attention_flops: float = 0.0
  linear_flops: float = 0.0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.attention_flops + other.attention_flops, self.linear_flops + other.linear_flops
    )

  def scaled(self, factor: float) -> "Cost":
    return Cost(self.attention_flops * factor, self.linear_flops * factor)

  @property
  def total(self) -> float:
    return self.attention_flops + self.linear_flops


def attention_cost(pairs: float, head_dim: int) -> Cost:
  """Returns `4 * pairs * head_dim` FLOPs, forward."""
  return Cost(attention_flops=4.0 * float(pairs) * head_dim)


# ---- a layer's method ----------------------------------------------------------------------------

# Named scopes (`jax.named_scope`) whose products are counted apart from a method's other ones.
_NOT_AROUND = ("attention", "parameters")  # the attention op, whose pairs are exact; initial values
_SCORES = "scores"  # attention of a few rows that is written out instead of calling the op
_ROUTER = "router"
_MEASURING = "measuring"  # every branch runs on every head, whatever the allocation


def layer_cost(
  method,
  layout,
  heads: int,
  head_dim: int,
  allocation=None,
  phase: str | None = None,
  training: bool = False,
) -> Cost:
  """Returns what a method does between a layer's projections, of one sample, forward.

  Attention is counted by `Method.pairs`. Products around it are read off the traced program, which
  computes some parts for every head; only heads of the branch that needs a part count for it
  (`Method.branch_of_part`).

  Args:
    method: a `Method`.
    layout: `TileLayout` of the grid.
    allocation: share of heads per branch; None is the method's own expectation.
    phase: of a sampling step; None is the step that most of a run does.
    training: count every branch of every head where training runs them all.

  Raises:
    ConfigError: for an allocation that is invalid or not of so many heads.
  """
  if phase == DENSE:
    return attention_cost(heads * layout.n**2, head_dim)
  phase = method.usual_phase if phase is None else phase
  names = method.branches
  if training and method.trains_all_branches:
    pairs = sum(method.pairs(layout, heads, alone, phase).pairs for alone in np.eye(len(names)))
    share = dict.fromkeys(names, 1.0)
  else:
    pairs = method.pairs(layout, heads, allocation, phase).pairs
    share = dict(zip(names, method.shares(heads, allocation) if names else (), strict=True))
  cost = attention_cost(pairs, head_dim)
  if method.only_attends(phase):
    return cost
  for part, flops in _products(method.for_counting(), layout, heads, head_dim, phase).items():
    if part == _SCORES:
      cost += Cost(attention_flops=flops)
    elif part != _ROUTER or method.routed:
      cost += Cost(linear_flops=flops * share.get(method.branch_of_part.get(part), 1.0))
  return cost


@functools.lru_cache(maxsize=64)
def branch_costs(method, layout, heads: int, head_dim: int) -> np.ndarray:
  """Returns FLOPs of a layer whose heads all take one branch, over dense attention: `[branches]`.

  The router's penalty weighs branches by it, at a usual step.
  """
  dense = attention_cost(heads * layout.n**2, head_dim).total
  branches = map(tuple, np.eye(len(method.branches)))
  each = [layer_cost(method, layout, heads, head_dim, alone).total for alone in branches]
  found = np.asarray(each) / dense
  found.setflags(write=False)  # shared by every caller through the cache
  return found


@functools.lru_cache(maxsize=256)
def _products(method, layout, heads: int, head_dim: int, phase: str) -> dict[str, float]:
  """Returns FLOPs of the matrix products around attention by part; a trace takes 0.3 to 3 s."""
  parts = {*method.branch_of_part, _SCORES, _ROUTER, _MEASURING}
  found = collections.Counter()
  for scopes, flops in _walk(method.program(layout, heads, head_dim, phase).jaxpr):
    known = [name for name in scopes if name in parts]
    found[_SCORES if _SCORES in known else known[0] if known else ""] += flops
  return dict(found)


def _walk(jaxpr, scopes: tuple[str, ...] = (), times: int = 1) -> Iterator[tuple]:
  """Yields `(named scopes from the outermost, FLOPs)` of every matrix product of a program.

  Loops count as often as they run, of branches the costliest one. Kernels (`pallas_call`) do not
  occur: the plain form of every op is traced.

  Raises:
    ValueError: for a product in a loop of unknown length.
  """
  for eqn in jaxpr.eqns:
    inside = (*scopes, *str(eqn.source_info.name_stack).split("/"))
    if any(name in inside for name in _NOT_AROUND):
      continue
    name = eqn.primitive.name
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
      yield inside, 2.0 * depth * math.prod(eqn.outvars[0].aval.shape) * times
    length = eqn.params["length"] if name == "scan" else 1
    bodies = [
      list(_walk(body, inside, times * length)) for body in core.jaxprs_in_params(eqn.params)
    ]
    if name == "while" and any(bodies):
      raise ValueError("a loop of unknown length holds matrix products: they cannot be counted")
    if name == "cond":
      bodies = [max(bodies, key=lambda found: sum(flops for _, flops in found))]
    for found in bodies:
      yield from found


# ---- a block -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BlockShape:
  """Sizes of one transformer block, ours or a published one.

  Attributes:
    width: D.
    heads: with `heads * head_dim = D`.
    mlp: hidden width of the two-matrix MLP.
    text: text tokens m.
    text_mode: "none"; "joint": text tokens pass all matrices and attend with the video (MM-DiT);
      "cross": video attends to them in a second attention (q and out on video, k and v on text).
    modulation: columns of the conditioning's matrix, in widths (adaLN: 6); 0 if the model shares
      one among its blocks.
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

  def rows(self, n: int) -> int:
    """Rows that pass all matrices: n video tokens and the joint text."""
    return n + self.text * (self.text_mode == "joint")

  def matmuls(self, n: int) -> list[tuple[str, float, int, int]]:
    """Returns `(name, rows, inner, columns)` of every matrix product of one sample."""
    d = self.width
    rows = self.rows(n)
    found = [
      ("qkv", rows, d, 3 * d),
      ("out", rows, d, d),
      ("mlp_in", rows, d, self.mlp),
      ("mlp_out", rows, self.mlp, d),
    ]
    if self.text_mode == "cross":
      found += [("cross_q", n, d, d), ("cross_kv", self.text, d, 2 * d), ("cross_out", n, d, d)]
    if self.modulation:
      found.append(("modulation", 1, self.modulation_rows or d, self.modulation * d))
    return found

  def linear_flops(self, n: int) -> float:
    """Returns all that is linear in the tokens: matrix products and 4 n m D of cross-attention."""
    cross = 4.0 * n * self.text * self.width * (self.text_mode == "cross")
    return sum(2.0 * r * k * c for _, r, k, c in self.matmuls(n)) + cross

  def text_attention_flops(self, n: int) -> float:
    """Returns what joint text adds to self-attention: `(n + m)^2 - n^2` pairs per head.

    Text sees all tokens and all tokens see it, whatever the method.
    """
    return 4.0 * (2.0 * n * self.text + self.text**2) * self.width * (self.text_mode == "joint")

  def elementwise_bytes(self, n: int, itemsize: int = 2) -> float:
    """Returns bytes of norms, modulation, rotary, gates and residuals, each one fused pass.

    These are 14 reads and writes of `[n, D]`: norm + modulate twice (2 each), QK-norm + rotary (2
    in, 2 out), gated residual twice (3 each); and 7 more around a cross-attention. Activations
    belong to the MLP's products.
    """
    return (14.0 + 7.0 * (self.text_mode == "cross")) * self.rows(n) * self.width * itemsize


# ---- a model, a run ------------------------------------------------------------------------------


def model_cost(config, latent_shape, allocations=None, training: bool = False, phases=None) -> Cost:
  """Returns the forward of a whole model for one sample.

  Counted: `layer_cost` and `BlockShape.linear_flops` of every layer; patch embedding and final
  projection. Not counted: norms, rotary, activations, the embedders.

  Args:
    config: a `ModelConfig`.
    latent_shape: `(t, y, x, c)`.
    allocations: `allocation` of `layer_cost` for every run of layers.
    training: as of `layer_cost`.
    phases: `phase` of `layer_cost` for every part of `ModelConfig.parts`; None: the usual phases,
      without `attention.schedule`.
  """
  layout = config.layout(latent_shape)
  block = config.block_shape
  total = Cost(linear_flops=2 * _patch_flops(config, latent_shape))
  runs = config.runs()
  parts = config.whole_runs() if phases is None else config.parts()
  for i, part in enumerate(parts):
    layer = layer_cost(
      runs[part.run][1],
      layout,
      config.heads,
      config.dims.head_dim,
      allocation=None if allocations is None else allocations[part.run],
      phase=None if phases is None else phases[i],
      training=training,
    )
    total += (layer + Cost(linear_flops=block.linear_flops(layout.n))).scaled(part.count)
  return total


def _patch_flops(config, latent_shape) -> float:
  """Returns FLOPs of the patch embedding, which the final projection has, too."""
  patch = latent_shape[3] * math.prod(config.patch)
  return 2.0 * config.layout(latent_shape).n * config.width * patch


def sampling_cost(config, latent_shape, schedule, guided: bool | Sequence[bool] = True) -> Cost:
  """Returns all forwards of one sample: every evaluation by its own phase, two where guided.

  Args:
    config: a `ModelConfig`.
    latent_shape: `(t, y, x, c)`.
    schedule: phases per evaluation and part of the layers, of `LayerStack.schedule`.
    guided: each evaluation, or each one by itself, runs a conditional and an unconditional half.
      Work that one of them does for both (a search for masks) is counted twice, so this is an upper
      bound there.
  """
  forwards = collections.Counter()
  for phases, both in zip(schedule, np.broadcast_to(guided, len(schedule)), strict=True):
    forwards[phases] += 1 + int(both)
  costs = [
    model_cost(config, latent_shape, phases=phases).scaled(count)
    for phases, count in forwards.items()
  ]
  return sum(costs, Cost())


def training_flops(cost: Cost) -> float:
  """Returns forward and backward of a step: 3 times the linear work, 3.5 times attention."""
  return _with_backward(cost).total


def _with_backward(cost: Cost) -> Cost:
  return Cost((1.0 + BACKWARD_OVER_FORWARD) * cost.attention_flops, 3.0 * cost.linear_flops)


def step_cost(config, latent_shape, *, frozen=False, teacher="", dense=0) -> Cost:
  """Returns forward and backward of a training step for one sample.

  Counted is what runs, without recomputation (`remat`).

  Args:
    config: a `ModelConfig`.
    latent_shape: `(t, y, x, c)`.
    frozen: the parameters of methods alone are trained (`train.freeze`).
    teacher: `TrainConfig.teacher`: the dense attention of every layer, or all of the dense model,
      runs forward, too.
    dense: number of the first layers that attend densely.
  """
  layout = config.layout(latent_shape)
  staged = config.with_dense_layers(dense)
  phases = [DENSE if part.dense else None for part in staged.parts()]
  if frozen:
    total = _frozen_step_cost(config, latent_shape)
  else:
    total = _with_backward(model_cost(staged, latent_shape, training=True, phases=phases))
  if teacher == "output" and dense < config.depth:
    total += model_cost(config.with_method("dense"), latent_shape)
  if teacher == "layers":
    pairs = (config.depth - dense) * config.heads * layout.n**2
    total += attention_cost(pairs, config.dims.head_dim)
  return total


def _frozen_step_cost(config, latent_shape) -> Cost:
  """Returns a step in which no gradient of a frozen matrix is computed.

  The backward ends at the first run of layers with a method that has parameters. From there on a
  block's matrices pass gradients to their inputs, all but that of the conditioning, whose input
  depends on nothing that is trained.
  """
  layout = config.layout(latent_shape)
  sizes = (config.heads, config.dims.head_dim)
  block = config.block_shape
  matrices = block.linear_flops(layout.n)
  conditioning = matrices - dataclasses.replace(block, modulation=0).linear_flops(layout.n)
  total = Cost(linear_flops=3 * _patch_flops(config, latent_shape))  # the projection's twice
  trained = False
  for count, method in config.runs():
    trained = trained or method.has_parameters(layout, *sizes)
    layer = layer_cost(method, layout, *sizes, training=True)
    if trained:
      layer = _with_backward(layer) + Cost(linear_flops=2 * matrices - conditioning)
    else:
      layer += Cost(linear_flops=matrices)
    total += layer.scaled(count)
  return total


def utilisation(flops: float, seconds: float, peak: float) -> float:
  """Returns scored work over what the device could have done in that time."""
  return flops / (seconds * peak)
