"""Linear attention beside a sparse launch: would it gain from running in the same launch?

  python -m benchmarks.compiled.linear            # 2 minutes; rows go to results/linear.json
  python -m benchmarks.compiled.linear --nocpu    # only the rows of programs compiled for an H100
  python -m benchmarks.compiled.linear --quick    # small CPU shapes, writes nothing

Rows with `measured: false` simulate an H100: exact FLOPs, bytes that the compiled program moves
(every kernel its operands and results once, Mosaic kernels the share of the heads that take part)
and the simulator's rates. Names that end in `_xla` are without the kernels of
`kernels/linear/hopper.py`. Rows with `measured: true` are of this machine's CPU.

One launch for both could skip the passes that separate kernels make, down to reading q, k, v and
writing the output once, and overlap the rest with the sparse heads' products.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the absent GPU; see tools/offline.py

import dataclasses  # noqa: E402
import functools  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402
from freqformer.kernels.block_sparse.api import attention  # noqa: E402
from freqformer.kernels.linear.api import Segments, linear_attention  # noqa: E402

from benchmarks import rows, timing  # noqa: E402
from benchmarks.compiled import hlo_bytes  # noqa: E402
from freqformer.cost import layer_cost  # noqa: E402
from freqformer.grid.layout import TileLayout  # noqa: E402
from freqformer.methods.base import Method  # noqa: E402
from freqformer.methods.sparse_linear import SparseLinear  # noqa: E402
from freqformer.methods.sparseflow import SparseFlow  # noqa: E402
from freqformer.simulation.descriptions import load_gpu, load_model  # noqa: E402
from freqformer.simulation.forward import Plan, attention_call, simulate  # noqa: E402
from freqformer.simulation.roofline import attention_seconds  # noqa: E402
from tools import offline  # noqa: E402

_QUICK = flags.DEFINE_bool(
  "quick", False, "Small CPU shapes and few repeats; writes no rows.", allow_override=True
)
_CPU = flags.DEFINE_bool("cpu", True, "Also measure on this machine's CPU.", allow_override=True)

# Frames of the last one share boxes of eight rows (`kernels.linear.segments.Work.mixed`).
GRIDS = {"64k": (16, 64, 64), "128k": (32, 64, 64), "21x30x52": (21, 30, 52)}
SPLIT = (7, 5)  # sparse and linear heads: the router's prior, in whole heads
MODEL = "wan2.1-1.3b"  # the rest of the block is this model's: 12 heads of 128 channels
SPARSE_SCOPE = "sparse_heads"  # named scope of the sparse attention, excluded from the count


@dataclasses.dataclass(frozen=True)
class Shape:
  """Tokens and heads of one comparison."""

  grid: tuple[int, int, int]
  heads: int
  head_dim: int

  def layout(self) -> TileLayout:
    return TileLayout.fit(self.grid, 128)

  def rows(self) -> jax.ShapeDtypeStruct:
    """q, k, v or the output."""
    return jax.ShapeDtypeStruct(
      (1, self.layout().n_buffer, self.heads, self.head_dim), jnp.bfloat16
    )

  def linear_flops(self, heads: int, sums: int = 0) -> float:
    """Returns FLOPs of linear attention whose segments read the sums of `sums` others in all."""
    return (4.0 * self.layout().n + 2.0 * sums) * self.head_dim * (self.head_dim + 1) * heads

  def row(self, name: str, value: float, unit: str, measured: bool, what: str) -> dict:
    return {
      "name": name,
      "value": value,
      "unit": unit,
      "goal": None,
      "met": None,
      "measured": measured,
      "what": what,
      "n": self.layout().n,
      "heads": self.heads,
      "head_dim": self.head_dim,
    }


def op_of(method: Method, implementation: str | None = None):
  """Returns the op that computes a method's linear attention."""
  return functools.partial(
    linear_attention, feature_map=method.feature_map, implementation=implementation
  )


# ---- compiled for an H100 ------------------------------------------------------------------------


def linear_bytes(
  operations: list[hlo_bytes.Operation], share: float, in_place: float
) -> tuple[float, int]:
  """Returns bytes that linear attention moves in a compiled program, and its kernels.

  Args:
    operations: of the whole program; those in the scope of the sparse heads are left out.
    share: of the heads that take part; a Mosaic kernel moves nothing for the others.
    in_place: bytes of the arrays that `linear_read` writes into, which are operands but not read; 0
      if there are none.
  """
  moved = 0.0
  kernels = 0
  for op in operations:
    # An allocation moves nothing.
    if any(f"/{SPARSE_SCOPE}/" in scope or scope.endswith("/empty") for scope in op.scopes):
      continue
    kernels += 1
    written = in_place if any("linear_read" in scope for scope in op.scopes) else 0.0
    moved += (op.bytes - written) * share if op.kernel else op.bytes
  return moved, kernels


