"""Does linear attention need to run in the launch of the sparse attention beside it?

  python -m benchmarks.compiled.linear            # 2 minutes; rows go to results/linear.json
  python -m benchmarks.compiled.linear --quick    # small CPU shapes, writes nothing

Two kinds of rows. `measured: false`: a model of an H100 from exact FLOPs, from the bytes that the compiled program reads and
writes (every kernel its operands once and its results once, Mosaic kernels the share of the heads that take part; compiled for
sm_90a, never run), and from two assumed rates. Names that end in `_xla` are the same without the kernels of
`kernels/linear/hopper.py`. `measured: true`: this machine's CPU, both ops on the same inputs in turns.

One launch for both could do two things for a linear head: skip the passes that separate kernels make (down to reading q, k, v
and writing the output once), and overlap what is left with the sparse heads' products. The rows tell the two apart.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.linear.api import Segments, linear_attention

from benchmarks import rows, timing
from benchmarks.compiled import hlo_bytes
from freqformer.grid.layout import TileLayout
from freqformer.methods.base import Method
from freqformer.methods.sparse_linear import SparseLinear
from freqformer.methods.sparseflow import SparseFlow
from freqformer.simulation.descriptions import load_gpu, load_model
from freqformer.simulation.forward import Plan, simulate
from tools import offline

_QUICK = flags.DEFINE_bool(
  "quick", False, "Small CPU shapes and few repeats; writes no rows.", allow_override=True
)

# Assumed for an H100 until measured: 85 % of the best published dense attention rate (697 TFLOP/s), and a plain copy.
TENSOR_RATE, COPY_RATE = 0.85 * 697e12, 3.0e12
# The last one's frames share boxes of eight rows (`kernels.linear.segments.Work.mixed`).
GRIDS = {"64k": (16, 64, 64), "128k": (32, 64, 64), "21x30x52": (21, 30, 52)}
SPLIT = (7, 5)  # sparse and linear heads: the router's prior, in whole heads
BLOCK = "wan2.1-1.3b"  # the rest of the block is this model's: 12 heads of 128 channels
_OTHERS = "sparse_heads"  # the scope of what is no linear attention


@dataclasses.dataclass(frozen=True)
class Shape:
  """Tokens and heads of one comparison; `block` rows per tile."""

  grid: tuple[int, int, int]
  heads: int
  head_dim: int
  block: int = 128

  def layout(self) -> TileLayout:
    return TileLayout.fit(self.grid, self.block)

  def rows(self) -> jax.ShapeDtypeStruct:
    """q, k, v or the output."""
    return jax.ShapeDtypeStruct(
      (1, self.layout().n_buffer, self.heads, self.head_dim), jnp.bfloat16
    )


def linear_bytes(
  operations: list[hlo_bytes.Operation], share: float, in_place: float
) -> tuple[float, int]:
  """Bytes that linear attention moves in a compiled program, and its kernels.

  Args:
    operations: of the whole program; those in the scope of the sparse heads are left out.
    share: of the heads that take part; a Mosaic kernel moves nothing for the others.
    in_place: bytes of the arrays that `linear_read` writes into, which are operands but not read; 0 if there are none.
  """

  # What only allocates moves nothing.
  def left_out(scope):
    return f"/{_OTHERS}/" in scope or scope.endswith("/empty")

  ours = [o for o in operations if not any(map(left_out, o.scopes))]

  def within(o):
    return in_place * any("linear_read" in scope for scope in o.scopes)

  return sum((o.bytes - within(o)) * share if o.kernel else o.bytes for o in ours), len(ours)


def sparseflow(name: str, shape: Shape, method: SparseFlow, implementation: str) -> dict:
  """The H100 model's row of SparseFlow in evaluation.

  A router's choice is known when it runs: the kernels leave the sparse heads out and write into their output, XLA runs the op
  on all heads. A fixed allocation is known before: XLA cuts its heads out.
  """
  layout, own = shape.layout(), SPLIT[1]
  fixed = np.repeat([False, True], SPLIT)[None]
  tables, x = method.tables(layout), shape.rows()

  def call(q, k, v, tables, heads):
    heads = heads if method.routed else fixed
    with jax.named_scope(_OTHERS):
      mask = method.mask_at(tables, jnp.full(1, 0.5))
      counts = jnp.where(heads[..., None], 0, mask.kv_counts)
      ids = jnp.broadcast_to(mask.kv_indices, (*counts.shape, mask.max_kv))
      mask = dataclasses.replace(mask, kv_indices=ids, kv_counts=counts)
      out, _ = attention(q, k, v, mask, implementation="pallas_mgpu")
    run = functools.partial(
      linear_attention, feature_map=method.feature_map, implementation=implementation
    )
    return run(q, k, v, tables.frames, heads=heads, into=out)[0]

  compiled = offline.compile_for(call, x, x, x, tables, jax.ShapeDtypeStruct(fixed.shape, bool))
  in_place = (2 + 4 / shape.head_dim) * x.size  # the output, and a logarithm per row
  in_place *= implementation != "xla" and not tables.frames.work.mixed
  row = modelled(name, shape, method, own, compiled, in_place)
  return row | {"allocation": SPLIT}


def sparse_linear(name: str, shape: Shape, method: SparseLinear, implementation: str) -> dict:
  """The H100 model's row of sparse-linear attention: every head reads the sums of its marginal tiles."""
  layout, x = shape.layout(), shape.rows()
  tiles = jax.ShapeDtypeStruct((1, shape.heads, layout.tiles, layout.tiles), jnp.bool_)
  run = functools.partial(
    linear_attention, feature_map=method.feature_map, implementation=implementation
  )

  def call(q, k, v, segments, reads):
    return run(q, k, v, segments, reads=reads)[0]

  compiled = offline.compile_for(
    call, x, x, x, Segments.of_tiles(layout.arrays().kv_len, layout.block), tiles
  )
  return modelled(name, shape, method, shape.heads, compiled)


