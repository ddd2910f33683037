"""The Hopper kernel of `kernels.around.lift`: tokens read once and written once, in the manner of `hopper_prepare`.

A thread block is one warpgroup with one tile and some heads. Pieces of 64 rows come through a ring; the matrix stays in shared
memory. Where a head has coarse rows, 64 of them around the tile's own meet the matrix, whose columns beside those are zero.
"""

import dataclasses

import jax
import jax.numpy as jnp
from freqformer.kernels.hopper import parts
from freqformer.kernels.hopper.launch import launch, streaming_cost
from freqformer.kernels.hopper.parts import ROWS
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SLOTS = 3
# As in `hopper_prepare`: what runs at once on 132 multiprocessors, times four.
BLOCKS = 4 * 2 * 132


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of a launch: `packed` `[b, rows, h, d]` with `front` rows before the tokens; `share` as in `hopper_prepare.Plan`."""

  b: int
  rows: int
  h: int
  d: int
  block: int
  front: int
  share: int = 0

  @property
  def n(self):
    return self.rows - self.front

  @property
  def tiles(self):
    return self.n // self.block

  @property
  def pieces(self):
    return self.block // ROWS

  @property
  def chunks(self):
    """Channels that are worked on at once."""
    return [pl.ds(start, 64) for start in range(0, self.d, 64)]

  @property
  def heads(self):
    if self.share:
      return self.share
    dividing = [heads for heads in range(1, self.h + 1) if self.h % heads == 0]
    return max(
      (heads for heads in dividing if self.b * self.tiles * (self.h // heads) >= BLOCKS), default=1
    )

  @property
  def flops(self):
    """Of products, in two terms, if every head has coarse rows."""
    return 4 * self.b * self.h * self.n * ROWS * self.d


def forward(plan: Plan, packed, matrices, kinds, eighths, low, weights):
  """Runs the kernel.

  Args:
    packed: bf16 `[b, rows, h, d]`; matrices: bf16 `[kinds, 2, pieces, 64, 64]`, two terms whose sum is the matrix.
    kinds: int32 `[tiles]`, each tile's matrix; eighths: int32 `[tiles]`, it multiplies the 64 rows from 8 times this on.
    low: int32 `[b, h]`; weights: float32 `[b, h]`.

  Returns:
    `[b, n, h, d]`.
  """
  groups, pieces = plan.h // plan.heads, plan.pieces

  def lift(packed_gm, matrices_gm, kinds_gm, eighths_gm, low_gm, weights_gm, result_gm, *scratch):
    ring, matrix, coarse, out, full, matrix_full, coarse_full = scratch
    program = lax.axis_index("block")
    first = lax.rem(program, jnp.int32(groups)) * plan.heads
    place = lax.div(program, jnp.int32(groups))
    sample, tile = lax.div(place, jnp.int32(plan.tiles)), lax.rem(place, jnp.int32(plan.tiles))

    def fetch(piece):
      slot, head, part = (
        lax.rem(piece, SLOTS),
        first + lax.div(piece, pieces),
        lax.rem(piece, pieces),
      )
      rows = pl.ds(plan.front + tile * plan.block + part * ROWS, ROWS)
      plgpu.copy_gmem_to_smem(packed_gm.at[sample, rows, head], ring.at[slot], full.at[slot])

    def store(piece, head, added):
      """`added`: channels -> float32 `[64, 64]` on top of the tokens."""
      slot, part = lax.rem(piece, SLOTS), lax.rem(piece, pieces)
      weight = weights_gm[sample, head]
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for columns in plan.chunks:
        x = ring.at[slot, :, columns][...].astype(jnp.float32)
        out.at[:, columns][...] = (added(x, columns, part) * weight).astype(out.dtype)

    def lifted(x, columns, part):
      def multiply(acc):
        for term in range(2):
          plgpu.wgmma(acc, matrix.at[term, part], coarse.at[:, columns])
        return acc[...]

      return x + pl.run_scoped(multiply, plgpu.ACC((ROWS, 64), jnp.float32))

    for piece in range(min(SLOTS, plan.heads * pieces)):
      fetch(jnp.int32(piece))
    for term in range(2):
      for part in range(pieces):
        plgpu.copy_gmem_to_smem(
          matrices_gm.at[kinds_gm[tile], term, part], matrix.at[term, part], matrix_full
        )
    plgpu.barrier_wait(matrix_full)

    @pl.loop(0, plan.heads * pieces)
    def _piece(piece):
      head = first + lax.div(piece, pieces)
      has_coarse = low_gm[sample, head] != 0

      @pl.when(jnp.logical_and(has_coarse, lax.rem(piece, pieces) == 0))
      def _fetch_coarse():
        plgpu.copy_gmem_to_smem(
          packed_gm.at[sample, pl.ds(eighths_gm[tile] * 8, ROWS), head], coarse, coarse_full
        )
        plgpu.barrier_wait(coarse_full)

      plgpu.barrier_wait(full.at[lax.rem(piece, SLOTS)])
      pl.when(has_coarse)(lambda: store(piece, head, lifted))
      pl.when(jnp.logical_not(has_coarse))(lambda: store(piece, head, lambda x, columns, part: x))
      plgpu.commit_smem()  # also: every thread has read the piece that is replaced next
      rows = pl.ds(tile * plan.block + lax.rem(piece, pieces) * ROWS, ROWS)
      plgpu.copy_smem_to_gmem(out, result_gm.at[sample, rows, head])
      pl.when(piece + SLOTS < plan.heads * pieces)(lambda: fetch(piece + SLOTS))

    plgpu.wait_smem_to_gmem(0)

  def tiles_type(*shape):
    return parts.tiles_type(*shape, dtype=packed.dtype)

  scratch = [
    _channels_type(SLOTS, ROWS, plan.d, dtype=packed.dtype),
    tiles_type(2, pieces, ROWS, ROWS),
    _channels_type(ROWS, plan.d, dtype=packed.dtype),
    _channels_type(ROWS, plan.d, dtype=packed.dtype),
    plgpu.Barrier(num_barriers=SLOTS),
    plgpu.Barrier(num_arrivals=2 * pieces),
    plgpu.Barrier(),
  ]
  operands = (packed, matrices, kinds, eighths, low, weights)
  result = jax.ShapeDtypeStruct((plan.b, plan.n, plan.h, plan.d), packed.dtype)
  cost = streaming_cost(operands, result, plan.flops)
  return launch(
    lift, operands, [result], scratch, blocks=plan.b * plan.tiles * groups, cost=cost, by_lane=True
  )[0]


def _channels_type(*shape, dtype):
  """Shared memory that can be cut every 64 channels."""
  return plgpu.SMEM(
    shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  )
