"""3-D rotary position embedding at real-valued positions (RoPE, arXiv 2104.09864, per axis).

An axis with p pairs of channels turns them by `position * theta^(-i / p)`, i = 0 .. p - 1: from 1
radian a token down to `theta^(-(p - 1) / p)`. The base of language models, 10,000, has nothing in
between where a head is small: with 3 pairs their periods are 6.3, 135 and 2,916 tokens, so that no
sum of them is local on an axis of 12. Bases therefore follow the grid, one per axis.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.kernels.around.prepare import turn

# The slowest period in lengths of the axis. choice: at 4 its cosine still falls over twice the
# axis, so that a model may sample twice the length that it was trained on.
REACH = 4
ROPE_RULES = ("trained", "ntk")


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
  """Rotated pairs per axis (t, y, x): equal shares of `head_dim // 2`, the rest to y, then x.

  Raises:
    ValueError: if head_dim is odd.
  """
  if head_dim % 2:
    raise ValueError(
      f"rotary needs an even head dimension, got {head_dim}; choose width / heads even."
    )
  share, rest = divmod(head_dim // 2, 3)
  return share, share + (rest > 0), share + (rest > 1)


def grid_theta(grid: Sequence[int], head_dim: int) -> tuple[float, float, float]:
  """Returns the base per axis (t, y, x) whose slowest period is `REACH` times the axis's length.

  The fastest pair turns by 1 radian a token whatever the base, so that a step is resolved. It is
  the only one on an axis with one pair, where the base has no effect and is 1. It is also 1 on an
  axis of one token, whose positions are all 0.
  """
  periods = [REACH * length / (2 * math.pi) for length in grid]  # in turns of the fastest pair
  return _bases(periods, [1.0] * 3, axis_pairs(head_dim))


def level_theta(
  theta: Sequence[float],
  factor: Sequence[int],
  head_dim: int,
  shares: tuple[int, int, int] | None = None,
) -> tuple[float, float, float]:
  """Returns the base per axis for positions that are counted in cells instead of tokens.

  The slowest period covers as many tokens as that of `theta` does. The base is never below 1: then
  all pairs turn by 1 radian a cell, and a step is still resolved.

  Args:
    theta: base per axis (t, y, x) for positions in tokens.
    factor: tokens per cell along each axis.
    head_dim: channels of a head.
    shares: rotated pairs per axis; None: `axis_pairs`.
  """
  return _bases([1 / f for f in factor], theta, shares or axis_pairs(head_dim))


def longer_theta(
  theta: Sequence[float], trained: Sequence[int], grid: Sequence[int], head_dim: int, rule: str
) -> tuple[float, float, float]:
  """Returns the base per axis for sampling on another grid than the trained one.

  "trained" keeps the bases: a step turns as it did in training, and positions beyond the trained
  ones are new. "ntk" (NTK-aware scaling, arXiv 2309.00071, section 3.1) multiplies the base of an
  axis that is s times as long by `s^(p / (p - 1))`: over the longer axis its slowest pair turns
  as it did over the trained one, and its fastest still resolves a step. An axis with one pair has
  no choice, a shorter axis needs none.

  Args:
    theta: bases in training.
    trained: tokens per axis (t, y, x) in training.
    grid: tokens per axis to be sampled.
    head_dim: channels of a head.
    rule: one of `ROPE_RULES`.
  """
  if rule == "trained":
    return tuple(theta)
  stretch = [max(1.0, new / old) for new, old in zip(grid, trained, strict=True)]
  return _bases(stretch, theta, axis_pairs(head_dim))


def _bases(stretch, theta, shares) -> tuple[float, float, float]:
  """Returns bases whose slowest periods are `stretch` times those of `theta`, at least 1."""
  found = []
  for scale, base, pairs in zip(stretch, theta, shares, strict=True):
    exponent = pairs / (pairs - 1) if pairs > 1 else 0.0
    found.append(max(1.0, float(base) * scale**exponent))
  return tuple(found)


def rotate(x: jax.Array, positions, theta: float | Sequence[float]) -> jax.Array:
  """Rotates pairs of channels by position * theta^(-i / pairs); each axis has its own channels.

  Args:
    x: `[b, n, h, d]`; channel i is paired with i + d / 2.
    positions: float `[n, 3]`, (t, y, x) in tokens; a coarse token sits at its cell's centre.
    theta: the base, one for all axes or one each.
  """
  return turn(x, *angle_tables(positions, x.shape[-1], theta))


def angle_tables(
  positions,
  head_dim: int,
  theta: float | Sequence[float],
  shares: tuple[int, int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of `rotate`'s angles, float32 `[n, head_dim / 2]` each.

  Args:
    positions: `[n, 3]`, (t, y, x) in tokens.
    head_dim: channels of a head.
    theta: the base, one for all axes or one each.
    shares: rotated pairs per axis, together `head_dim / 2`; None: `axis_pairs`.
  """
  # Each channel has a frequency on its own axis and zeros elsewhere, so that the sums are exact.
  bases = np.broadcast_to(np.asarray(theta, np.float32), 3)
  frequencies = np.zeros((3, head_dim // 2), np.float32)
  start = 0
  for axis, pairs in enumerate(shares or axis_pairs(head_dim)):
    exponents = -np.arange(pairs, dtype=np.float32) / max(pairs, 1)
    frequencies[axis, start : start + pairs] = bases[axis] ** exponents
    start += pairs
  positions = jnp.asarray(positions, jnp.float32)
  angles = sum(positions[:, axis, None] * frequencies[axis] for axis in range(3))
  return jnp.cos(angles), jnp.sin(angles)
