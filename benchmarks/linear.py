"""Does linear attention need to run in the launch of the sparse attention beside it?

  python -m benchmarks.linear            # 1 minute; rows go to results/linear.json
  python -m benchmarks.linear --quick    # small CPU shapes, writes nothing

Two kinds of rows. `measured: false`: a model of an H100 from exact FLOPs, from the bytes that the compiled program's kernels
read and write (every kernel its operands once and its results once; compiled for sm_90a, never run), and from two assumed
rates. `measured: true`: this machine's CPU, both ops on the same inputs in turns.

One launch for both could do two things for a linear head: skip the passes that separate kernels make (down to reading q, k, v
and writing the output once), and overlap what is left with the sparse heads' products. The rows tell the two apart.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import rows, timing
from freqformer.cost import Cost
from freqformer.layout import TileLayout
from freqformer.methods.sparse_linear import SparseLinear
from freqformer.methods.sparseflow import SparseFlow
from kernels import offline
from kernels.attention import attention
from kernels.linear import Segments, linear_attention

_QUICK = flags.DEFINE_bool("quick", False, "Small CPU shapes and few repeats; writes no rows.", allow_override=True)

# Assumed for an H100 until measured: 85 % of the best published dense attention rate (697 TFLOP/s), and a plain copy.
TENSOR_RATE, COPY_RATE = 0.85 * 697e12, 3.0e12
GRIDS = {"64k": (16, 64, 64), "128k": (32, 64, 64)}
SPLIT = (7, 5)  # sparse and linear heads: the router's prior, in whole heads
# Instructions that move nothing: they name or view another's result.
_FREE = ("parameter", "get-tuple-element", "bitcast", "tuple", "constant")
_SIZES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "pred": 1, "s8": 1, "u8": 1}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Tokens and heads of one comparison; `block` rows per tile."""

  grid: tuple[int, int, int]
  heads: int
  head_dim: int
  block: int = 128

  def layout(self) -> TileLayout:
    return TileLayout.fit(self.grid, self.block)


def type_bytes(text: str) -> int:
  """Bytes of an HLO type, a tuple's parts added up: `(bf16[2,3]{1,0}, f32[])` is 16."""
  found = re.findall(r"(\w+)\[([\d,]*)\]", text)
  return sum(_SIZES[kind] * int(np.prod([int(x) for x in dims.split(",") if x], dtype=np.int64)) for kind, dims in found)


def program_bytes(hlo: str) -> tuple[int, int]:
  """Bytes that the kernels of a scheduled HLO module read and write, each operand and result once; and how many there are."""
  entry = hlo[hlo.index("\nENTRY ") :]
  sizes, total, kernels = {}, 0, 0
  for line in entry[: entry.index("\n}")].splitlines()[1:]:
    match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)", line)
    if not match:
      continue
    name, kind, op, operands = match.groups()
    sizes[name] = type_bytes(kind)
    if op not in _FREE:
      kernels += 1
      total += sizes[name] + sum(sizes.get(x, 0) for x in re.findall(r"%([\w.\-]+)", operands))
  return total, kernels


def sparseflow(name: str, shape: Shape, method: SparseFlow) -> dict:
  """The H100 model's row of SparseFlow: routed methods run the op on all heads, fixed allocations on their linear heads."""
  layout, allocation = shape.layout(), SPLIT if method.routed else method.allocation
  heads = shape.heads if method.routed else method.allocation[1]
  call = lambda q, k, v, frames: linear_attention(q, k, v, frames, feature_map=method.feature_map)[0]
  cost = method.cost(layout, shape.heads, shape.head_dim, allocation)
  return modelled(name, shape, cost, heads, call, method.tables(layout).frames) | {"allocation": allocation}


