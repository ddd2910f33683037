"""The Hopper kernel of `kernels.selection.topk`: a row's k-th largest score, found where the row lies, in shared memory and registers.

A thread block is one warpgroup and takes one row. It reads it once, as integers in the order of the floats, and halves the
range of all integers 32 times by counting. XLA's bisection, which needs fewer rounds, reads all rows in every one of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.core.target import Target
from freqformer.kernels.hopper import parts
from freqformer.kernels.hopper.launch import launch, streaming_cost
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

MOST = 1 << 14  # candidates of a row: 128 registers of a thread hold them
_LANES = 128
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_LEAST = np.int32(-(1 << 31))


def unsupported(scores, target: Target) -> str | None:
  """Returns why these rows cannot be bisected by the kernel, all reasons at once; None if they can."""
  reasons = [reason for reason in [parts.wrong_device(target)] if reason]
  if scores.dtype != jnp.float32 or scores.shape[-1] > MOST:
    reasons.append(
      f"scores are {scores.dtype} over {scores.shape[-1]} candidates, it takes float32 over at most "
      f"{MOST}"
    )
  return "; ".join(reasons) or None


def kth_largest(budget: int, scores, always=None):
  """The `budget`-th largest score of each row `[..., m]`, as uint32 in the order of the floats (-0 is 0): `[...]`.

  `always`: int32 `[rows of the last axis but one, f]`, candidates that count as infinite, or None.
  """
  *lead, m = scores.shape
  scores = jnp.pad(scores, [(0, 0)] * len(lead) + [(0, -m % _LANES)])
  scores = scores.reshape(-1, scores.shape[-1] // _LANES, _LANES)
  rows, *shape = scores.shape
  layout = plgpu.Layout.WG_STRIDED(tuple(shape), vec_size=1)

  def kth_largest_score(scores_gm, always_gm, out_gm, row_sm, full):
    row = lax.axis_index("block")
    plgpu.copy_gmem_to_smem(scores_gm.at[row], row_sm, full)
    plgpu.barrier_wait(full)
    bits = lax.bitcast_convert_type(plgpu.load(row_sm, layout=layout), jnp.int32)
    keys = jnp.where(bits < 0, bits ^ _MAGNITUDE, bits)
    keys = jnp.where(keys == -1, 0, keys)  # -0
    group, lane = (
      plgpu.broadcasted_iota(jnp.int32, tuple(shape), axis, layout=layout) for axis in (0, 1)
    )
    place = group * _LANES + lane
    if m % _LANES:  # what was appended lies below everything, NaN too
      keys = jnp.where(place < m, keys, _LEAST)
    for i in range(0 if always is None else always.shape[-1]):
      keys = jnp.where(
        place == always_gm[lax.rem(row, jnp.int32(always.shape[0])), i], _INFINITY, keys
      )

    def halve(_, bracket):
      low, high = bracket  # low is reached by at least `budget` keys, high by fewer
      middle = low + lax.shift_right_logical(high - low, jnp.int32(1))
      up = (keys >= middle).astype(jnp.int32).sum() >= budget
      return jnp.where(up, middle, low), jnp.where(up, high, middle)

    low, _ = lax.fori_loop(0, 32, halve, (_LEAST, _INFINITY + 1))
    out_gm[row] = low

  operands = (scores, None if always is None else jnp.asarray(always, jnp.int32))
  result, scratch = (
    jax.ShapeDtypeStruct((rows,), jnp.int32),
    [plgpu.SMEM(tuple(shape), jnp.float32), plgpu.Barrier()],
  )
  cost = streaming_cost(operands, result, 32 * scores.size)
  # Exact: comparisons decide. Counts are summed across warps.
  launched = launch(
    kth_largest_score,
    operands,
    [result],
    scratch,
    blocks=rows,
    cost=cost,
    approx_math=False,
    reduction_bytes=1024,
  )
  (found,) = launched
  return (lax.bitcast_convert_type(found, jnp.uint32) ^ jnp.uint32(1 << 31)).reshape(lead)


def forward(scores, always, *, budget):
  """Returns each row's `budget`-th largest score, as `kernels.selection.topk.forward`."""
  return kth_largest(budget, scores, always)
