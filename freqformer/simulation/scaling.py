"""Memory of a forward, the largest video that fits, several GPUs; the rows of all of it."""

import bisect
import collections
import dataclasses
import math

import jax
import numpy as np

from freqformer.config import ConfigError
from freqformer.cost import DENSE
from freqformer.grid.layout import MOST_ROWS
from freqformer.methods.allocation import deal_heads
from freqformer.methods.base import Dims
from freqformer.model.schedule import DenseSchedule, check_dense
from freqformer.simulation.descriptions import Gpu, known, load_gpu
from freqformer.simulation.forward import ELEMENTWISE_LAUNCHES, Forward, Plan, make_method, simulate

# ---- memory --------------------------------------------------------------------------------------


def memory_bytes(plan: Plan, gpus: int = 1, itemsize: int = 2) -> float:
  """Returns the least device memory of one forward at batch 1, on each of `gpus`.

  Weights (`itemsize` bytes per parameter, on every GPU) + the residual stream and q, k, v in the
  padded buffer, 4 D per row (out overwrites q, the MLP runs by chunks of tokens, norms and rotary
  are fused) + LSE + the method's state of all layers, these divided over sequence-parallel GPUs. A
  closed form: no table is built. Not counted: text encoder, video codec, workspace, fragmentation.
  A plain program that keeps every intermediate of a layer needs about 2.5 times as much in addition
  to the weights.

  Raises:
    ValueError: for a grid that int32 cannot index.
  """
  card = plan.card
  rows = card.rows(plan.layout.n_buffer)
  activations = 4.0 * rows * card.width * itemsize + 4.0 * rows * card.heads
  dims = Dims(card.heads, card.head_dim, card.width)
  state = jax.eval_shape(lambda: plan.method.init_state(1, dims, plan.layout))
  remembered = card.layers * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  return float(itemsize) * card.parameters + (activations + remembered) / gpus


def fits(plan: Plan, gpu: Gpu, gpus: int = 1) -> bool:
  """True if a forward fits; a grid that int32 cannot index fits nowhere."""
  try:
    return memory_bytes(plan, gpus, gpu.itemsize) <= gpu.memory_bytes
  except ValueError:
    return False


def check_fits(plan: Plan, gpu: Gpu, gpus: int = 1) -> None:
  """Raises ConfigError if a forward cannot fit: by how much, and what would."""
  try:
    needed = memory_bytes(plan, gpus, gpu.itemsize)
    text = (
      f"{plan.card.name} with {plan.name} on {math.prod(plan.grid):,} tokens needs at least "
      f"{needed / 1e9:,.1f} GB on each of {gpus} x {gpu.name} ({gpu.memory_bytes / 1e9:,.0f} GB): "
      f"{(needed - gpu.memory_bytes) / 1e9:,.1f} GB too much"
    )
  except ValueError as error:
    needed = math.inf
    text = str(error)
  if needed > gpu.memory_bytes:
    raise ConfigError(f"{text}. What fits: {' or '.join(_options(plan, gpu, gpus))}.")


def _options(plan: Plan, gpu: Gpu, gpus: int) -> list[str]:
  """Returns arguments with which a forward fits: more GPUs, another GPU, a smaller grid."""
  more = [g for g in range(gpus + 1, plan.card.heads + 1) if fits(plan, gpu, g)]
  options = [f"--gpus={g}" for g in more[:1]]
  larger = [g for g in map(load_gpu, known("gpus")) if fits(plan, g, gpus)]
  larger.sort(key=lambda g: g.memory_bytes)
  options += [f"--gpu={g.name}" for g in larger[:1]]
  own_frame = dataclasses.replace(plan, grid=plan.card.grid)
  largest = largest_video(plan, gpu, gpus) or largest_video(own_frame, gpu, gpus)
  if largest is not None:
    options.append(f"--grid={','.join(map(str, largest))} ({math.prod(largest):,} tokens)")
  return options or ["a smaller model"]


def largest_video(plan: Plan, gpu: Gpu, gpus: int = 1) -> tuple[int, int, int] | None:
  """Returns the longest grid with this plan's frame size that fits; None: not even one frame."""

  def too_long(frames):
    longer = dataclasses.replace(plan, grid=(frames, *plan.grid[1:]))
    return not fits(longer, gpu, gpus)

  frames = bisect.bisect_left(range(1, MOST_ROWS), True, key=too_long)
  return (frames, *plan.grid[1:]) if frames else None


# ---- several GPUs --------------------------------------------------------------------------------


def imbalance(plan: Plan, gpus: int, phase: str | None = None) -> float:
  """Returns attention of the busiest GPU over the mean; whole heads are dealt (`deal_heads`).

  Heads differ where a method deals them to branches of different cost; the shares are the method's
  own expectation. Heads that differ by what the data ask for (AdaSpa's levels, spatial and temporal
  heads) are taken as alike, hence too fast.
  """
  heads = plan.card.heads
  method = plan.method
  if method.branches:
    each = [
      method.pairs(plan.layout, 1, tuple(alone), phase).pairs
      for alone in np.eye(len(method.branches))
    ]
    edges = np.round(np.cumsum(method.shares(heads)) * heads)
    pairs = np.array(each)[np.searchsorted(edges, np.arange(heads), side="right")]
  else:
    pairs = np.full(heads, method.pairs(plan.layout, 1, phase=phase).pairs)
  loads = np.array([pairs[heads].sum() for heads in deal_heads(pairs, gpus)])
  return float(loads.max() / loads.mean()) if loads.any() else 1.0