def counts(compiled: offline.Compilation, share: float = 1.0, in_place: float = 0.0) -> dict:
  """Returns fields of a row; arguments as those of `linear_bytes`."""
  operations = hlo_bytes.operations(compiled.compiled.as_text())
  moved, kernels = linear_bytes(operations, share, in_place)
  return {"linear_bytes": moved, "linear_kernels": kernels, "temp_bytes": compiled.temp_bytes}


def sparseflow(name: str, shape: Shape, method: SparseFlow, implementation: str) -> dict:
  """Returns the row of SparseFlow in evaluation.

  A router's choice is known when it runs: the kernels leave the sparse heads out and write into
  their output, XLA runs the op on all heads. A fixed allocation is known before: XLA cuts its heads
  out.
  """
  fixed = np.repeat([False, True], SPLIT)[None]
  tables = method.tables(shape.layout())
  x = shape.rows()

  def call(q, k, v, tables, heads):
    heads = heads if method.routed else fixed
    with jax.named_scope(SPARSE_SCOPE):
      mask = method.mask_at(tables, jnp.full(1, 0.5))
      listed = jnp.where(heads[..., None], 0, mask.kv_counts)
      ids = jnp.broadcast_to(mask.kv_indices, (*listed.shape, mask.max_kv))
      mask = dataclasses.replace(mask, kv_indices=ids, kv_counts=listed)
      out, _ = attention(q, k, v, mask, implementation="pallas_mgpu")
    return op_of(method, implementation)(q, k, v, tables.frames, heads=heads, into=out)[0]

  compiled = offline.compile_for(call, x, x, x, tables, jax.ShapeDtypeStruct(fixed.shape, bool))
  in_place = 0.0
  if implementation != "xla" and not tables.frames.work.mixed:
    in_place = (2 + 4 / shape.head_dim) * x.size  # the output, and a logarithm per row
  counted = counts(compiled, SPLIT[1] / shape.heads, in_place)
  return simulated(name, shape, method, SPLIT, counted) | {"allocation": SPLIT}


def sparse_linear(name: str, shape: Shape, method: SparseLinear, implementation: str) -> dict:
  """Returns the row of sparse-linear attention: heads read the sums of their marginal tiles."""
  layout = shape.layout()
  x = shape.rows()
  tiles = jax.ShapeDtypeStruct((1, shape.heads, layout.tiles, layout.tiles), jnp.bool_)
  segments = Segments.of_tiles(layout.arrays().kv_len, layout.block)

  def call(q, k, v, segments, reads):
    return op_of(method, implementation)(q, k, v, segments, reads=reads)[0]

  compiled = offline.compile_for(call, x, x, x, segments, tiles)
  return simulated(name, shape, method, None, counts(compiled), sums=layout.tiles**2)


def simulated(
  name: str,
  shape: Shape,
  method: Method,
  allocation: tuple[int, int] | None,
  counted: dict,
  sums: int = 0,
) -> dict:
  """Returns seconds of linear attention beside the sparse launch and in a block.

  Args:
    name: of the row, without "h100_".
    allocation: sparse and linear heads; None: every head is both.
    counted: of `counts`.
    sums: see `Shape.linear_flops`.
  """
  layout = shape.layout()
  gpu = load_gpu("h100")
  card = load_model(MODEL)
  own = shape.heads if allocation is None else allocation[1]
  least = 4 * 2 * shape.rows().size * own / shape.heads  # q, k, v in, the output out
  flops = shape.linear_flops(own, sums)

  def seconds(moved):
    return max(moved / gpu.rates.hbm, flops / gpu.rates.matmul_flops)

  sizes = (layout, shape.heads, shape.head_dim)
  call = attention_call(method, *sizes, allocation=allocation)
  sparse_s = attention_seconds(call, gpu, shape.heads).total
  linear_s = seconds(counted["linear_bytes"])
  whole = simulate(Plan(card, name, method, shape.grid), gpu)
  rest_s = (whole.matmul_seconds + whole.elementwise_seconds) / card.layers
  what = "seconds of linear attention as compiled, over seconds of the sparse launch"
  return {
    **shape.row(f"h100_{name}", linear_s / sparse_s, "x", False, what),
    **counted,
    "rates": "freqformer/simulation/gpus/h100.json",
    "linear_heads": own,
    "density": call.pairs / (float(layout.n) ** 2 * shape.heads),
    "sparse_flops": layer_cost(method, *sizes, allocation).attention_flops,
    "linear_flops": flops,
    "linear_bytes_least": least,
    "sparse_s": sparse_s,
    "linear_s": linear_s,
    "linear_least_s": seconds(least),
    "block_rest_s": rest_s,
    "fewer_passes_gain": (linear_s - seconds(least)) / (sparse_s + linear_s),
    # One launch could win at most all of linear attention's time, hidden behind the sparse heads.
    "same_launch_gain_at_most": linear_s / (sparse_s + linear_s),
    "same_launch_block_gain_at_most": linear_s / (sparse_s + linear_s + rest_s),
  }


