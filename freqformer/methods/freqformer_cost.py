"""What a FreqFormer layer costs: exact pairs of each band, and the transforms, pooling and selection around them."""

from freqformer.cost import Cost, attention_cost
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
  selection = heads * head_dim * (2.0 * n + 2.0 * layout.tiles**2)
  # Passes over one bf16 [n, D] array: pooling reads 2, compression 3, packing 3 in and 3 out, lift and sum 3.
  around = Cost(linear_flops=transform + selection, linear_bytes=14.0 * 2 * n * heads * head_dim, launches=5)
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
