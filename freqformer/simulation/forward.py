"""One forward of a whole model, a denoising run, and their rows.

Batch 1, with the text of the model's card.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable

from freqformer.config import ConfigError
from freqformer.cost import BlockShape, layer_cost
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
from freqformer.simulation.traffic import around_attention

ELEMENTWISE_LAUNCHES = 5  # norm + modulate twice, QK-norm + rotary, gated residual twice


@dataclasses.dataclass(frozen=True)
class Plan:
  """A model, a method and a grid to be simulated.

  Attributes:
    card: the model.
    name: of the method as it was asked for.
    method: its configuration.
    grid: tokens (t, y, x).
    block: rows of a tile.
    tile: extents of a tile, or None for the best fit.
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

  Attributes:
    attention_flops: of scored pairs of self-attention, joint text included.
    linear_flops: of all else, cross-attention too.
    hbm_bytes: through device memory.
    l2_bytes: through L2, of self-attention.
    kv_bytes: k and v among them.
    attention_bytes: through device memory, of self-attention.
    launches: of all kernels.
    attention_s: seconds of the attention calls.
    around_s: of the method's work around them.
    matmul_s: of matrix products and cross-attention.
    elementwise_s: of norms and the like.
    density: scored pairs over all pairs of tokens.
    bound: what limits attention: "compute", "l2" or "hbm".
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
  """Builds a method as a command line names it: `radial`, or `block_topk(density=0.2)`.

  Raises:
    ConfigError: for an unknown name or field, or a value out of range.
  """
  name, fields = parse_method(text)
  return with_fields(method_class(name)(), fields, name, root="")


def attention_call(
  method: Method,
  layout: TileLayout,
  heads: int,
  head_dim: int,
  allocation: tuple[float, ...] | None = None,
  phase: str | None = None,
) -> CallCost:
  """Returns the attention of a layer as one call; arguments as those of `layer_cost`."""
  call = method.pairs(layout, heads, allocation, phase)
  return dataclasses.replace(call, head_dim=head_dim)


def dense_baseline(plan: Plan) -> Plan:
  """Returns what speed-ups compare with: dense attention as a kernel like FlashAttention runs it.

  Its n tokens lie in a row in tiles of 128. Our own dense method runs in the buffer that all
  methods
  share, whose tiles are boxes of the grid: where these do not divide it, it computes the padding as
  well (13 % more attention on 21x45x80, 27 % on 11x48x85). That stays the row of the method
  `dense`; a ratio against it would credit sparse methods with padding that a user's dense kernel
  never pays. Where the grid fills its tiles both are the same.
  """
  return dataclasses.replace(
    plan, name="dense, unpadded", method=make_method("dense"), block=128, tile=None, unpadded=True
  )


