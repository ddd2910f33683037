"""Orthonormal DCT-II and Haar transforms of one axis with their coarse samples; NumPy, float64."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np

Kind = Literal["block_haar", "block_dct", "dct", "haar"]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
  """The transform of e neighbouring tokens along an axis.

  Attributes:
    analyse: `[m, e]`, rows by rising frequency.
    up: U `[e, k]`.
    centres: `[k]`, places of the coarse samples, from the block's first token.
  """

  analyse: np.ndarray
  up: np.ndarray
  centres: np.ndarray


@functools.lru_cache(maxsize=256)
def block(kind: Literal["dct", "haar"], length: int, low: float, mid: float) -> Block:
  """The rows below both cuts of one block (or whole axis) of `length` tokens."""
  k = rows_below(length, low)
  m = rows_below(length, mid)
  if kind == "haar":
    rows = haar(length, levels=round(-math.log2(low)))[:m]
    return Block(rows, rows[:k].T, np.square(rows[:k]) @ np.arange(length))
  rows = dct(length)[:m]
  return Block(rows, rows[:k].T @ dct(k), (np.arange(k) + 0.5) * length / k - 0.5)


def rows_below(length: int, cut: float) -> int:
  """Number of rows i with i / length < cut; forgives that 25 * 0.28 is 7.000000000000001."""
  return max(1, math.ceil(length * cut - 1e-9))


def dct(length: int) -> np.ndarray:
  """Orthonormal DCT-II, `[length, length]`, rows by rising frequency."""
  i, j = np.ogrid[:length, :length]
  rows = np.sqrt(2 / length) * np.cos(np.pi * i * (2 * j + 1) / (2 * length))
  rows[0] = np.sqrt(1 / length)
  return rows


def dct_power(clips: Iterable[np.ndarray]) -> np.ndarray:
  """Returns the mean squared DCT coefficients over clips `[t, y, x, c]` of one shape, float64.

  Raises:
    ValueError: there are no clips.
  """
  total = 0.0
  count = 0
  for clip in clips:
    x = np.asarray(clip, np.float64)
    for axis in range(3):
      x = np.moveaxis(np.tensordot(dct(x.shape[axis]), x, (1, axis)), 0, axis)
    total = total + x**2
    count += 1
  if not count:
    raise ValueError("there are no latents to measure a spectrum of.")
  return total / count


def haar(length: int, levels: int) -> np.ndarray:
  """Haar transform, `[length, length]`: scaling rows, then details from coarse to fine.

  An odd left-over sample passes on unpaired, so a pair's supports may differ in size. Weights
  sqrt(size) (unbalanced Haar transform, Fryzlewicz 2007) keep scaling rows constant on their
  support; the plain 1/sqrt(2) would put part of a constant into the details.
  """
  scaling = np.eye(length)
  size = np.ones(length)
  details = []
  for _ in range(levels):
    paired = len(size) // 2 * 2
    a = np.sqrt(size[:paired:2, None])
    b = np.sqrt(size[1:paired:2, None])
    norm = np.hypot(a, b)
    first = scaling[:paired:2]
    second = scaling[1:paired:2]
    details.insert(0, (b * first - a * second) / norm)
    scaling = np.concatenate([(a * first + b * second) / norm, scaling[paired:]])
    size = np.concatenate([size[:paired:2] + size[1:paired:2], size[paired:]])
  return np.concatenate([scaling, *details])
