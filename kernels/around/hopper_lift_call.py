"""Hopper's implementation of `lift`: refuses a call, or lays out what the kernel reads."""

import jax
import jax.numpy as jnp
from freqformer.kernels.around.hopper_prepare_call import refusal, two_terms
from freqformer.kernels.around.lift import Expansion
from freqformer.kernels.around.prepare import MAX_CELLS
from freqformer.kernels.core.target import Target


def unsupported(packed, expansion: Expansion, target: Target) -> str | None:
  """Returns why the kernel cannot run a call, all reasons at once; None if it can."""
  tokens = packed.shape[1] - expansion.front
  most = MAX_CELLS
  if expansion.per_tile is not None and not _aligned(expansion):
    most -= 7  # it reads 64 rows from a multiple of 8 on
  return refusal(packed, tokens // expansion.tiles, expansion, target, most)


@jax.named_scope("lift")
def forward(packed, weights, low, expansion: Expansion):
  """Runs the kernel; copies begin at multiples of 8 rows, with a matrix for each shift from one."""
  from freqformer.kernels.around import hopper_lift

  classes, block, k = expansion.matrices.shape
  starts = jnp.asarray(expansion.starts, jnp.int32)
  shifts = 1 if _aligned(expansion) else 8
  matrices = jnp.asarray(expansion.matrices, jnp.float32)
  shifted = [
    jnp.pad(matrices, ((0, 0), (0, 0), (shift, MAX_CELLS - shift - k))) for shift in range(shifts)
  ]
  terms = two_terms(jnp.stack(shifted, 1).reshape(-1, block, MAX_CELLS))
  kinds = jnp.asarray(expansion.classes) * shifts + starts % shifts
  terms = terms.reshape(classes * shifts, 2, -1, hopper_lift.ROWS, MAX_CELLS)
  low = low.astype(jnp.int32)
  weights = weights.astype(jnp.float32)
  return hopper_lift.forward(packed, terms, kinds, starts // 8, low, weights)


def _aligned(expansion) -> bool:
  """Returns True if every tile's coarse tokens begin at a multiple of 8, seen from the shapes."""
  return expansion.alike and expansion.per_tile % 8 == 0
