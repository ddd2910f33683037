"""One forward of a whole model, a denoising run, and their rows: batch 1, the text length of the model's card."""

import collections
import dataclasses
import functools
import math

from freqformer.config import ConfigError
from freqformer.cost import BlockShape, Cost
from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.cost import CallCost, uniform
from freqformer.methods.base import Method
from freqformer.methods.registry import method_class, parse_method, with_fields
from freqformer.simulation.descriptions import Gpu, ModelCard
from freqformer.simulation.roofline import (
  attention_seconds,
  expected_bytes,
  matmul_seconds,
  memory_seconds,
)

ELEMENTWISE_LAUNCHES = 5  # norm + modulate twice, QK-norm + rotary, gated residual twice


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is simulated.

  Attributes:
    card: the model. name: the method as it was asked for. method: its configuration.
    grid: tokens (t, y, x). block: rows of a tile; tile: extents, or None for the best fit.
    unpadded: tokens lie in a row and only the last tile holds padding (see `dense_baseline`).
  """

  card: ModelCard
  name: str
  method: Method
  grid: tuple[int, int, int]
  block: int = 128
  tile: tuple[int, int, int] | None = None
  unpadded: bool = False

  @functools.cached_property
  def layout(self) -> TileLayout:
    if self.unpadded:
      return TileLayout((1, 1, math.prod(self.grid)), (1, 1, self.block), self.block)
    return TileLayout.fit(self.grid, self.block, self.tile)


@dataclasses.dataclass(frozen=True)
class Forward:
  """Counts and seconds of one forward; sums over layers.

  `attention_flops`: scored pairs of self-attention, joint text included. `linear_flops`: all else, cross-attention too.
  `attention_s`, `around_s`, `matmul_s`, `elementwise_s`: the call, the method's work around it, matrix products (and
  cross-attention), norms and the like.
  """

  attention_flops: float
  linear_flops: float
  hbm_bytes: float
  l2_bytes: float
  kv_bytes: float
  attention_bytes: float
  launches: float
  attention_s: float
  around_s: float
  matmul_s: float
  elementwise_s: float
  density: float
  bound: str

  @property
  def total_flops(self) -> float:
    return self.attention_flops + self.linear_flops

  @property
  def seconds(self) -> float:
    return self.attention_s + self.around_s + self.matmul_s + self.elementwise_s


def make_method(text: str) -> Method:
  """A method as a command line names it, `radial` or `block_topk(density=0.2)`, with its defaults otherwise.

  Raises:
    ConfigError: for an unknown name or field, or a value out of range.
  """
  name, fields = parse_method(text)
  return with_fields(method_class(name)(), fields, name, root="")


def dense_baseline(plan: Plan) -> Plan:
  """What speed-ups compare with: dense attention as a kernel like FlashAttention runs it, on n tokens in a row in tiles of 128.

  Our own dense method runs in the buffer that all methods share, whose tiles are boxes of the grid: where these do not divide
  it, it computes the padding as well (13 % more attention on 21x45x80, 27 % on 11x48x85). That stays the row of the method
  `dense`; a ratio against it would credit sparse methods with padding that a user's dense kernel never pays. Where the grid
  fills its tiles both are the same.
  """
  return dataclasses.replace(
    plan, name="dense, unpadded", method=make_method("dense"), block=128, tile=None, unpadded=True
  )


def cubic_grid(tokens: int) -> tuple[int, int, int]:
  """The most cubic factorisation `t <= y <= x` of a number of tokens: least surface."""
  divisors = [d for d in range(1, math.isqrt(tokens) + 1) if tokens % d == 0]
  best = (1, 1, tokens)
  for t in divisors:
    rest = tokens // t
    for y in (d for d in divisors if d >= t and rest % d == 0 and d * d <= rest):
      best = min(best, (t, y, rest // y), key=lambda g: g[0] * g[1] + g[1] * g[2] + g[2] * g[0])
  return best


def simulate(plan: Plan, gpu: Gpu, phase: str | None = None) -> Forward:
  """One forward on one GPU; `phase`: of a sampling step, None is a usual one.

  Raises:
    ConfigError: if the method cannot run on this grid.
  """
  card, shape, n = plan.card, plan.card.block, math.prod(plan.grid)
  try:
    cost = _cost(plan, phase)
    own = method_call(plan.method, plan.layout, card.heads, shape.head_dim, phase)
  except (ValueError, ZeroDivisionError) as error:
    raise ConfigError(
      f"method {plan.name} cannot run on grid {plan.grid} with tiles of {plan.block} rows: {error}"
    ) from error
  call = own if shape.text_mode != "joint" else own + _text_call(shape, n, own)
  seconds = attention_seconds(call, gpu, card.heads)
  attention_bytes = expected_bytes(call, gpu, card.heads)
  size = gpu.itemsize
  around = around_bytes(cost, n, card.width) * size / 2  # counted at 2 bytes per element
  around_s = memory_seconds(around, gpu, cost.launches) + cost.linear_flops / gpu.rates.matmul_flops
  matmul_s = sum(
    matmul_seconds(2.0 * r * k * c, float(size) * (r * k + k * c + r * c), gpu)
    for _, r, k, c in shape.matmuls(n)
  )
  matmul_bytes = shape.matmul_bytes(n, size)
  if shape.text_mode == "cross":
    tiles, text = -(-n // plan.block), -(-shape.text // plan.block)
    cross = uniform(tiles, text, text, shape.head_dim, block=plan.block, heads=card.heads)
    matmul_s += attention_seconds(cross, gpu, card.heads).total
    matmul_bytes += expected_bytes(cross, gpu, card.heads)
  elementwise = shape.elementwise_bytes(n, size)
  ends = 4.0 * n * card.width * card.patch_channels  # patch embedding and final projection
  launches = (
    1 + cost.launches + len(shape.matmuls(n)) + (shape.text_mode == "cross") + ELEMENTWISE_LAUNCHES
  )
  layers = card.layers
  return Forward(
    attention_flops=layers * (cost.attention_flops + shape.text_attention_flops(n)),
    linear_flops=layers * (cost.linear_flops + shape.linear_flops(n)) + ends,
    hbm_bytes=layers * (attention_bytes + around + matmul_bytes + elementwise),
    l2_bytes=layers * call.l2_bytes(gpu.itemsize),
    kv_bytes=layers * call.kv_bytes(gpu.itemsize),
    attention_bytes=layers * attention_bytes,
    launches=layers * launches,
    attention_s=layers * seconds.total,
    around_s=layers * around_s if cost.linear_flops or cost.linear_bytes else 0.0,
    matmul_s=layers * matmul_s + ends / gpu.rates.matmul_flops,
    elementwise_s=layers * memory_seconds(elementwise, gpu, ELEMENTWISE_LAUNCHES),
    density=cost.attention_flops / (4.0 * float(n) ** 2 * card.width),
    bound=seconds.bound,
  )


def _cost(plan: Plan, phase: str | None) -> Cost:
  cost = plan.method.cost if phase is None else functools.partial(plan.method.phase_cost, phase)
  return cost(plan.layout, plan.card.heads, plan.card.block.head_dim)


def _text_call(shape: BlockShape, n: int, like: CallCost) -> CallCost:
  """Joint text in the same launch: every video tile also lists the text tiles, text tiles list all. Pairs are exact."""
  block, tiles = like.block_q, like.rows / shape.heads
  text = -(-shape.text // block)
  video = dataclasses.replace(
    uniform(tiles, text, text, like.head_dim, block=block), rows=0.0, items=0.0
  )
  own = uniform(text, tiles + text, tiles + text, like.head_dim, block=block)
  both = dataclasses.replace(video + own, pairs=2.0 * n * shape.text + shape.text**2).scaled(
    shape.heads
  )
  return dataclasses.replace(both, block_q=like.block_q, block_kv=like.block_kv)


def run_seconds(
  plan: Plan, gpu: Gpu, steps: int | None = None, seconds=None
) -> tuple[float, dict[str, int]]:
  """A denoising run: every step by its own phase (warm-up, searches, reuse), `card.forwards` forwards each.

  Args:
    seconds: of one forward by its phase (None: a usual one); default: `simulate`, on one GPU.

  Returns:
    seconds, and how many steps each phase has.

  Raises:
    ConfigError: if the method's schedule does not fit the number of steps.
  """
  steps = plan.card.steps if steps is None else steps
  plan.method.check_run(steps)
  phases = collections.Counter(plan.method.phase(i, steps) for i in range(steps))
  seconds = seconds or (lambda phase: simulate(plan, gpu, phase).seconds)
  total = sum(count * seconds(phase or None) for phase, count in phases.items())
  return total * plan.card.forwards, dict(phases)


def row(plan: Plan, gpu: Gpu, forward: Forward | None = None) -> dict:
  """The row of one forward: the fields that every row has, then what explains them. Never a measurement."""
  forward = simulate(plan, gpu) if forward is None else forward
  n = math.prod(plan.grid)
  return {
    "model": plan.card.name,
    "method": plan.name,
    "gpu": gpu.name,
    "tokens": n,
    "grid": list(plan.grid),
    "attention_flops": forward.attention_flops,
    "linear_flops": forward.linear_flops,
    "total_flops": forward.total_flops,
    "hbm_bytes": forward.hbm_bytes,
    "seconds": forward.seconds,
    "measured": False,
    "density": forward.density,
    "attention_seconds": forward.attention_s,
    "around_seconds": forward.around_s,
    "matmul_seconds": forward.matmul_s,
    "elementwise_seconds": forward.elementwise_s,
    "attention_bound": forward.bound,
    "attention_hbm_bytes": forward.attention_bytes,
    "l2_bytes": forward.l2_bytes,
    "kv_bytes": forward.kv_bytes,
    "launches": forward.launches,
    "flops_per_byte": forward.total_flops / forward.hbm_bytes,
    "attention_flops_per_byte": forward.attention_flops / forward.attention_bytes,
    "tokens_per_s": n / forward.seconds,
    "tflops_per_s": forward.total_flops / forward.seconds / 1e12,
    "video_seconds": plan.card.video_seconds(plan.grid),
    "rates": gpu.rates_note,
    "rates_fitted": list(gpu.fitted),
    "rates_assumed": list(gpu.assumed),
  }
