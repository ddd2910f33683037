"""The Hopper kernel of `kernels.around.lift`: tokens are read once and written once.

A thread block is one warpgroup with one tile and some heads, as in `hopper_prepare`. Pieces of 64
rows come through a ring; the matrix stays in shared memory. For low-band heads it multiplies a
64-row window of coarse rows that contains the tile's own, and is zero in the other columns.
"""

import jax
import jax.numpy as jnp
from freqformer.kernels.hopper.launch import launch, streaming_cost, streaming_heads
from freqformer.kernels.hopper.machine import ROWS
from freqformer.kernels.hopper.products import tiles_type
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SLOTS = 3  # pieces in the ring
COLUMNS = 64  # channels that are worked on at once
TERMS = 2  # 16-bit terms of a matrix


def forward(packed, matrices, kinds, eighths, low, weights):
  """Runs the kernel; returns the tokens `[b, n, h, d]`, the last n rows of `packed`.

  Args:
    packed: bf16 `[b, rows, h, d]`.
    matrices: bf16 `[kinds, 2, pieces, 64, 64]`, two terms whose sum is the matrix.
    kinds: int32 `[tiles]`, the matrix of each tile.
    eighths: int32 `[tiles]`; a tile's matrix multiplies the 64 rows that begin at 8 times this.
    low: int32 `[b, h]`, nonzero where a head has coarse rows.
    weights: float32 `[b, h]`, factors of the results.
  """
  b, rows, h, d = packed.shape
  tiles = len(kinds)
  pieces = matrices.shape[2]
  block = pieces * ROWS
  n = tiles * block
  front = rows - n
  heads = streaming_heads(h, b * tiles)  # that one thread block walks over
  groups = h // heads
  channels = [pl.ds(start, COLUMNS) for start in range(0, d, COLUMNS)]

  def lift(packed_gm, matrices_gm, kinds_gm, eighths_gm, low_gm, weights_gm, result_gm, *scratch):
    ring, matrix, coarse, out, full, matrix_full, coarse_full = scratch
    program = lax.axis_index("block")
    first = lax.rem(program, jnp.int32(groups)) * heads
    place = lax.div(program, jnp.int32(groups))
    sample = lax.div(place, jnp.int32(tiles))
    tile = lax.rem(place, jnp.int32(tiles))

    def fetch(piece):
      slot = lax.rem(piece, SLOTS)
      head = first + lax.div(piece, pieces)
      part = lax.rem(piece, pieces)
      rows = pl.ds(front + tile * block + part * ROWS, ROWS)
      plgpu.copy_gmem_to_smem(packed_gm.at[sample, rows, head], ring.at[slot], full.at[slot])

    def lifted(x, columns, part):
      def multiply(acc):
        for term in range(TERMS):
          plgpu.wgmma(acc, matrix.at[term, part], coarse.at[:, columns])
        return acc[...]

      return x + pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.float32))

    def unchanged(x, columns, part):
      del columns, part
      return x

    def finish(piece, head, added):
      """Writes a piece to `out`; `added` puts coarse rows on top of its tokens."""
      slot = lax.rem(piece, SLOTS)
      part = lax.rem(piece, pieces)
      weight = weights_gm[sample, head]
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for columns in channels:
        x = ring.at[slot, :, columns][...].astype(jnp.float32)
        out.at[:, columns][...] = (added(x, columns, part) * weight).astype(out.dtype)

    for piece in range(min(SLOTS, heads * pieces)):
      fetch(jnp.int32(piece))
    for term in range(TERMS):
      for part in range(pieces):
        source = matrices_gm.at[kinds_gm[tile], term, part]
        plgpu.copy_gmem_to_smem(source, matrix.at[term, part], matrix_full)
    plgpu.barrier_wait(matrix_full)

    @pl.loop(0, heads * pieces)
    def _piece(piece):
      head = first + lax.div(piece, pieces)
      has_coarse = low_gm[sample, head] != 0

      @pl.when(jnp.logical_and(has_coarse, lax.rem(piece, pieces) == 0))
      def _fetch_coarse():
        window = packed_gm.at[sample, pl.ds(eighths_gm[tile] * 8, ROWS), head]
        plgpu.copy_gmem_to_smem(window, coarse, coarse_full)
        plgpu.barrier_wait(coarse_full)

      plgpu.barrier_wait(full.at[lax.rem(piece, SLOTS)])
      pl.when(has_coarse)(lambda: finish(piece, head, lifted))
      pl.when(jnp.logical_not(has_coarse))(lambda: finish(piece, head, unchanged))
      plgpu.commit_smem()  # also: every thread has read the piece that is replaced next
      rows = pl.ds(tile * block + lax.rem(piece, pieces) * ROWS, ROWS)
      plgpu.copy_smem_to_gmem(out, result_gm.at[sample, rows, head])
      pl.when(piece + SLOTS < heads * pieces)(lambda: fetch(piece + SLOTS))

    plgpu.wait_smem_to_gmem(0)

  scratch = [
    tiles_type(SLOTS, ROWS, d, dtype=packed.dtype),
    tiles_type(TERMS, pieces, ROWS, ROWS, dtype=packed.dtype),
    tiles_type(ROWS, d, dtype=packed.dtype),
    tiles_type(ROWS, d, dtype=packed.dtype),
    plgpu.Barrier(num_barriers=SLOTS),
    plgpu.Barrier(num_arrivals=TERMS * pieces),
    plgpu.Barrier(),
  ]
  operands = (packed, matrices, kinds, eighths, low, weights)
  result = jax.ShapeDtypeStruct((b, n, h, d), packed.dtype)
  flops = TERMS * 2 * b * h * n * ROWS * d  # as if every head had coarse rows
  (found,) = launch(
    lift,
    operands,
    [result],
    scratch,
    blocks=b * tiles * groups,
    cost=streaming_cost(operands, result, flops),
    by_lane=True,
  )
  return found
