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
from benchmarks.arg_specs import SPECS, AttentionSpec  # noqa: E402
from benchmarks.cpu.competitors import call, sparse  # noqa: E402
from freqformer.analysis import hlo_bytes  # noqa: E402
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
SHAPES = {"64k": SPECS["a_64k"], "128k": SPECS["a_128k"], "21x30x52": SPECS["d_32k"]}
SPLIT = (7, 5)  # sparse and linear heads: the router's prior, in whole heads
MODEL = "wan2.1-1.3b"  # the rest of the block is this model's: 12 heads of 128 channels
SPARSE_SCOPE = "sparse_heads"  # named scope of the sparse attention, excluded from the count


def array_of(spec: AttentionSpec) -> jax.ShapeDtypeStruct:
  """Returns the shape of q, k, v or the output."""
  return jax.ShapeDtypeStruct((1, spec.layout.n_buffer, spec.heads, spec.head_dim), jnp.bfloat16)


def linear_flops(spec: AttentionSpec, heads: int, sums: int = 0) -> float:
  """Returns FLOPs of linear attention whose segments read the sums of `sums` others in all."""
  return (4.0 * spec.n + 2.0 * sums) * spec.head_dim * (spec.head_dim + 1) * heads


def row_of(spec: AttentionSpec, name: str, value: float, unit: str, measured: bool, **fields):
  """Returns a row."""
  shape = {"n": spec.n, "heads": spec.heads, "head_dim": spec.head_dim}
  return rows.goal_row(name, value, None, unit=unit, measured=measured, **shape, **fields)


def op_of(method: Method, implementation: str | None = None):
  """Returns the op that computes a method's linear attention."""
  return functools.partial(
    linear_attention, feature_map=method.feature_map, implementation=implementation
  )


# ---- compiled for an H100 ------------------------------------------------------------------------


