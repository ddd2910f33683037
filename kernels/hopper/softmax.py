"""Softmax in powers of two, with scores that may not be seen (`core.log2`)."""

import jax.numpy as jnp
from freqformer.kernels.hopper.products import over_columns


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
