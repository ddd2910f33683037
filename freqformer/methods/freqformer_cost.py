"""What a FreqFormer layer costs: exact pairs of each band, and the transforms, selection, summaries and router around them.

Of an evaluation (or of a step under fixed heads) as the layer runs on Hopper: where the kernels around attention take the call
(`_form`) by them, else by XLA. Products are counted once and without padding: not the kernels' second term of a matrix, not
their rows beyond a tile's cells. Bytes and launches are those of the program compiled for an H100
(`python -m benchmarks.compiled.layer_traffic`; docs/log.md), in passes over one bf16 `[n, D]` array. Not counted: norm and rotary
(every method has them, `BlockShape.elementwise_bytes`); softmaxes, gates and sums of outputs, as FLOPs.
"""

import dataclasses

from freqformer.cost import Cost, attention_cost, selection_cost
from freqformer.grid.layout import TileLayout
from freqformer.grid.sizes import TransformSizes
from freqformer.kernels.around.prepare import BLOCKS, HEAD_DIMS, MAX_CELLS
from freqformer.kernels.block_sparse.cost import CONCURRENT, CallCost, uniform
from freqformer.tables.window import count_window

_FILTERED = {"none": 0, "v": 1, "qkv": 3}  # arrays
# Passes beyond norm and rotary, which `elementwise_bytes` has, by who does it: the kernels (v in and out, which other methods'
# layers move uncounted; angles, lift in and out; coarse rows four times more), XLA in tiles (of 16 cells; `memory_bound --xla`)
# or along whole axes: transforms, packing, lift and sum.
_PASSES = {"kernels": 4.4, "tiles": 17.0, "axes": 48.0}
_LAUNCHES = {"kernels": 1, "tiles": 16, "axes": 32}  # beside the selection's
_FILTER_PASSES = {"kernels": (0, 0), "tiles": (11, 35), "axes": (47, 151)}  # of v; of q, k and v
_FILTER_LAUNCHES = {"kernels": (1, 1), "tiles": (5, 13), "axes": (19, 58)}
_XLA_LIFT, _LINEAR_LAUNCHES = 2.9, 3  # more than with the kernel, where low bands are linear
_SUMMARY_PASSES, _PER_SUMMARY = {"kernels": 52.0, "tiles": 52.0, "axes": 130.0}, 0.64
_SUMMARY_LAUNCHES = {"kernels": 57, "tiles": 57, "axes": 80}
_STATISTICS_PASSES, _STATISTICS_LAUNCHES = {"kernels": 4.75, "tiles": 4.75, "axes": 12.2}, 11


def cost(method, layout: TileLayout, heads, head_dim, allocation=None) -> Cost:
  """Pairs of each band times its share of heads, and what lies around them.

  `allocation` defaults to the fixed one, or to the router's prior (also where heads are measured: nothing is known before).
  A mid list is counted with tiles of average length. Around, for n tokens of D channels in T tiles, with k cells and m rows
  of the box to a tile of e tokens: `2 n k D` for each of q, k, v (compression) and the output (lift; the kernel's of low heads
  alone); for each filtered array `2 n e D` of mid and high heads by the kernel, `4 n (k + m) D` (P_low and P_box) by XLA;
  `4 n_coarse D (d + 1)` for a linear low band, of all heads; means and scores of the selection; summaries and router by
  their own functions. Transforms of whole axes cost their sums of products (`TransformSizes`).
  """
  share, sizes = method.shares(heads, allocation), TransformSizes.of(method.basis, layout)
  form = _form(sizes, layout, head_dim)
  n, width, arrays = layout.n, heads * head_dim, _FILTERED[method.filter]
  shared = method.low_shared * n * sizes.n_coarse
  mid = n * min(method.mid_tiles, layout.tiles) * n / layout.tiles
  linear, kernels = method.low_op == "linear", form == "kernels"
  low, high = (
    (not linear) * float(sizes.n_coarse) ** 2,
    count_window(layout, method.window, method.border).pairs,
  )
  pairs = (low, mid + shared, high + shared)
  flops = 3 * sizes.reduce(sizes.cells) + (
    float(share[0]) if kernels and not linear else 1.0
  ) * sizes.expand(sizes.cells)
  flops += arrays * (
    float(1 - share[0]) * sizes.reduce(sizes.tokens) if kernels else projections(sizes)
  )
  flops += linear * 4.0 * sizes.n_coarse * (head_dim + 1)
  passes = _PASSES[form] + 4 * kernels * sizes.n_coarse / n + (linear and kernels) * _XLA_LIFT
  launches = _LAUNCHES[form] + _LINEAR_LAUNCHES * linear
  if arrays:
    passes, launches = (
      passes + _FILTER_PASSES[form][arrays > 1],
      launches + _FILTER_LAUNCHES[form][arrays > 1],
    )
  around = Cost(
    linear_flops=flops * width, linear_bytes=2.0 * passes * n * width, launches=launches
  )
  around += selection_cost(n, layout.tiles, heads, head_dim, 0.0 if kernels else 2.0)
  around += summary_cost(method, layout, sizes, form, width) + method.router_cost(
    layout, heads, head_dim
  )
  return attention_cost(heads * float(share @ pairs), head_dim) + around