def sparse_linear(name: str, shape: Shape, method: SparseLinear) -> dict:
  """The H100 model's row of sparse-linear attention: every head reads the sums of its marginal tiles."""
  layout = shape.layout()
  tiles = jax.ShapeDtypeStruct((1, shape.heads, layout.tiles, layout.tiles), jnp.bool_)
  call = lambda q, k, v, segments, reads: linear_attention(q, k, v, segments, reads=reads, feature_map=method.feature_map)[0]
  segments = Segments.of_tiles(layout.arrays().kv_len, layout.block)
  cost = method.cost(layout, shape.heads, shape.head_dim)
  return modelled(name, shape, cost, shape.heads, call, segments, tiles)


def modelled(name: str, shape: Shape, cost: Cost, heads: int, call, *args) -> dict:
  """Seconds of `call(q, k, v, *args)` on `heads` heads, as compiled and at the least bytes, beside the sparse launch."""
  layout = shape.layout()
  x = jax.ShapeDtypeStruct((1, layout.n_buffer, heads, shape.head_dim), jnp.bfloat16)
  compiled = offline.compile_for(call, x, x, x, *args)
  moved, kernels = program_bytes(compiled.compiled.as_text())
  least = 4 * x.size * 2  # q, k, v in, the output out
  sparse_s, linear_s, least_s = cost.attention_flops / TENSOR_RATE, moved / COPY_RATE, least / COPY_RATE
  linear_s, least_s = (max(s, cost.linear_flops / TENSOR_RATE) for s in (linear_s, least_s))
  return {
    "name": f"h100_{name}",
    "value": linear_s / sparse_s,
    "unit": "x",
    "goal": None,
    "met": None,
    "measured": False,
    "what": "seconds of linear attention as compiled, over seconds of the sparse launch",
    "rates": "assumed: 592 TFLOP/s (85 % of 697), 3.0 TB/s",
    "n": layout.n,
    "heads": shape.heads,
    "head_dim": shape.head_dim,
    "linear_attention_on_heads": heads,
    "density": cost.attention_flops / (4.0 * layout.n**2 * shape.heads * shape.head_dim),
    "sparse_flops": cost.attention_flops,
    "linear_flops": cost.linear_flops,
    "linear_bytes": moved,
    "linear_bytes_least": least,
    "linear_kernels": kernels,
    "temp_bytes": compiled.temp_bytes,
    "sparse_s": sparse_s,
    "linear_s": linear_s,
    "linear_least_s": least_s,
    "fewer_passes_gain": (linear_s - least_s) / (sparse_s + linear_s),
    # What one launch could win over a separate kernel at the least bytes: that kernel's whole time, hidden.
    "same_launch_gain_at_most": least_s / (sparse_s + least_s),
  }


def measured(shape: Shape, method: SparseFlow, rounds: int) -> dict:
  """One row of this machine: linear attention over the sparse call of all-sparse heads at t = 1/2."""
  layout = shape.layout()
  tables = jax.tree.map(jnp.asarray, method.tables(layout))
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, layout.n_buffer, shape.heads, shape.head_dim))

  @functools.partial(jax.jit, static_argnums=0)
  def run(linear, q, k, v, tables):
    if linear:
      return linear_attention(q, k, v, tables.frames, feature_map=method.feature_map)[0]
    return attention(q, k, v, method.mask_at(tables, jnp.full(1, 0.5)))[0]

  others = timing.Bystanders()
  calls = {"linear": lambda: run(True, q, k, v, tables), "sparse": lambda: run(False, q, k, v, tables)}
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
    for name, grid in GRIDS.items():
      shape = Shape(grid, 12, 128)
      found += [sparseflow(f"sparseflow_{m}_{name}", shape, method) for m, method in methods.items()]
      found.append(sparse_linear(f"sparse_linear_{name}", shape, SparseLinear()))
    found += [measured(Shape((16, 32, 32), 4, 64), SparseFlow(), 7)]
    rows.write_rows("linear", found, "python -m benchmarks.linear")
  print(rows.table(found))


if __name__ == "__main__":
  app.run(main)
