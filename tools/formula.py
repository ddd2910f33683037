"""Weights by a formula: whoever computes them has the same bits, so that no weights are stored.

Goldens of other implementations (`tools/wan_golden.py`) and the tests that compare ours with them
fill their models by it.
"""

import zlib

import numpy as np

_MULTIPLIER = np.uint32(2654435761)  # 2^32 over the golden ratio
_ROUNDS = ((16, np.uint32(0x7FEB352D)), (15, np.uint32(0x846CA68B)))
_LAST_SHIFT = 16
_BIAS = 0.1
_GAIN = 0.2
_TABLE = 0.3


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns float32 values of unit variance, uniform, of a name: a hash of each place and it."""
  places = np.arange(np.prod(shape, dtype=int), dtype=np.uint32)
  with np.errstate(over="ignore"):
    bits = places * _MULTIPLIER + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in _ROUNDS:
      bits = (bits ^ (bits >> np.uint32(shift))) * factor
    bits ^= bits >> np.uint32(_LAST_SHIFT)
  uniform = bits.astype(np.float64) / 2**31 - 1
  return (3**0.5 * uniform).reshape(shape).astype(np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns a parameter: a bias near 0, a gain near 1, a matrix that keeps variance."""
  x = values(name, shape)
  if name.endswith("bias"):
    return np.float32(_BIAS) * x
  if "norm" in name or name.endswith("gamma"):
    return 1 + np.float32(_GAIN) * x
  if "scale_shift_table" in name:
    return np.float32(_TABLE) * x
  return x / np.float32(np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else x


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
  """Returns the parameter of each name."""
  return {name: weight(name, tuple(shape)) for name, shape in shapes.items()}