def projections(sizes: TransformSizes) -> float:
  """FLOPs per channel of P_low and P_box: `4 n (k + m)` in tiles."""
  return sum(sizes.reduce(rows) + sizes.expand(rows) for rows in (sizes.cells, sizes.box))


def summary_cost(method, layout: TileLayout, sizes: TransformSizes, form: str, width: int) -> Cost:
  """s summaries per band: P_low and P_box of k and v, `18 n s D` to pool them and `12 n s D` to read them, in XLA and float32.

  Pooling: for each of three bands the scores of learned queries and the sums of k and of v, `2 n s D` each. Reading: each row's
  scores with all 3 s tokens, and the sum of their values.
  """
  if not method.summary:
    return Cost()
  passes = _SUMMARY_PASSES[form] + _PER_SUMMARY * method.summary
  flops = 2 * projections(sizes) + 30.0 * layout.n * method.summary
  return Cost(
    linear_flops=flops * width,
    linear_bytes=2.0 * passes * layout.n * width,
    launches=_SUMMARY_LAUNCHES[form],
  )


def statistics_cost(method, layout: TileLayout, heads: int, head_dim: int) -> Cost:
  """Band energies of v for the router: its coefficients in the box, `2 n m D` in tiles."""
  sizes, width = TransformSizes.of(method.basis, layout), heads * head_dim
  moved = 2.0 * _STATISTICS_PASSES[_form(sizes, layout, head_dim)] * layout.n * width
  return Cost(
    linear_flops=sizes.reduce(sizes.box) * width, linear_bytes=moved, launches=_STATISTICS_LAUNCHES
  )


def _form(sizes, layout, head_dim) -> str:
  """Who does it on Hopper: the kernels around attention where they take the call, else XLA in tiles or along whole axes."""
  if not sizes.tiled:
    return "axes"
  taken = head_dim in HEAD_DIMS and layout.block in BLOCKS and sizes.most_cells <= MAX_CELLS
  return "kernels" if taken else "tiles"


def call_cost(method, layout: TileLayout, heads, head_dim, allocation=None) -> CallCost:
  """The packed buffer's lists: low and high exactly, mid with tiles of average fill and unions of random lists."""
  share, sizes, block = (
    method.shares(heads, allocation),
    TransformSizes.of(method.basis, layout),
    layout.block,
  )
  coarse = -(-sizes.n_coarse // block)
  dense = 0 if method.low_op == "linear" else coarse
  low = uniform(dense, dense, dense, head_dim, block=block)
  low = dataclasses.replace(
    low, pairs=float(sizes.n_coarse) ** 2 * (dense > 0), rows=coarse + layout.tiles
  )
  listed = min(method.mid_tiles, layout.tiles) + method.low_shared * coarse
  mid = uniform(
    layout.tiles, listed, coarse + layout.tiles, head_dim, block=block, fill=layout.fill
  )
  high = dataclasses.replace(
    count_window(layout, method.window, method.border, before=coarse), head_dim=head_dim
  )
  if method.low_shared:
    high = _with_coarse(high, layout, sizes.n_coarse, coarse)
  return low.scaled(heads * share[0]) + mid.scaled(heads * share[1]) + high.scaled(heads * share[2])


def _with_coarse(high: CallCost, layout: TileLayout, n_coarse: int, coarse: int) -> CallCost:
  """All coarse tiles on every list of the full rows, which come after the coarse ones."""
  groups = len(range(-(coarse % CONCURRENT), layout.tiles, CONCURRENT))
  return dataclasses.replace(
    high,
    pairs=high.pairs + float(layout.n) * n_coarse,
    computed_pairs=high.computed_pairs + float(layout.tiles) * coarse * layout.block**2,
    loads=high.loads + float(layout.tiles) * coarse,
    distinct=high.distinct + coarse,
    wave_loads=high.wave_loads + groups * coarse,
    longest=high.longest + coarse,
  )
