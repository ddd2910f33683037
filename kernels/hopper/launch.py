"""Launches of Hopper kernels: every kernel of the project goes through here, with its cost.

`pl.kernel` takes an estimate of that cost; `plgpu.kernel`, which wraps it, takes none.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
from freqformer.kernels.core.varying import varying_axes
from freqformer.kernels.hopper.machine import MULTIPROCESSORS
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Thread blocks that keep a GPU busy where two run at once on a multiprocessor: four rounds, so
# that the last round is at least four fifths full.  # choice: 4
STREAMING_BLOCKS = 4 * 2 * MULTIPROCESSORS


def launch(
  body: Callable,
  operands: Sequence,
  out_type: Sequence,
  scratch: Sequence,
  *,
  blocks: int,
  cost: pl.CostEstimate,
  warpgroups: int = 1,
  by_lane: bool = False,
  approx_math: bool = True,
  reduction_bytes: int = 0,
) -> list:
  """Runs a kernel on a grid of thread blocks (axis "block") of warpgroups (axis "warpgroup").

  Args:
    body: takes references to operands, results and scratch, one argument per entry of each.
    operands: trees of arrays, or of references that the kernel writes to.
    out_type: trees of `ShapeDtypeStruct`.
    scratch: trees of Mosaic GPU's memory and barrier types.
    blocks: number of thread blocks.
    cost: of all blocks. Mosaic GPU of JAX 0.11.2 ignores it; `tools.program_cost` reads it.
    warpgroups: of a thread block.
    by_lane: lowers by lane. The body must give every layout; inferring them takes seconds.
    approx_math: allows the hardware's approximate exponentials and divisions.
    reduction_bytes: shared memory for sums across warps. Rows of an accumulator lie within four
      lanes and need none.

  Returns:
    A list like `out_type`. Under `jax.vmap` the launches follow each other.
  """
  semantics = plgpu.LoweringSemantics.Lane if by_lane else plgpu.LoweringSemantics.Warpgroup
  params = plgpu.CompilerParams(
    approx_math=approx_math, reduction_scratch_bytes=reduction_bytes, lowering_semantics=semantics
  )
  mesh = plgpu.Mesh(
    grid=(blocks,), grid_names=("block",), num_threads=warpgroups, thread_name="warpgroup"
  )

  def with_scratch(*refs):
    # Not by `pl.kernel`, which does not know memory in transformed layouts.
    pl.run_scoped(functools.partial(body, *refs), *scratch, collective_axes="warpgroup")

  def run(*operands):
    call = pl.kernel(
      with_scratch,
      out_type=_varying_like(operands, list(out_type)),
      mesh=mesh,
      compiler_params=params,
      cost_estimate=cost,
      name=body.__name__,
    )
    return call(*operands)

  return sequential_vmap(run)(*operands)


def _varying_like(operands, out_type):
  """Returns `out_type` as inside `shard_map`: varying over each axis that some operand does."""
  varying = varying_axes(operands)

  def typed(x):
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying)
    )

  return jax.tree.map(typed, out_type)


def streaming_cost(operands, out_type, flops: float) -> pl.CostEstimate:
  """Returns the cost of a kernel that reads every operand and writes every result once."""
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((operands, out_type)))
  return pl.CostEstimate(flops=int(flops), transcendentals=0, bytes_accessed=moved)


def streaming_heads(heads: int, tiles: int) -> int:
  """Returns the heads of a tile that one thread block of a streaming kernel walks over.

  It is the largest divisor of `heads` that leaves `STREAMING_BLOCKS` blocks, or 1.
  """
  dividing = [share for share in range(1, heads + 1) if heads % share == 0]
  enough = [share for share in dividing if tiles * (heads // share) >= STREAMING_BLOCKS]
  return max(enough, default=1)


def set_registers(count: int, action: str):
  """Sets this warpgroup's registers per thread (0: unchanged) by "increase" or "decrease"."""
  if count:
    plgpu.set_max_registers(count, action=action)
