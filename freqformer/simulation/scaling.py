"""Memory of a forward, the largest video that fits, and sequence parallelism with communication."""

import dataclasses
import math

import jax
import numpy as np

from freqformer.config import ConfigError
from freqformer.methods.base import Dims
from freqformer.simulation.descriptions import Gpu, ModelCard, known, load_gpu
from freqformer.simulation.forward import (
  ELEMENTWISE_LAUNCHES,
  Forward,
  Plan,
  row,
  run_seconds,
  simulate,
)

# ---- memory --------------------------------------------------------------------------------------


def state_bytes(plan: Plan) -> float:
  """Returns what the method remembers between denoising steps, all layers, by its `init_state`."""
  card = plan.card
  dims = Dims(card.heads, card.block.head_dim, card.width)
  state = jax.eval_shape(lambda: plan.method.init_state(1, dims, plan.layout))
  return float(card.layers * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)))


def memory_bytes(plan: Plan, gpus: int = 1, itemsize: int = 2) -> float:
  """Returns the least device memory of one forward at batch 1, on each of `gpus`.

  Weights (`itemsize` bytes per parameter, on every GPU) + the residual stream and q, k, v in the
  padded buffer, 4 D per row (out overwrites q, the MLP runs by chunks of tokens, norms and rotary
  are fused) + LSE + the method's state, these divided over sequence-parallel GPUs. A closed form:
  no table is built. Not counted: text encoder, video codec, workspace, fragmentation. A plain
  program that keeps every intermediate of a layer needs about 2.5 times as much in addition to the
  weights.

  Raises:
    ValueError: for a grid that int32 cannot index.
  """
  card = plan.card
  rows = card.block.rows(plan.layout.n_buffer)
  activations = 4.0 * rows * card.width * itemsize + 4.0 * rows * card.heads
  return float(itemsize) * card.parameters + (activations + state_bytes(plan)) / gpus


def fits(plan: Plan, gpu: Gpu, gpus: int = 1) -> bool:
  """Whether a forward fits; a grid that int32 cannot index fits nowhere."""
  try:
    return memory_bytes(plan, gpus, gpu.itemsize) <= gpu.memory_bytes
  except ValueError:
    return False


def check_fits(plan: Plan, gpu: Gpu, gpus: int = 1) -> None:
  """Raises ConfigError if a forward cannot fit: by how much, and what would."""
  if fits(plan, gpu, gpus):
    return
  try:
    needed = memory_bytes(plan, gpus, gpu.itemsize)
    text = (
      f"{plan.card.name} with {plan.name} on {math.prod(plan.grid):,} tokens needs at least "
      f"{needed / 1e9:,.1f} GB on each of {gpus} x {gpu.name} ({gpu.memory_bytes / 1e9:,.0f} GB): "
      f"{(needed - gpu.memory_bytes) / 1e9:,.1f} GB too much"
    )
  except ValueError as error:
    text = str(error)
  raise ConfigError(f"{text}. What fits: {' or '.join(_options(plan, gpu, gpus))}.")


def _options(plan: Plan, gpu: Gpu, gpus: int) -> list[str]:
  """Returns arguments with which a forward fits: more GPUs, another GPU, a smaller grid."""
  more = [g for g in range(gpus + 1, plan.card.heads + 1) if fits(plan, gpu, g)]
  options = [f"--gpus={g}" for g in more[:1]]
  larger = [g for g in map(load_gpu, known("gpus")) if fits(plan, g, gpus)]
  larger.sort(key=lambda g: g.memory_bytes)
  options += [f"--gpu={g.name}" for g in larger[:1]]
  own_frame = dataclasses.replace(plan, grid=plan.card.grid, tile=None)
  largest = largest_video(plan, gpu, gpus) or largest_video(own_frame, gpu, gpus)
  if largest is not None:
    options.append(f"--grid={','.join(map(str, largest))} ({math.prod(largest):,} tokens)")
  return options or ["a smaller model"]


def largest_video(plan: Plan, gpu: Gpu, gpus: int = 1) -> tuple[int, int, int] | None:
  """Returns the longest grid with this plan's frame size that fits, by bisection over t.

  None if not even one frame fits.
  """

  def at(t):
    return dataclasses.replace(plan, grid=(t, *plan.grid[1:]), tile=None)

  if not fits(at(1), gpu, gpus):
    return None
  low = 1
  high = 2
  while fits(at(high), gpu, gpus):
    low = high
    high *= 2
  while high - low > 1:
    mid = (low + high) // 2
    if fits(at(mid), gpu, gpus):
      low = mid
    else:
      high = mid
  return at(low).grid


# ---- several GPUs --------------------------------------------------------------------------------


def check_gpus(card: ModelCard, gpus: int) -> None:
  """Raises ConfigError for more GPUs than heads."""
  if not 1 <= gpus <= card.heads:
    raise ConfigError(
      f"--gpus={gpus} must lie in 1..{card.heads}, the heads of {card.name}: each needs a whole "
      "head."
    )


def imbalance(plan: Plan, gpus: int, phase: str | None = None) -> float:
  """Returns attention of the busiest GPU over the mean; whole heads are dealt, dearest first.

  Each goes to the least loaded GPU. Heads differ where a method deals them to branches of different
  cost; the shares are the method's own expectation. Heads that differ by what the data ask for
  (AdaSpa's levels, spatial and temporal heads) are taken as alike, hence too fast.
  """
  loads = np.zeros(gpus)
  for pairs in sorted(head_pairs(plan, phase), reverse=True):
    loads[loads.argmin()] += pairs
  return float(loads.max() / loads.mean()) if loads.any() else 1.0