def gradients(name: str, shape: Shape, method: SparseFlow, implementation: str) -> dict:
  """Returns bytes of forward and backward on all heads, as soft training runs, per element of q."""
  x = shape.rows()
  frames = method.tables(shape.layout()).frames

  def call(q, k, v, frames, d_out):
    run = op_of(method, implementation)
    out, rule = jax.vjp(lambda *x: run(*x, frames)[0], q, k, v)
    return out, rule(d_out)

  counted = counts(offline.compile_for(call, x, x, x, frames, x))
  each = counted["linear_bytes"] / x.size
  what = (
    "linear attention forward and backward, all heads; reading q, k, v, dO and writing out, dq, "
    "dk, dv once is 16"
  )
  return shape.row(f"h100_{name}", each, "bytes per element", False, what) | counted


def compiled_rows() -> list[dict]:
  """Returns the rows of all programs compiled for an H100."""
  found = []
  for size, grid in GRIDS.items():
    shape = Shape(grid, 12, 128)
    for end, implementation in (("", "pallas_mgpu"), ("_xla", "xla")):
      name = f"{size}{end}"
      fixed = SparseFlow(allocation=SPLIT)
      found += [
        sparseflow(f"sparseflow_routed_{name}", shape, SparseFlow(), implementation),
        sparseflow(f"sparseflow_fixed_{name}", shape, fixed, implementation),
        sparse_linear(f"sparse_linear_{name}", shape, SparseLinear(), implementation),
      ]
      if size == "64k":
        found.append(gradients(f"gradients_{name}", shape, SparseFlow(), implementation))
  return found


# ---- measured on this CPU ------------------------------------------------------------------------


def measured(shape: Shape, method: SparseFlow, rounds: int) -> dict:
  """Returns this machine's row: linear attention over the all-sparse call at t = 1/2."""
  layout = shape.layout()
  tables = jax.tree.map(jnp.asarray, method.tables(layout))
  q, k, v = jax.random.normal(
    jax.random.key(0), (3, 1, layout.n_buffer, shape.heads, shape.head_dim)
  )

  @jax.jit
  def linear(q, k, v, tables):
    return op_of(method)(q, k, v, tables.frames)[0]

  @jax.jit
  def sparse(q, k, v, tables):
    return attention(q, k, v, method.mask_at(tables, jnp.full(1, 0.5)))[0]

  others = timing.Bystanders()
  calls = {"linear": lambda: linear(q, k, v, tables), "sparse": lambda: sparse(q, k, v, tables)}
  times = timing.interleave(calls, rounds)
  mask = method.mask_at(method.tables(layout), jnp.full(1, 0.5))
  pairs = float(mask.pairs().sum())
  sparse_flops = 4.0 * pairs * shape.heads * shape.head_dim
  value = times["linear"].median / times["sparse"].median
  what = "seconds of linear attention over seconds of sparse attention, all heads each, float32"
  return shape.row(f"cpu_{layout.n}", value, "x", True, what) | {
    "density": pairs / layout.n**2,
    "flops_ratio": shape.linear_flops(shape.heads) / sparse_flops,
    "others_cpu": others.share(),
    "linear": times["linear"].row(),
    "sparse": times["sparse"].row(),
  }


def main(_) -> None:
  if _QUICK.value:
    found = [measured(Shape((4, 16, 16), 2, 32), SparseFlow(), 2)]
  else:
    found = compiled_rows()
    if _CPU.value:
      found.append(measured(Shape((16, 32, 32), 4, 64), SparseFlow(), 7))
    rows.write_rows("linear", found, "python -m benchmarks.compiled.linear")
  print(rows.table(found))


if __name__ == "__main__":
  app.run(main)
