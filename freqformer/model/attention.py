"""The attention layer of every method: it projects, and the method does the rest."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from freqformer.config import ConfigError, refusing
from freqformer.cost import DENSE
from freqformer.grid.layout import LayoutTables, TileLayout
from freqformer.grid.rotary import axis_pairs, grid_theta
from freqformer.kernels.around.prepare import EPS
from freqformer.kernels.block_sparse.api import CHECKPOINT_NAMES
from freqformer.methods.base import Cond, Dims, Method, Projected, attend
from freqformer.model.streams import named
from freqformer.placement import context_devices, split
from freqformer.tables.exchange import TileExchange

_LEAST_SQUARE = 1e-12  # choice: of dense attention's output, so that no distance is divided by 0


@dataclasses.dataclass(frozen=True)
class AttentionDims:
  """Sizes of the layer.

  Attributes:
    width: of the residual stream.
    heads: must divide the width into an even head dimension.
    cond_dim: of the timestep embedding.
    qk_gain: initial gain of the query norm, or 0 for `starting_gain` of the layer's method.
    theta: base of rotary per axis (t, y, x), or empty for that of the layer's grid.
    qk_bias: spread of the initial bias that queries and keys share.
    over_heads: the norms of queries and keys are over all heads of a token together, with a gain
      per head and channel, instead of each head alone with a gain per channel.
    shares: rotated pairs per axis (t, y, x); None: `grid.rotary.axis_pairs`.
  """

  width: int
  heads: int
  cond_dim: int
  qk_gain: float = 1.0
  theta: tuple[float, ...] = ()
  qk_bias: float = 0.0
  over_heads: bool = False
  shares: tuple[int, int, int] | None = None

  def __post_init__(self):
    if self.heads < 1 or self.width % self.heads:
      near = [h for h in range(1, self.width // 2 + 1) if self.width % (2 * h) == 0]
      raise ConfigError(
        f"width {self.width} is not divisible by {self.heads} heads; heads may be {near}."
      )
    axis_pairs(self.head_dim)

  @property
  def head_dim(self) -> int:
    """Channels of a head."""
    return self.width // self.heads

  @property
  def for_method(self) -> Dims:
    """The part of them that a method sees."""
    return Dims(self.heads, self.head_dim, self.cond_dim, self.over_heads)


def starting_gain(keys: float, head_dim: int) -> float:
  """Returns the gain of normed queries at which one key can hold half of a row's mass.

  With |q| = g sqrt(d) and |k| = sqrt(d), d the head dimension, the best key's logit is g sqrt(d),
  and n random keys sum to n exp(g^2 / 2) on average. They are equal where
  `g sqrt(d) = ln n + g^2 / 2`, whose smaller root is returned. Gains hardly move while a model
  trains, so that a start below it leaves attention flat.

  Without a root, where d < 2 ln n, no gain is enough: sqrt(d) comes nearest. At least 1, where
  norms usually start.

  Args:
    keys: n, keys in a row's list.
    head_dim: d.
  """
  spread = head_dim - 2 * math.log(max(keys, 1.0))
  return max(1.0, math.sqrt(head_dim) - math.sqrt(max(spread, 0.0)))


def keys_per_query(method: Method, layout: TileLayout, heads: int) -> float:
  """Returns how many keys a method expects a token to see, on average over tokens and heads.

  These are all tokens where a method does not count its pairs.
  """
  try:
    return method.pairs(layout, heads).pairs / (heads * layout.n)
  except NotImplementedError:
    return float(layout.n)


def distance(out: jax.Array, projected: Projected, cond: Cond) -> jax.Array:
  """Returns how far attention is from dense attention on the same projections, float32 `[b]`.

  It is the square of the difference over that of dense attention's output, summed over tokens and
  heads before the output projection: layers of large and of small values weigh the same, and no
  scale of the values lowers it. No gradient goes through dense attention.

  Args:
    out: `[b, n_buffer, h, d]`, of the method.
    projected: what the method was given.
    cond: has the dense table, `teacher`.
  """
  fixed = dataclasses.replace(projected, v=jax.lax.stop_gradient(projected.v))
  dense, _ = attend(fixed, cond.teacher, cond, jax.lax.stop_gradient(projected.rotated()))
  # Without a gradient the kernel names nothing to keep, and rematerialisation would run it twice.
  dense = checkpoint_name(dense, CHECKPOINT_NAMES[0]).astype(jnp.float32)
  axes = (1, 2, 3)
  valid = projected.layout.valid[:, None, None]  # padding rows hold anything
  square = jnp.sum(dense**2, axes, where=valid)
  return jnp.sum((out - dense) ** 2, axes, where=valid) / jnp.maximum(square, _LEAST_SQUARE)


class HeadsNorm(nnx.Module):
  """RMS norm over all heads of a token together, `[..., h, d]`; a gain per head and channel."""

  def __init__(self, heads: int, head_dim: int, dtype=jnp.float32, gain: float = 1.0):
    self.scale = nnx.Param(jnp.full((heads, head_dim), gain, jnp.float32))
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.square(wide).mean((-2, -1), keepdims=True) + EPS)
    return (wide * inverse * self.scale[...]).astype(self.dtype)


class SpectralAttention(nnx.Module):
  """Multi-head attention with QK-norm (RMS, learned per channel), 3-D rotary and a method."""

  def __init__(
    self,
    dims: AttentionDims,
    method: Method,
    layout: TileLayout,
    rngs: nnx.Rngs,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
  ):
    self.dims = dims
    self.config = method
    self.dtype = dtype
    self.implementation = implementation
    head_dim = dims.head_dim
    # Fixed here: the layer may run on other grids, but its weights know these angles.
    self.theta = dims.theta or grid_theta(layout.grid, head_dim)
    init = nnx.initializers.xavier_uniform()
    self.qkv = nnx.Linear(
      dims.width, 3 * dims.width, kernel_init=init, dtype=dtype, rngs=named(rngs, "qkv")
    )
    if dims.qk_bias:
      key = named(rngs, "qk_bias")["params"]()
      shared = dims.qk_bias * jax.random.normal(key, (dims.width,))
      self.qkv.bias[...] = jnp.concatenate([shared, shared, jnp.zeros(dims.width)])
    self.out = nnx.Linear(
      dims.width, dims.width, kernel_init=init, dtype=dtype, rngs=named(rngs, "out")
    )
    gain = dims.qk_gain or starting_gain(keys_per_query(method, layout, dims.heads), head_dim)
    constant = nnx.initializers.constant(gain)
    if dims.over_heads:
      self.q_norm = HeadsNorm(dims.heads, head_dim, dtype, gain)
      self.k_norm = HeadsNorm(dims.heads, head_dim, dtype)
    else:
      self.q_norm = nnx.RMSNorm(head_dim, scale_init=constant, dtype=dtype, rngs=rngs)
      self.k_norm = nnx.RMSNorm(head_dim, dtype=dtype, rngs=rngs)
    with refusing(f"attention method {type(method).__name__}"):
      self.method = method.build(dims.for_method, layout, named(rngs, "method"))

  def __call__(
    self, x: jax.Array, cond: Cond, layout: LayoutTables, tables: Any, state: Any
  ) -> tuple[jax.Array, Any, dict]:
    """Runs attention over tokens in tile order.

    Args:
      x: `[b, n_buffer, width]`; padding rows hold anything finite.
      tables: of the method, for this layout, as is the layer's `state`; where `cond.phase` is
        `DENSE` the dense table, by which the layer attends in its method's place.

    Returns:
      `[b, n_buffer, width]`, the new state and the method's aux.
    """
    b, n, width = x.shape
    shape = (3, self.dims.heads, self.dims.head_dim)
    product = x.astype(self.dtype) @ self.qkv.kernel[...].astype(self.dtype)
    product = split(product.reshape(b, n, *shape), context=1)
    bias = self.qkv.bias[...].reshape(shape)
    by_tiles = isinstance(tables, TileExchange)
    order = None if by_tiles else self._head_order(cond, layout.layout)
    gains = (self.q_norm.scale[...], self.k_norm.scale[...])
    over_heads = self.dims.over_heads
    if order is not None:
      product = product[:, :, :, order]
      bias = bias[:, order]
      gains = tuple(gain[order] for gain in gains) if over_heads else gains
    projected = Projected.of_joint(
      product if by_tiles else split(product, context=3),
      bias,
      gains,
      layout,
      self.implementation,
      self.theta,
      order,
      over_heads=over_heads,
      shares=self.dims.shares,
    )
    if cond.phase == DENSE:
      out, aux = attend(projected, tables, cond)  # what the method remembers stays
    else:
      out, state, aux = self.config(self.method, projected, cond, tables, state)
    if cond.teacher is not None:
      # A layer that attends densely is at no distance, and need not attend twice to know it.
      far = cond.phase != DENSE
      aux = {**aux, "distance": distance(out, projected, cond) if far else jnp.zeros(b)}
    if not by_tiles:
      # Both said, or XLA would attend half by tokens, half by heads.
      out = split(out, context=2)
    out = split(out, context=1)
    if order is not None:
      place = np.argsort(order)
      out = out[:, :, place]
      aux = {k: x[:, place] if np.ndim(x) > 1 else x for k, x in aux.items()}  # [b, h, ...]
    return self.out(out.reshape(b, n, width).astype(self.dtype)), state, aux

  def _head_order(self, cond: Cond, layout: TileLayout) -> np.ndarray | None:
    """Returns the order of heads in which devices that share them are equally busy, if another."""
    devices = context_devices()
    if devices == 1 or cond.phase == DENSE or cond.want_masks:
      return None
    return self.config.head_order(layout, self.dims.heads, devices)
