"""Scores in powers of two, and those that may not be seen: numbers that all GPU kernels share."""

import math

import numpy as np

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