def modelled(
  name: str,
  shape: Shape,
  method: Method,
  own: int,
  compiled: offline.Compilation,
  in_place: float = 0.0,
) -> dict:
  """Seconds of linear attention on `own` heads, as compiled and at the least bytes, beside the sparse launch and in a block."""
  layout, share = shape.layout(), own / shape.heads
  moved, kernels = linear_bytes(hlo_bytes.operations(compiled.compiled.as_text()), share, in_place)
  least = 4 * 2 * shape.rows().size * share  # q, k, v in, the output out
  cost = method.cost(
    layout, shape.heads, shape.head_dim, SPLIT if isinstance(method, SparseFlow) else None
  )
  sums = (
    layout.tiles**2 if isinstance(method, SparseLinear) else 0
  )  # segments read the sums of others
  flops = (4.0 * layout.n + 2.0 * sums) * shape.head_dim * (shape.head_dim + 1) * own
  sparse_s, linear_s, least_s = (
    cost.attention_flops / TENSOR_RATE,
    moved / COPY_RATE,
    least / COPY_RATE,
  )
  linear_s, least_s = (max(s, flops / TENSOR_RATE) for s in (linear_s, least_s))
  card = load_model(BLOCK)
  whole = simulate(Plan(card, name, method, shape.grid, shape.block), load_gpu("h100"))
  rest_s = (whole.matmul_s + whole.elementwise_s) / card.layers
  return {
    "name": f"h100_{name}",
    "value": linear_s / sparse_s,
    "unit": "x",
    "goal": None,
    "met": None,
    "measured": False,
    "what": "seconds of linear attention as compiled, over seconds of the sparse launch",
    "rates": "assumed: 592 TFLOP/s (85 % of 697), 3.0 TB/s; the rest of the block: freqformer/simulation",
    "n": layout.n,
    "heads": shape.heads,
    "head_dim": shape.head_dim,
    "linear_heads": own,
    "density": cost.attention_flops / (4.0 * layout.n**2 * shape.heads * shape.head_dim),
    "sparse_flops": cost.attention_flops,
    "linear_flops": flops,
    "linear_bytes": moved,
    "linear_bytes_least": least,
    "linear_kernels": kernels,
    "temp_bytes": compiled.temp_bytes,
    "sparse_s": sparse_s,
    "linear_s": linear_s,
    "linear_least_s": least_s,
    "block_rest_s": rest_s,
    "fewer_passes_gain": (linear_s - least_s) / (sparse_s + linear_s),
    # What one launch could win at most: all of linear attention's time, hidden behind the sparse heads.
    "same_launch_gain_at_most": linear_s / (sparse_s + linear_s),
    "same_launch_block_gain_at_most": linear_s / (sparse_s + linear_s + rest_s),
  }