def parallel(plan: Plan, gpu: Gpu, gpus: int = 1, phase: str | None = None) -> Forward:
  """Simulates Ulysses sequence parallelism (arXiv 2309.14509) on at most as many GPUs as heads.

  Tokens are split except in attention, where heads are. Per layer four all-to-alls (q, k, v there,
  out back): each GPU sends `4 n D (g - 1) / g^2` elements. Nothing overlaps. Weights are whole on
  every GPU, and every GPU launches every kernel. Attention is divided by its heads, all else evenly
  (the reading of weights too, which it should not be). `phase`: of a sampling step.
  """
  single = simulate(plan, gpu, phase)
  if gpus == 1:
    return single
  card = plan.card
  layers = card.layers
  launch_s = gpu.rates.launch_s
  sent = layers * 4.0 * math.prod(plan.grid) * card.width * gpu.itemsize * (gpus - 1) / gpus**2
  uneven = imbalance(plan, gpus, phase)
  launches = {
    "attention_seconds": layers,
    "matmul_seconds": layers * (len(card.matmuls(1)) + (card.text_mode == "cross")),
    "elementwise_seconds": layers * ELEMENTWISE_LAUNCHES,
  }
  launches["around_seconds"] = single.launches - sum(launches.values())
  parts = {"communication_seconds": sent / gpu.rates.link + layers * 4 * launch_s}
  for name, count in launches.items():
    alone = getattr(single, name)
    fixed = min(alone, count * launch_s)
    share = uneven / gpus if name == "attention_seconds" else 1 / gpus
    parts[name] = fixed + (alone - fixed) * share
  several = dataclasses.replace(single, gpus=gpus, sent_bytes=sent, imbalance=uneven, **parts)
  return dataclasses.replace(several, speedup_over_one_gpu=single.seconds / several.seconds)


def denoising_run(
  plan: Plan,
  gpu: Gpu,
  gpus: int = 1,
  steps: int | None = None,
  schedule: DenseSchedule | None = None,
) -> dict:
  """Simulates a denoising run: every step by its own phase, `card.forwards` forwards each.

  Args:
    steps: None: the card's.
    schedule: steps and layers that are dense in the method's place; None: none.

  Returns:
    the fields `run_seconds`, of the busiest GPU; `run_flops`, of all forwards; and `run_phases`,
    how many steps have each phase, "dense" where no layer runs the method.

  Raises:
    ConfigError: if the method's schedule, or `schedule`, does not fit the number of steps.
  """
  card = plan.card
  method = plan.method
  steps = card.steps if steps is None else steps
  schedule = schedule or DenseSchedule()
  method.check_run(steps)
  dense_steps = schedule.evaluations(steps)
  share = len(schedule.layers(card.layers)) / card.layers
  phases = collections.Counter()
  for i in range(steps):
    phase = method.phase(i, steps)
    if share:
      check_dense(method, method.usual_phase, i, steps)
    if i in dense_steps:
      check_dense(method, phase, i, steps)
      phase = DENSE
    phases[phase] += 1
  seconds = 0.0
  flops = 0.0
  for phase, count in phases.items():
    dense = 1.0 if phase == DENSE else share
    if dense:  # the same tiles, without the method
      alone = dataclasses.replace(plan, name=DENSE, method=make_method(DENSE))
      found = parallel(alone, gpu, gpus)
      seconds += count * dense * found.seconds
      flops += count * dense * found.total_flops
    if dense < 1:
      found = parallel(plan, gpu, gpus, phase or None)
      seconds += count * (1 - dense) * found.seconds
      flops += count * (1 - dense) * found.total_flops
  return {
    "run_seconds": seconds * card.forwards,
    "run_flops": flops * card.forwards,
    "run_phases": dict(phases),
  }


# ---- rows ----------------------------------------------------------------------------------------

TOTALS = ("attention_flops", "linear_flops", "total_flops", "hbm_bytes", "seconds")


def row(plan: Plan, gpu: Gpu, gpus: int = 1) -> dict:
  """Returns the row of one forward; it is never a measurement.

  Counts (FLOPs, bytes of memory traffic) are of the whole forward. `seconds` and its parts are of
  the busiest GPU and add up; `tokens_per_s` and `tflops_per_s` are of all GPUs together;
  `tflops_per_s_per_gpu`, `launches`, `memory_bytes` and `sent_bytes` are of one.
  """
  found = parallel(plan, gpu, gpus)
  rate = found.total_flops / found.seconds / 1e12
  return _asked(plan, gpu) | {
    **{name: getattr(found, name) for name in TOTALS},
    "measured": False,
    **dataclasses.asdict(found),
    "flops_per_byte": found.total_flops / found.hbm_bytes,
    "attention_flops_per_byte": found.attention_flops / found.attention_hbm_bytes,
    "tokens_per_s": math.prod(plan.grid) / found.seconds,
    "tflops_per_s": rate,
    "tflops_per_s_per_gpu": rate / gpus,
    "memory_bytes": memory_bytes(plan, gpus, gpu.itemsize),
    "video_seconds": plan.card.video_seconds(plan.grid),
    "rates": gpu.rates_note,
    "rates_fitted": list(gpu.fitted),
    "rates_assumed": list(gpu.assumed),
  }


def refused_row(plan: Plan, gpu: Gpu, gpus: int, reason: str) -> dict:
  """Returns the row of what cannot run: no totals, and `error`."""
  refused = {"measured": False, "gpus": gpus, "error": reason}
  return _asked(plan, gpu) | dict.fromkeys(TOTALS) | refused


def _asked(plan: Plan, gpu: Gpu) -> dict:
  return {
    "model": plan.card.name,
    "method": plan.name,
    "gpu": gpu.name,
    "tokens": math.prod(plan.grid),
    "grid": list(plan.grid),
  }
