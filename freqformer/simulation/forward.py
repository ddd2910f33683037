"""One forward of a whole model on one GPU, batch 1, with the text of the model's card."""

import dataclasses
import functools
import math

from freqformer.config import ConfigError
from freqformer.cost import layer_cost
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
    name: of the method as it was asked for.
    grid: tokens (t, y, x).
    block: rows of a tile.
    unpadded: tokens lie in a row and only the last tile holds padding (see `dense_baseline`).
  """

  card: ModelCard
  name: str
  method: Method
  grid: tuple[int, int, int]
  block: int = 128
  unpadded: bool = False

  @functools.cached_property
  def layout(self) -> TileLayout:
    if self.unpadded:
      return TileLayout((1, 1, math.prod(self.grid)), (1, 1, self.block), self.block)
    return TileLayout.fit(self.grid, self.block)


@dataclasses.dataclass(frozen=True)
class Forward:
  """Counts of one forward, summed over layers, and seconds of the busiest GPU; as rows name them.

  Attributes:
    attention_flops: of scored pairs of self-attention, joint text included.
    linear_flops: of all else, cross-attention too.
    density: scored pairs over all pairs of tokens.
    around_seconds: of the method's work around its attention calls.
    matmul_seconds: of matrix products and cross-attention.
    elementwise_seconds: of norms and the like.
    attention_bound: what limits attention: "compute", "l2" or "hbm".
    kv_bytes: k and v among the bytes through L2, of self-attention.
    launches: of all kernels, on each GPU.
    communication_seconds: of all-to-alls; each GPU sends `sent_bytes`.
    imbalance: attention of the busiest GPU over the mean.
  """

  attention_flops: float
  linear_flops: float
  hbm_bytes: float
  density: float
  attention_seconds: float
  around_seconds: float
  matmul_seconds: float
  elementwise_seconds: float
  attention_bound: str
  attention_hbm_bytes: float
  l2_bytes: float
  kv_bytes: float
  launches: float
  gpus: int = 1
  communication_seconds: float = 0.0
  sent_bytes: float = 0.0
  imbalance: float = 1.0
  speedup_over_one_gpu: float = 1.0

  @property
  def total_flops(self) -> float:
    return self.attention_flops + self.linear_flops

  @property
  def seconds(self) -> float:
    computing = self.attention_seconds + self.around_seconds + self.matmul_seconds
    return computing + self.elementwise_seconds + self.communication_seconds


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

  Its n tokens lie in a row in tiles of 128. Our own dense method computes the padding of its tiles
  as well (13 % more attention on 21x45x80, 27 % on 11x48x85): a ratio against it would credit
  sparse methods with padding that a user's dense kernel never pays.
  """
  return dataclasses.replace(
    plan, name="dense, unpadded", method=make_method("dense"), block=128, unpadded=True
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
  n = math.prod(plan.grid)
  size = gpu.itemsize
  sizes = (plan.layout, card.heads, card.head_dim)
  try:
    cost = layer_cost(plan.method, *sizes, phase=phase)
    call = attention_call(plan.method, *sizes, phase=phase)
    traffic = around_attention(plan.method, *sizes, phase=phase)
  except (ValueError, ZeroDivisionError) as error:
    raise ConfigError(
      f"method {plan.name} cannot run on grid {plan.grid} with tiles of {plan.block} rows: {error}"
    ) from error
  if card.text_mode == "joint":
    call += _text_call(card, n, call)
  attention = attention_seconds(call, gpu, card.heads)
  attention_bytes = expected_bytes(call, gpu, card.heads)
  around_bytes = traffic.bytes * size / 2  # counted at 2 bytes per element
  around_s = 0.0
  if cost.linear_flops or traffic.bytes:
    around_s = cost.linear_flops / gpu.rates.matmul_flops
    around_s += memory_seconds(around_bytes, gpu, traffic.launches)
  products = card.matmuls(n)
  launches = 1 + traffic.launches + ELEMENTWISE_LAUNCHES + len(products)
  matmul_bytes = 0.0
  matmul_s = 0.0
  for _, rows, inner, columns in products:
    moved = float(size) * (rows * inner + inner * columns + rows * columns)
    matmul_bytes += moved
    matmul_s += matmul_seconds(2.0 * rows * inner * columns, moved, gpu)
  if card.text_mode == "cross":
    text = -(-card.text // plan.block)
    cross = uniform(
      -(-n // plan.block), text, text, card.head_dim, block=plan.block, heads=card.heads
    )
    launches += 1
    matmul_bytes += expected_bytes(cross, gpu, card.heads)
    matmul_s += attention_seconds(cross, gpu, card.heads).total
  elementwise = card.elementwise_bytes(n, size)
  ends = 4.0 * n * card.width * card.patch_channels  # patch embedding and final projection
  layers = card.layers
  return Forward(
    attention_flops=layers * (cost.attention_flops + card.text_attention_flops(n)),
    linear_flops=layers * (cost.linear_flops + card.linear_flops(n)) + ends,
    hbm_bytes=layers * (attention_bytes + around_bytes + matmul_bytes + elementwise),
    density=cost.attention_flops / (4.0 * float(n) ** 2 * card.width),
    attention_seconds=layers * attention.total,
    around_seconds=layers * around_s,
    matmul_seconds=layers * matmul_s + ends / gpu.rates.matmul_flops,
    elementwise_seconds=layers * memory_seconds(elementwise, gpu, ELEMENTWISE_LAUNCHES),
    attention_bound=attention.bound,
    attention_hbm_bytes=layers * attention_bytes,
    l2_bytes=layers * call.l2_bytes(size),
    kv_bytes=layers * call.kv_bytes(size),
    launches=layers * launches,
  )


def _text_call(card: ModelCard, n: int, like: CallCost) -> CallCost:
  """Counts joint text in the same launch: video lists the text tiles, text lists all tiles."""
  block = like.block_q
  tiles = like.rows / card.heads
  text = -(-card.text // block)
  video = uniform(tiles, text, text, like.head_dim, block=block)
  video = dataclasses.replace(video, rows=0.0, items=0.0)
  own = uniform(text, tiles + text, tiles + text, like.head_dim, block=block)
  exact = 2.0 * n * card.text + card.text**2
  scaled = dataclasses.replace(video + own, pairs=exact).scaled(card.heads)
  return dataclasses.replace(scaled, block_q=like.block_q, block_kv=like.block_kv)