def gradients(name: str, shape: Shape, method: SparseFlow, implementation: str) -> dict:
  """Bytes of forward and backward on all heads, as soft training runs them, per element of q."""
  x, frames = shape.rows(), method.tables(shape.layout()).frames

  def call(q, k, v, frames, d_out):
    run = functools.partial(
      linear_attention, feature_map=method.feature_map, implementation=implementation
    )
    out, rule = jax.vjp(lambda *x: run(*x, frames)[0], q, k, v)
    return out, rule(d_out)

  compiled = offline.compile_for(call, x, x, x, frames, x)
  moved, kernels = linear_bytes(hlo_bytes.operations(compiled.compiled.as_text()), 1.0, 0)
  return {
    "name": f"h100_{name}",
    "value": moved / x.size,
    "unit": "bytes per element",
    "goal": None,
    "met": None,
    "measured": False,
    "what": "linear attention forward and backward, all heads; reading q, k, v, dO and writing out, dq, dk, dv once is 16",
    "n": shape.layout().n,
    "heads": shape.heads,
    "head_dim": shape.head_dim,
    "linear_bytes": moved,
    "linear_kernels": kernels,
    "temp_bytes": compiled.temp_bytes,
  }


def measured(shape: Shape, method: SparseFlow, rounds: int) -> dict:
  """One row of this machine: linear attention over the sparse call of all-sparse heads at t = 1/2."""
  layout = shape.layout()
  tables = jax.tree.map(jnp.asarray, method.tables(layout))
  q, k, v = jax.random.normal(
    jax.random.key(0), (3, 1, layout.n_buffer, shape.heads, shape.head_dim)
  )

  @functools.partial(jax.jit, static_argnums=0)
  def run(linear, q, k, v, tables):
    if linear:
      return linear_attention(q, k, v, tables.frames, feature_map=method.feature_map)[0]
    return attention(q, k, v, method.mask_at(tables, jnp.full(1, 0.5)))[0]

  others = timing.Bystanders()
  calls = {
    "linear": lambda: run(True, q, k, v, tables),
    "sparse": lambda: run(False, q, k, v, tables),
  }
  times = timing.interleave(calls, rounds)
  mask = method.mask_at(method.tables(layout), jnp.full(1, 0.5))
  pairs = float(mask.pairs().sum()) * shape.heads
  linear_flops = 4.0 * layout.n * shape.head_dim * (shape.head_dim + 1) * shape.heads
  return {
    "name": f"cpu_{layout.n}",
    "value": times["linear"].median / times["sparse"].median,
    "unit": "x",
    "goal": None,
    "met": None,
    "measured": True,
    "what": "seconds of linear attention over seconds of sparse attention, all heads each, float32",
    "n": layout.n,
    "heads": shape.heads,
    "head_dim": shape.head_dim,
    "density": pairs / shape.heads / layout.n**2,
    "flops_ratio": linear_flops / (4.0 * pairs * shape.head_dim),
    "others_cpu": others.share(),
    "linear": times["linear"].row(),
    "sparse": times["sparse"].row(),
  }


def main(_):
  if _QUICK.value:
    found = [measured(Shape((4, 16, 16), 2, 32), SparseFlow(), 2)]
  else:
    found, methods = [], {"routed": SparseFlow(), "fixed": SparseFlow(allocation=SPLIT)}
    for (name, grid), (end, implementation) in itertools.product(
      GRIDS.items(), {"": "pallas_mgpu", "_xla": "xla"}.items()
    ):
      shape = Shape(grid, 12, 128)
      for kind, method in methods.items():
        found.append(sparseflow(f"sparseflow_{kind}_{name}{end}", shape, method, implementation))
      found.append(
        sparse_linear(f"sparse_linear_{name}{end}", shape, SparseLinear(), implementation)
      )
      if name == "64k":
        found.append(gradients(f"gradients_{name}{end}", shape, SparseFlow(), implementation))
    found += [measured(Shape((16, 32, 32), 4, 64), SparseFlow(), 7)]
    rows.write_rows("linear", found, "python -m benchmarks.compiled.linear")
  print(rows.table(found))


if __name__ == "__main__":
  app.run(main)
