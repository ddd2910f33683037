"""3-D rotary position embedding at real-valued positions (RoPE, arXiv 2104.09864, per axis)."""

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.kernels.around.prepare import turn


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


def rotate(x: jax.Array, positions, theta: float = 10_000.0) -> jax.Array:
  """Rotates pairs of channels by position * theta^(-i / pairs); each axis has its own channels.

  Args:
    x: `[b, n, h, d]`; channel i is paired with i + d / 2.
    positions: float `[n, 3]`, (t, y, x) in tokens; a coarse token sits at its cell's centre.
  """
  return turn(x, *angle_tables(positions, x.shape[-1], theta))


def level_theta(theta, factor, head_dim):
  return tuple(max(8.0, t / f**1.5) for t, f in zip(theta, factor))


def angle_tables(positions, head_dim: int, theta=10_000.0) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of `rotate`'s angles at `positions` `[n, 3]`, float32 `[n, head_dim / 2]`."""
  # Each channel has a frequency on its own axis and zeros elsewhere, so that the sums are exact.
  frequencies = np.zeros((3, head_dim // 2), np.float32)
  start = 0
  for axis, pairs in enumerate(axis_pairs(head_dim)):
    exponents = -np.arange(pairs, dtype=np.float32) / max(pairs, 1)
    base = np.broadcast_to(np.asarray(theta, np.float32), 3)[axis]
    frequencies[axis, start : start + pairs] = base**exponents
    start += pairs
  positions = jnp.asarray(positions, jnp.float32)
  angles = sum(positions[:, axis, None] * frequencies[axis] for axis in range(3))
  return jnp.cos(angles), jnp.sin(angles)
