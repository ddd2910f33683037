"""Softmax in powers of two, with scores that may not be seen."""

import math

import jax.numpy as jnp
import numpy as np
from freqformer.kernels.hopper.products import over_columns

LOG2E = math.log2(math.e)
# The raw score of what may not be seen. Finite, so that no difference of two of them is NaN.
HIDDEN = -1e30
# A maximum below this has met hidden keys only: no score of finite bf16 or f16 rows comes near it.
DEAD = -1e25


def split_scale(scale: float) -> tuple[float, float]:
  """Returns a scale's sign, applied before keys are hidden, and a positive factor, applied after.

  The product of both is the scale in log2 units, save that a scale of 0 keeps a factor of LOG2E.
  """
  return float(np.sign(scale)), (abs(scale) or 1.0) * LOG2E


def in_log2(bias):
  """Returns a bias of scores in the units of `exp2`; None stays None."""
  return None if bias is None else bias * LOG2E


def exponentials(x, unit: float, top, columns: int):
  """Returns `exp2(x * unit - top)`, the probabilities of a stage before division by their sum.

  A fused multiply-add leaves the exact product minus a rounded maximum: over hidden scores alone
  -1e30 may leave +1e21, an infinite power. Running maxima therefore start at `DEAD`, so far above
  hidden scores that their powers are 0 however the exponents are rounded.

  Args:
    x: raw scores, float32 `[ROWS, columns]`.
    unit: factor that turns them into log2 units.
    top: running maximum of each row in log2 units, float32 `[ROWS]`.
  """
  return jnp.exp2(x * unit - over_columns(top, columns))
