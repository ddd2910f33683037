"""What fits, and what more GPUs bring: memory of a forward, the largest video, sequence parallelism with its communication."""

import dataclasses
import math

import jax
import numpy as np

from freqformer.config import ConfigError
from freqformer.methods.base import Dims
from freqformer.simulation.descriptions import Gpu
from freqformer.simulation.forward import Forward, Plan, simulate


def state_bytes(plan: Plan) -> float:
  """What the method remembers between denoising steps, all layers, as its own `init_state` would allocate it."""
  card = plan.card
  dims = Dims(card.heads, card.block.head_dim, card.width)
  state = jax.eval_shape(lambda: plan.method.init_state(1, dims, plan.layout))
  return float(card.layers * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)))


def memory_bytes(plan: Plan, gpus: int = 1) -> float:
  """Least device memory per GPU of one forward at batch 1, bf16.

  Weights (2 bytes per parameter, on every GPU) + the residual stream and q, k, v in the layout's padded buffer, 4 D per
  row (out overwrites q, the MLP runs by chunks of tokens, norms and rotary are fused) + LSE + the method's state, these
  divided over sequence-parallel GPUs. Not counted: text encoder, video codec, workspace, fragmentation: a plain program
  that keeps every intermediate of a layer needs about 2.5 times as much beside the weights.
  """
  card, rows = plan.card, plan.layout.n_buffer + plan.card.text * (plan.card.text_mode == "joint")
  activations = 4.0 * rows * card.width * 2 + 4.0 * rows * card.heads
  return 2.0 * card.parameters + (activations + state_bytes(plan)) / gpus


def check_fits(plan: Plan, gpu: Gpu, gpus: int = 1):
  """Raises ConfigError if a forward cannot fit: by how much, and what would."""
  needed = memory_bytes(plan, gpus)
  if needed <= gpu.memory_bytes:
    return
  text = (
    f"{plan.card.name} with {plan.name} on {math.prod(plan.grid):,} tokens needs at least {needed / 1e9:.1f} GB on each of "
    f"{gpus} x {gpu.name} ({gpu.memory_bytes / 1e9:.0f} GB): {(needed - gpu.memory_bytes) / 1e9:.1f} GB too much"
  )
  enough = next((g for g in (2, 4, 8, 16, 32, 64) if g > gpus and memory_bytes(plan, g) <= gpu.memory_bytes), None)
  largest = largest_video(plan, gpu, gpus)
  options = [f"--gpus={enough}"] if enough else []
  if largest is not None:
    options.append(f"at most {math.prod(largest):,} tokens (grid {'x'.join(map(str, largest))})")
  raise ConfigError(f"{text}. What fits: {' or '.join(options) or 'a GPU with more memory'}.")


def largest_video(plan: Plan, gpu: Gpu, gpus: int = 1) -> tuple[int, int, int] | None:
  """The longest grid with this plan's frame size that fits, None if not even one frame does; by bisection over t."""
  at = lambda t: dataclasses.replace(plan, grid=(t, *plan.grid[1:]), tile=None)
  fits = lambda t: memory_bytes(at(t), gpus) <= gpu.memory_bytes
  if not fits(1):
    return None
  low, high = 1, 2
  while fits(high):
    low, high = high, 2 * high
    if at(high).grid[0] * math.prod(plan.grid[1:]) > 1 << 28:
      break
  while high - low > 1:
    mid = (low + high) // 2
    low, high = (mid, high) if fits(mid) else (low, mid)
  return at(low).grid


def imbalance(plan: Plan, gpus: int) -> float:
  """Attention of the busiest GPU over the mean when whole heads are dealt, dearest first, each to the least loaded GPU.

  Heads differ where a method deals them to branches of different cost; the shares are the method's own expectation.
  """
  costs = sorted(head_costs(plan), reverse=True)
  loads = np.zeros(gpus)
  for cost in costs:
    loads[loads.argmin()] += cost
  return float(loads.max() / loads.mean())


def head_costs(plan: Plan) -> list[float]:
  """Attention FLOPs of each head of a layer."""
  card, method, names = plan.card, plan.method, plan.method.branches
  each = lambda allocation: method.cost(plan.layout, 1, card.block.head_dim, allocation).attention_flops
  if not names:
    return [each(None)] * card.heads
  branch = [each(tuple(float(i == j) for j in range(len(names)))) for i in range(len(names))]
  prior = method.allocation if isinstance(method.allocation, tuple) else method.router.prior
  edges = np.round(np.cumsum(np.asarray(prior, float)) / sum(prior) * card.heads).astype(int)
  return [branch[int(np.searchsorted(edges, i, side="right"))] for i in range(card.heads)]


@dataclasses.dataclass(frozen=True)
class Parallel:
  """One forward on several GPUs: seconds, bytes that each sends, and the speed-up over one."""

  gpus: int
  seconds: float
  communication_s: float
  sent_bytes: float
  imbalance: float
  speedup: float


def parallel(plan: Plan, gpu: Gpu, gpus: int, single: Forward | None = None) -> Parallel:
  """Ulysses sequence parallelism (arXiv 2309.14509): tokens are split but for attention, where heads are.

  Per layer four all-to-alls (q, k, v there, out back): each GPU sends `4 n D (g - 1) / g^2` elements. Nothing overlaps. Weights
  are whole on every GPU.

  Raises:
    ConfigError: for more GPUs than heads.
  """
  if not 1 <= gpus <= plan.card.heads:
    raise ConfigError(f"gpus={gpus} must lie in 1..{plan.card.heads}, the heads of {plan.card.name}: each needs a whole head.")
  single = simulate(plan, gpu) if single is None else single
  if gpus == 1:
    return Parallel(1, single.seconds, 0.0, 0.0, 1.0, 1.0)
  card, n = plan.card, math.prod(plan.grid)
  sent = card.layers * 4.0 * n * card.width * 2 * (gpus - 1) / gpus**2
  uneven = imbalance(plan, gpus)
  communication = sent / gpu.rates.link + card.layers * 4 * gpu.rates.launch_s
  rest = (single.around_s + single.matmul_s + single.elementwise_s) / gpus
  seconds = single.attention_s / gpus * uneven + rest + communication
  return Parallel(gpus, seconds, communication, sent, uneven, single.seconds / seconds)