def cubic_grid(tokens: int) -> tuple[int, int, int]:
  """Returns the factorisation `t <= y <= x` of a number of tokens with the least surface."""

  def surface(grid):
    t, y, x = grid
    return t * y + y * x + x * t

  divisors = [d for d in range(1, math.isqrt(tokens) + 1) if tokens % d == 0]
  best = (1, 1, tokens)
  for t in divisors:
    rest = tokens // t
    for y in divisors:
      if y >= t and rest % y == 0 and y * y <= rest:
        best = min(best, (t, y, rest // y), key=surface)
  return best


def simulate(plan: Plan, gpu: Gpu, phase: str | None = None) -> Forward:
  """Returns one forward on one GPU; `phase`: of a sampling step, None is a usual one.

  Raises:
    ConfigError: if the method cannot run on this grid.
  """
  card = plan.card
  shape = card.block
  n = math.prod(plan.grid)
  size = gpu.itemsize
  sizes = (plan.layout, card.heads, shape.head_dim)
  try:
    cost = layer_cost(plan.method, *sizes, phase=phase)
    call = attention_call(plan.method, *sizes, phase=phase)
    traffic = around_attention(plan.method, *sizes, cost, phase=phase)
  except (ValueError, ZeroDivisionError) as error:
    raise ConfigError(
      f"method {plan.name} cannot run on grid {plan.grid} with tiles of {plan.block} rows: {error}"
    ) from error
  if shape.text_mode == "joint":
    call += _text_call(shape, n, call)
  seconds = attention_seconds(call, gpu, card.heads)
  attention_bytes = expected_bytes(call, gpu, card.heads)
  around = traffic.bytes * size / 2  # counted at 2 bytes per element
  around_s = 0.0
  if cost.linear_flops or traffic.bytes:
    around_s = cost.linear_flops / gpu.rates.matmul_flops
    around_s += memory_seconds(around, gpu, traffic.launches)
  products = shape.matmuls(n)
  matmul_bytes = shape.matmul_bytes(n, size)
  matmul_s = 0.0
  for _, rows, inner, columns in products:
    moved = float(size) * (rows * inner + inner * columns + rows * columns)
    matmul_s += matmul_seconds(2.0 * rows * inner * columns, moved, gpu)
  if shape.text_mode == "cross":
    text = -(-shape.text // plan.block)
    cross = uniform(
      -(-n // plan.block), text, text, shape.head_dim, block=plan.block, heads=card.heads
    )
    matmul_s += attention_seconds(cross, gpu, card.heads).total
    matmul_bytes += expected_bytes(cross, gpu, card.heads)
  elementwise = shape.elementwise_bytes(n, size)
  ends = 4.0 * n * card.width * card.patch_channels  # patch embedding and final projection
  launches = 1 + traffic.launches + ELEMENTWISE_LAUNCHES
  launches += len(products) + (shape.text_mode == "cross")
  layers = card.layers
  return Forward(
    attention_flops=layers * (cost.attention_flops + shape.text_attention_flops(n)),
    linear_flops=layers * (cost.linear_flops + shape.linear_flops(n)) + ends,
    hbm_bytes=layers * (attention_bytes + around + matmul_bytes + elementwise),
    l2_bytes=layers * call.l2_bytes(size),
    kv_bytes=layers * call.kv_bytes(size),
    attention_bytes=layers * attention_bytes,
    launches=layers * launches,
    attention_s=layers * seconds.total,
    around_s=layers * around_s,
    matmul_s=layers * matmul_s + ends / gpu.rates.matmul_flops,
    elementwise_s=layers * memory_seconds(elementwise, gpu, ELEMENTWISE_LAUNCHES),
    density=cost.attention_flops / (4.0 * float(n) ** 2 * card.width),
    bound=seconds.bound,
  )


def _text_call(shape: BlockShape, n: int, like: CallCost) -> CallCost:
  """Counts joint text in the same launch; pairs are exact.

  Every video tile also lists the text tiles, text tiles list all tiles.
  """
  block = like.block_q
  tiles = like.rows / shape.heads
  text = -(-shape.text // block)
  video = uniform(tiles, text, text, like.head_dim, block=block)
  video = dataclasses.replace(video, rows=0.0, items=0.0)
  own = uniform(text, tiles + text, tiles + text, like.head_dim, block=block)
  both = dataclasses.replace(video + own, pairs=2.0 * n * shape.text + shape.text**2)
  scaled = both.scaled(shape.heads)
  return dataclasses.replace(scaled, block_q=like.block_q, block_kv=like.block_kv)


def run_seconds(
  plan: Plan,
  gpu: Gpu,
  steps: int | None = None,
  seconds: Callable[[str | None], float] | None = None,
) -> tuple[float, dict[str, int]]:
  """Simulates a denoising run: every step by its own phase, `card.forwards` forwards each.

  Args:
    plan: of one forward.
    gpu: the device.
    steps: of the run; None: the card's.
    seconds: of one forward by its phase (None: a usual one); default: `simulate`, on one GPU.

  Returns:
    seconds, and how many steps each phase has.

  Raises:
    ConfigError: if the method's schedule does not fit the number of steps.
  """
  steps = plan.card.steps if steps is None else steps
  plan.method.check_run(steps)
  phases = collections.Counter(plan.method.phase(i, steps) for i in range(steps))
  if seconds is None:

    def seconds(phase):
      return simulate(plan, gpu, phase).seconds

  total = sum(count * seconds(phase or None) for phase, count in phases.items())
  return total * plan.card.forwards, dict(phases)


def row(plan: Plan, gpu: Gpu, forward: Forward | None = None) -> dict:
  """Returns the row of one forward; it is never a measurement."""
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
