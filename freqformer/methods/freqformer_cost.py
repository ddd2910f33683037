"""What a FreqFormer layer costs: exact pairs of each band, and the transforms, pooling and selection around them."""

from freqformer.cost import Cost, attention_cost, selection_cost
from freqformer.layout import TileLayout
from kernels.cost import CallCost, count, uniform


def cost(method, layout: TileLayout, heads, head_dim, allocation=None) -> Cost:
  """Pairs of each band times its share of heads, and the transforms, selection and pooling around them.

  `allocation` defaults to the fixed one, or to the router's prior (also where heads are measured: nothing is known before).
  A mid list is counted with tiles of average length. Counted beside pairs: compression of q, k, v and the lift (per-tile
  matmuls), linear attention of all heads if there is some, pooling and scores of the selection. Not counted: the router
  itself (below 1e-4 of the layer), rotary and norms (every method has them).
  """
  share, tables, n = method.shares(allocation), method.tables(layout), layout.n
  mid_keys = min(method.mid_tiles, layout.tiles) * n / layout.tiles + method.low_shared * tables.spectral.n_coarse
  pairs = (float(tables.low.pairs().sum()), n * mid_keys, float(tables.high.pairs().sum()))
  cells = tables.spectral.n_coarse / layout.tiles
  transform = 4 * 2.0 * n * cells * head_dim * heads
  if method.low_op == "linear":
    transform += 4.0 * tables.spectral.n_coarse * head_dim * (head_dim + 1) * heads
  width, ratio = heads * head_dim, tables.spectral.n_coarse / n
  fused = method.low_op == "dense" and tables.cells is not None
  # Passes over one bf16 [n, D] array, beyond norm and rotary: v in and out, coarse rows and angles, lift in and out; without
  # the kernels around attention: compression 3, packing 3 in and 3 out, lift and sum 3 (benchmarks/memory_bound.py).
  passes = 4.4 + 4.0 * ratio if fused else 12.0
  around = Cost(linear_flops=transform, linear_bytes=2.0 * passes * n * width, launches=2 if fused else 4)
  around += selection_cost(n, layout.tiles, heads, head_dim, 0.0 if fused else 2.0)
  return attention_cost(heads * float(share @ pairs), head_dim) + around


def call_cost(method, layout: TileLayout, heads, head_dim, allocation=None) -> CallCost:
  """The packed buffer's lists: low and high exactly, mid with tiles of average fill and unions of random lists."""
  tables, share = method.tables(layout), method.shares(allocation)
  listed = min(method.mid_tiles, layout.tiles) + method.low_shared * tables.coarse_tiles
  mid = uniform(
    layout.tiles, listed, tables.low.kv_tiles, head_dim, block=layout.block, fill=layout.fill, heads=heads * share[1]
  )
  low, high = (count(m, head_dim).scaled(heads * share[i]) for i, m in ((0, tables.low), (2, tables.high)))
  return low + mid + high