def head_pairs(plan: Plan, phase: str | None = None) -> list[float]:
  """Returns the scored pairs of each head of a layer; `phase`: of a step, None is a usual one."""
  heads = plan.card.heads
  method = plan.method
  branches = len(method.branches)
  if not branches:
    return [method.pairs(plan.layout, 1, phase=phase).pairs] * heads
  each = [
    method.pairs(plan.layout, 1, alone, phase).pairs for alone in map(tuple, np.eye(branches))
  ]
  edges = np.round(np.cumsum(method.shares(heads)) * heads).astype(int)
  return [each[int(np.searchsorted(edges, i, side="right"))] for i in range(heads)]


@dataclasses.dataclass(frozen=True)
class Parallel:
  """One forward on several GPUs.

  Attributes:
    gpus: how many.
    seconds: of the busiest one, the sum of the five parts.
    attention_s: seconds of attention calls.
    around_s: of the method's work around them.
    matmul_s: of matrix products.
    elementwise_s: of norms and the like.
    communication_s: of all-to-alls.
    sent_bytes: of each GPU.
    imbalance: attention of the busiest GPU over the mean.
    speedup: over one GPU.
  """

  gpus: int
  seconds: float
  attention_s: float
  around_s: float
  matmul_s: float
  elementwise_s: float
  communication_s: float
  sent_bytes: float
  imbalance: float
  speedup: float


def parallel(
  plan: Plan, gpu: Gpu, gpus: int, single: Forward | None = None, phase: str | None = None
) -> Parallel:
  """Simulates Ulysses sequence parallelism (arXiv 2309.14509).

  Tokens are split except in attention, where heads are. Per layer four all-to-alls (q, k, v there,
  out back): each GPU sends `4 n D (g - 1) / g^2` elements. Nothing overlaps. Weights are whole on
  every GPU, and every GPU launches every kernel. Attention is divided by its heads, all else evenly
  (the reading of weights too, which it should not be).

  Args:
    plan: of one forward.
    gpu: each device.
    gpus: how many.
    single: the forward on one GPU where it is known.
    phase: of a sampling step, None is a usual one.

  Raises:
    ConfigError: for more GPUs than heads.
  """
  check_gpus(plan.card, gpus)
  single = simulate(plan, gpu, phase) if single is None else single
  card = plan.card
  layers = card.layers
  launch_s = gpu.rates.launch_s
  sent = layers * 4.0 * math.prod(plan.grid) * card.width * gpu.itemsize * (gpus - 1) / gpus**2
  uneven = imbalance(plan, gpus, phase) if gpus > 1 else 1.0
  matmuls = len(card.block.matmuls(1)) + (card.text_mode == "cross")
  launches = {
    "attention_s": layers,
    "matmul_s": layers * matmuls,
    "elementwise_s": layers * ELEMENTWISE_LAUNCHES,
  }
  launches["around_s"] = single.launches - sum(launches.values())
  parts = {"communication_s": sent / gpu.rates.link + (gpus > 1) * layers * 4 * launch_s}
  for name, count in launches.items():
    part = getattr(single, name)
    if gpus > 1:
      fixed = min(part, count * launch_s)
      part = fixed + (part - fixed) / gpus * (uneven if name == "attention_s" else 1.0)
    parts[name] = part
  seconds = sum(parts.values())
  return Parallel(
    gpus, seconds, sent_bytes=sent, imbalance=uneven, speedup=single.seconds / seconds, **parts
  )


def parallel_run(
  plan: Plan, gpu: Gpu, gpus: int, steps: int | None = None
) -> tuple[float, dict[str, int]]:
  """Simulates `run_seconds` on several GPUs: each phase with its own work and imbalance."""
  return run_seconds(plan, gpu, steps, lambda phase: parallel(plan, gpu, gpus, phase=phase).seconds)


def parallel_row(plan: Plan, gpu: Gpu, gpus: int, forward: Forward | None = None) -> dict:
  """Returns `row` on several GPUs.

  Counts (FLOPs, bytes of memory traffic) are of the whole forward. `seconds` and its parts are of
  the busiest GPU and add up; `tokens_per_s` and `tflops_per_s` are of all GPUs together;
  `tflops_per_s_per_gpu`, `launches`, `memory_bytes` and `sent_bytes` are of one.
  """
  forward = simulate(plan, gpu) if forward is None else forward
  several = parallel(plan, gpu, gpus, forward)
  parts = ("attention", "around", "matmul", "elementwise", "communication")
  rate = forward.total_flops / several.seconds / 1e12
  return row(plan, gpu, forward) | {
    "gpus": gpus,
    "seconds": several.seconds,
    **{f"{part}_seconds": getattr(several, f"{part}_s") for part in parts},
    "tokens_per_s": math.prod(plan.grid) / several.seconds,
    "tflops_per_s": rate,
    "tflops_per_s_per_gpu": rate / gpus,
    "memory_bytes": memory_bytes(plan, gpus, gpu.itemsize),
    "sent_bytes": several.sent_bytes,
    "imbalance": several.imbalance,
    "speedup_over_one_gpu": several.speedup,
  }
