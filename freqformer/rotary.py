"""3-D rotary position embedding for tokens at real-valued positions (RoPE, arXiv 2104.09864, split over t, y, x)."""

import jax
import jax.numpy as jnp
import numpy as np


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
  """Rotated pairs per axis (t, y, x): equal shares of `head_dim // 2`, what is left over goes to y, then x.

  Raises:
    ValueError: if head_dim is odd.
  """
  if head_dim % 2:
    raise ValueError(f"rotary needs an even head dimension, got {head_dim}; choose width / heads even.")
  share, rest = divmod(head_dim // 2, 3)
  return share, share + (rest > 0), share + (rest > 1)


def rotate(x: jax.Array, positions, theta: float = 10_000.0) -> jax.Array:
  """Rotates pairs of channels by angles position * theta^(-i / pairs), each axis its own channels.

  Args:
    x: `[b, n, h, d]`; channel i is paired with i + d / 2.
    positions: float `[n, 3]` (t, y, x) in token units; a compressed token sits at its cell's centre.
  """
  angles = []
  for axis, pairs in enumerate(axis_pairs(x.shape[-1])):
    frequency = np.asarray(theta, np.float32) ** (-np.arange(pairs, dtype=np.float32) / max(pairs, 1))
    angles.append(jnp.asarray(positions, jnp.float32)[:, axis, None] * frequency)
  angles = jnp.concatenate(angles, -1)[:, None]  # [n, 1, d / 2]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  first, second = jnp.split(x.astype(dtype), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
