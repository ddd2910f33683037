"""The Hopper kernel of `kernels.selection.topk`: the k-th largest score of each row.

A thread block is one warpgroup and takes one row. It reads the row once, as integers in the order
of the floats, keeps it in registers and halves the range of all integers 32 times by counting.
XLA's bisection, which needs fewer rounds, reads all rows in every one of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.core.target import Target
from freqformer.kernels.hopper.launch import launch, streaming_cost
from freqformer.kernels.hopper.machine import wrong_device
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

MOST = 1 << 14  # candidates of a row: 128 registers of a thread hold them
_THREADS = 128  # of a warpgroup
_ROUNDS = 32  # of halving: bits of an integer
_REDUCTION_BYTES = 1024  # shared memory for counts, which are summed across warps
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float but its sign
_INFINITY = np.int32(0x7F800000)
_LEAST = np.int32(-(1 << 31))


def unsupported(scores, target: Target) -> str | None:
  """Returns all reasons why the kernel cannot bisect these rows; None if it can."""
  reasons = [wrong_device(target)]
  if scores.dtype != jnp.float32 or scores.shape[-1] > MOST:
    reasons.append(
      f"scores are {scores.dtype} over {scores.shape[-1]} candidates, it takes float32 over "
      f"at most {MOST}"
    )
  return "; ".join(filter(None, reasons)) or None


def forward(scores, always, *, budget: int) -> jax.Array:
  """Returns each row's `budget`-th largest score, as uint32 `[...]` in the order of the floats.

  Args:
    scores: float32 `[..., m]`; -0 counts as 0.
    always: int32 `[rows of the last axis but one, f]`, candidates that count as infinite, or None.
  """
  *lead, m = scores.shape
  scores = jnp.pad(scores, [(0, 0)] * len(lead) + [(0, -m % _THREADS)])
  scores = scores.reshape(-1, scores.shape[-1] // _THREADS, _THREADS)
  rows, *shape = scores.shape
  shape = tuple(shape)
  layout = plgpu.Layout.WG_STRIDED(shape, vec_size=1)

  def kth_largest_score(scores_gm, always_gm, out_gm, row_sm, full):
    row = lax.axis_index("block")
    plgpu.copy_gmem_to_smem(scores_gm.at[row], row_sm, full)
    plgpu.barrier_wait(full)
    # Integers in the order of the floats.
    bits = lax.bitcast_convert_type(plgpu.load(row_sm, layout=layout), jnp.int32)
    keys = jnp.where(bits < 0, bits ^ _MAGNITUDE, bits)
    keys = jnp.where(keys == -1, 0, keys)  # -0
    group, lane = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout) for axis in (0, 1))
    place = group * _THREADS + lane
    if m % _THREADS:  # what was appended lies below everything, NaN too
      keys = jnp.where(place < m, keys, _LEAST)
    for i in range(0 if always is None else always.shape[-1]):
      fixed = always_gm[lax.rem(row, jnp.int32(always.shape[0])), i]
      keys = jnp.where(place == fixed, _INFINITY, keys)

    def halve(_, bracket):
      low, high = bracket  # low is reached by at least `budget` keys, high by fewer
      middle = low + lax.shift_right_logical(high - low, jnp.int32(1))
      up = (keys >= middle).astype(jnp.int32).sum() >= budget
      return jnp.where(up, middle, low), jnp.where(up, high, middle)

    low, _ = lax.fori_loop(0, _ROUNDS, halve, (_LEAST, _INFINITY + 1))
    out_gm[row] = low

  operands = (scores, None if always is None else jnp.asarray(always, jnp.int32))
  result = jax.ShapeDtypeStruct((rows,), jnp.int32)
  (found,) = launch(
    kth_largest_score,
    operands,
    [result],
    [plgpu.SMEM(shape, jnp.float32), plgpu.Barrier()],
    blocks=rows,
    cost=streaming_cost(operands, result, _ROUNDS * scores.size),
    approx_math=False,  # comparisons decide
    reduction_bytes=_REDUCTION_BYTES,
  )
  return (lax.bitcast_convert_type(found, jnp.uint32) ^ jnp.uint32(1 << 31)).reshape(lead)