def linear_bytes(
  operations: list[hlo_bytes.Operation], share: float = 1.0, in_place: float = 0.0
) -> dict:
  """Returns fields of a row: bytes that linear attention moves, and its kernels, in a program.

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
  return {"linear_bytes": moved, "linear_kernels": kernels}


def operations_of(program, *args) -> list[hlo_bytes.Operation]:
  """Compiles a program and returns its operations."""
  return hlo_bytes.operations(offline.compile_for(program, *args).compiled.as_text())


def sparseflow(name: str, spec: AttentionSpec, method: SparseFlow, implementation: str) -> dict:
  """Returns the row of SparseFlow in evaluation.

  A router's choice is known when it runs: the kernels leave the sparse heads out and write into
  their output, XLA runs the op on all heads. A fixed allocation is known before: XLA cuts its heads
  out.
  """
  fixed = np.repeat([False, True], SPLIT)[None]
  tables = method.tables(spec.layout)
  x = array_of(spec)

  def program(q, k, v, tables, heads):
    heads = heads if method.routed else fixed
    with jax.named_scope(SPARSE_SCOPE):
      mask = method.mask_at(tables, jnp.full(1, 0.5))
      listed = jnp.where(heads[..., None], 0, mask.kv_counts)
      ids = jnp.broadcast_to(mask.kv_indices, (*listed.shape, mask.max_kv))
      mask = dataclasses.replace(mask, kv_indices=ids, kv_counts=listed)
      out, _ = attention(q, k, v, mask, implementation="pallas_mgpu")
    return op_of(method, implementation)(q, k, v, tables.frames, heads=heads, into=out)[0]

  operations = operations_of(program, x, x, x, tables, jax.ShapeDtypeStruct(fixed.shape, bool))
  in_place = 0.0
  if implementation != "xla" and not tables.frames.work.mixed:
    in_place = (2 + 4 / spec.head_dim) * x.size  # the output, and a logarithm per row
  counted = linear_bytes(operations, SPLIT[1] / spec.heads, in_place)
  return simulated(name, spec, method, SPLIT, counted)


def sparse_linear(name: str, spec: AttentionSpec, method: SparseLinear, implementation: str):
  """Returns the row of sparse-linear attention: heads read the sums of their marginal tiles."""
  layout = spec.layout
  x = array_of(spec)
  tiles = jax.ShapeDtypeStruct((1, spec.heads, layout.tiles, layout.tiles), jnp.bool_)
  segments = Segments.of_tiles(layout.arrays().kv_len, layout.block)

  def program(q, k, v, segments, reads):
    return op_of(method, implementation)(q, k, v, segments, reads=reads)[0]

  counted = linear_bytes(operations_of(program, x, x, x, segments, tiles))
  return simulated(name, spec, method, None, counted, sums=layout.tiles**2)


def simulated(
  name: str,
  spec: AttentionSpec,
  method: Method,
  allocation: tuple[int, int] | None,
  counted: dict,
  sums: int = 0,
) -> dict:
  """Returns seconds of linear attention, as compiled, over seconds of the sparse launch.

  Args:
    name: of the row, without "h100_".
    allocation: sparse and linear heads; None: every head is both.
    counted: of `linear_bytes`.
    sums: see `linear_flops`.
  """
  layout = spec.layout
  gpu = load_gpu("h100")
  card = load_model(MODEL)
  own = spec.heads if allocation is None else allocation[1]
  least = 4 * 2 * array_of(spec).size * own / spec.heads  # q, k, v in, the output out
  flops = linear_flops(spec, own, sums)

  def seconds(moved):
    return max(moved / gpu.rates.hbm, flops / gpu.rates.matmul_flops)

  call = attention_call(method, layout, spec.heads, spec.head_dim, allocation=allocation)
  sparse_s = attention_seconds(call, gpu, spec.heads).total
  linear_s = seconds(counted["linear_bytes"])
  whole = simulate(Plan(card, name, method, spec.grid), gpu)
  rest_s = (whole.matmul_seconds + whole.elementwise_seconds) / card.layers
  return row_of(
    spec,
    f"h100_{name}",
    linear_s / sparse_s,
    "x",
    False,
    **counted,
    density=call.pairs / (float(layout.n) ** 2 * spec.heads),
    sparse_flops=call.flops,
    linear_flops=flops,
    linear_bytes_least=least,
    sparse_s=sparse_s,
    linear_s=linear_s,
    linear_least_s=seconds(least),
    # One launch could win at most all of linear attention's time, hidden behind the sparse heads.
    same_launch_gain_at_most=linear_s / (sparse_s + linear_s),
    same_launch_block_gain_at_most=linear_s / (sparse_s + linear_s + rest_s),
  )


def gradients(name: str, spec: AttentionSpec, method: SparseFlow, implementation: str) -> dict:
  """Returns bytes of forward and backward on all heads, as soft training runs, per element of q.

  Reading q, k, v, dO and writing out, dq, dk, dv once is 16.
  """
  x = array_of(spec)
  frames = method.tables(spec.layout).frames

  def program(q, k, v, frames, d_out):
    run = op_of(method, implementation)
    out, rule = jax.vjp(lambda *x: run(*x, frames)[0], q, k, v)
    return out, rule(d_out)

  counted = linear_bytes(operations_of(program, x, x, x, frames, x))
  each = counted["linear_bytes"] / x.size
  return row_of(spec, f"h100_{name}", each, "bytes per element", False, **counted)


def compiled_rows() -> list[dict]:
  """Returns the rows of all programs compiled for an H100."""
  found = []
  for size, spec in SHAPES.items():
    for end, implementation in (("", "pallas_mgpu"), ("_xla", "xla")):
      name = f"{size}{end}"
      fixed = SparseFlow(allocation=SPLIT)
      found += [
        sparseflow(f"sparseflow_routed_{name}", spec, SparseFlow(), implementation),
        sparseflow(f"sparseflow_fixed_{name}", spec, fixed, implementation),
        sparse_linear(f"sparse_linear_{name}", spec, SparseLinear(), implementation),
      ]
      if size == "64k":
        found.append(gradients(f"gradients_{name}", spec, SparseFlow(), implementation))
  return found


# ---- measured on this CPU ------------------------------------------------------------------------


def measured(spec: AttentionSpec, method: SparseFlow, rounds: int) -> dict:
  """Returns this machine's row: linear attention over the all-sparse call at t = 1/2, float32."""
  layout = spec.layout
  tables = jax.tree.map(jnp.asarray, method.tables(layout))
  q, k, v = spec.inputs()

  def linear(q, k, v, tables):
    return op_of(method)(q, k, v, tables.frames)[0]

  def all_sparse(q, k, v, tables):
    return sparse(q, k, v, method.mask_at(tables, jnp.full(1, 0.5)))

  args = (q, k, v, tables)
  times = timing.interleave(
    {"linear": call(linear, *args), "sparse": call(all_sparse, *args)}, rounds
  )
  pairs = float(method.mask_at(tables, jnp.full(1, 0.5)).pairs().sum())
  value = times["linear"].median / times["sparse"].median
  sparse_flops = 4.0 * pairs * spec.heads * spec.head_dim
  return row_of(
    spec,
    f"cpu_{spec.n}",
    value,
    "x",
    True,
    density=pairs / spec.n**2,
    flops_ratio=linear_flops(spec, spec.heads) / sparse_flops,
    **{name: t.row() for name, t in times.items()},
  )


def main(_) -> None:
  if _QUICK.value:
    found = [measured(SPECS["cpu_1k"], SparseFlow(), 2)]
  else:
    found = compiled_rows()
    if _CPU.value:
      found += timing.beside_others(lambda: [measured(SPECS["cpu_16k"], SparseFlow(), 7)])
    rows.write_rows("linear", found, "python -m benchmarks.compiled.linear")
  print(rows.table(found))


if __name__ == "__main__":
  app.run(main)
