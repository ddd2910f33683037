"""Launching a Hopper kernel: every kernel of the project goes through here, with what it costs.

`plgpu.kernel` would do but for one thing: it takes no estimate of a kernel's cost. `pl.kernel`, which it wraps, does.
"""

import functools
import math

import jax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def launch(
  body,
  operands,
  out_type,
  scratch,
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
    body: takes references to the operands, the results and the scratch memory, one argument per entry of the three sequences.
    operands: trees of arrays, or of references that the kernel writes to.
    out_type: trees of `ShapeDtypeStruct`; scratch: trees of Mosaic GPU's memory and barrier types.
    blocks: how many.
    cost: of all blocks together. Mosaic GPU of JAX 0.11.2 takes it and does not use it; `tools.program_cost` reads it.
    warpgroups: of a thread block.
    by_lane: lowers by lane, where the body gives every layout: inferring them costs seconds of each compile.
    approx_math: lets exponentials and divisions be the hardware's.
    reduction_bytes: shared memory for sums across warps. Rows of an accumulator lie within four lanes and need none.

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
    out = _varying_like(operands, list(out_type))
    call = pl.kernel(
      with_scratch,
      out_type=out,
      mesh=mesh,
      compiler_params=params,
      cost_estimate=cost,
      name=body.__name__,
    )
    return call(*operands)

  return sequential_vmap(run)(*operands)


def _varying_like(operands, out_type):
  """Inside `shard_map`, results vary over every mesh axis that some operand varies over."""
  varying = frozenset().union(
    *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands))
  )

  def typed(x):
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying)
    )

  return jax.tree.map(typed, out_type)


def streaming_cost(operands, out_type, flops: float) -> pl.CostEstimate:
  """Of a kernel that reads every operand and writes every result once.

  Args:
    flops: of its products, or of whatever it does most.
  """
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((operands, out_type)))
  return pl.CostEstimate(flops=int(flops), transcendentals=0, bytes_accessed=moved)
