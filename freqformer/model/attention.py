"""`SpectralAttention`: the attention layer of every method. It projects, normalises and rotates; the method does the rest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from freqformer.config import ConfigError, refusing
from freqformer.grid.layout import LayoutTables, TileLayout
from freqformer.grid.rotary import angle_tables, axis_pairs, rotate
from freqformer.kernels.around.prepare import log_choice, unsupported
from freqformer.kernels.around.prepare import prepare as fused
from freqformer.methods.base import Cond, Dims, Method, Projected


@dataclasses.dataclass(frozen=True)
class AttentionDims:
  """Sizes of the layer.

  Attributes:
    width: of the residual stream.
    heads: must divide the width into an even head dimension.
    cond_dim: of the timestep embedding.
    qk_gain: initial gain of the query norm; small heads cap logits, and a gain above 1 helps dense attention most.
  """

  width: int
  heads: int
  cond_dim: int
  qk_gain: float = 1.0

  def __post_init__(self):
    if self.heads < 1 or self.width % self.heads:
      near = [
        h for h in range(1, self.width + 1) if self.width % h == 0 and (self.width // h) % 2 == 0
      ]
      raise ConfigError(
        f"width {self.width} is not divisible by {self.heads} heads; heads may be {near}."
      )
    axis_pairs(self.head_dim)

  @property
  def head_dim(self) -> int:
    return self.width // self.heads

  @property
  def for_method(self) -> Dims:
    """What of it a method sees."""
    return Dims(self.heads, self.head_dim, self.cond_dim)


class SpectralAttention(nnx.Module):
  """Multi-head attention with QK-norm (RMS, learned per channel), 3-D rotary and a pluggable method."""

  def __init__(
    self,
    dims: AttentionDims,
    method: Method,
    layout: TileLayout,
    rngs: nnx.Rngs,
    *,
    dtype=jnp.float32,
    implementation: str | None = None,
  ):
    head_dim = dims.head_dim
    self.dims, self.config, self.dtype, self.implementation = dims, method, dtype, implementation
    init = nnx.initializers.xavier_uniform()
    self.qkv = nnx.Linear(dims.width, 3 * dims.width, kernel_init=init, dtype=dtype, rngs=rngs)
    self.out = nnx.Linear(dims.width, dims.width, kernel_init=init, dtype=dtype, rngs=rngs)
    self.q_norm = nnx.RMSNorm(
      head_dim, scale_init=nnx.initializers.constant(dims.qk_gain), dtype=dtype, rngs=rngs
    )
    self.k_norm = nnx.RMSNorm(head_dim, dtype=dtype, rngs=rngs)
    with refusing(f"attention method {type(method).__name__}"):
      self.method = method.build(dims.for_method, layout, rngs)

  def __call__(self, x: jax.Array, cond: Cond, layout: LayoutTables, tables, state):
    """Attention over tokens in tile order.

    Args:
      x: `[b, n_buffer, width]`; padding rows hold anything finite.
      layout: arrays of the layout; `tables`, `state`: the method's own.

    Returns:
      `[b, n_buffer, width]`, the new state and the method's aux.
    """
    b, n, width = x.shape
    shape = (3, self.dims.heads, self.dims.head_dim)
    x, kernel, bias = (y.astype(self.dtype) for y in (x, self.qkv.kernel[...], self.qkv.bias[...]))
    product = (x @ kernel).reshape(b, n, *shape)
    joint = product + bias.reshape(shape)
    rotations = (functools.partial(_norm_rotary, norm) for norm in (self.q_norm, self.k_norm))
    prepare = self._kernel(product, layout)
    projected = Projected(
      *jnp.unstack(joint, axis=2), *rotations, layout, self.implementation, prepare
    )
    out, state, aux = self.config(self.method, projected, cond, tables, state)
    return self.out(out.reshape(b, n, width).astype(self.dtype)), state, aux

  def _kernel(self, product, layout):
    """`Projected.prepare` where the device has a kernel; it adds the bias, too, which XLA may not fuse with the product."""
    reason = f"attention runs on {self.implementation}"
    if self.implementation in (None, "pallas_mgpu"):
      reason = unsupported(product, layout.layout.tiles)
    log_choice("what prepares attention", reason)
    if reason:
      return None
    learned = (
      self.qkv.bias[...].reshape(product.shape[2:]),
      (self.q_norm.scale[...], self.k_norm.scale[...]),
    )
    with jax.named_scope("prepare"):
      tables = angle_tables(layout.positions, self.dims.head_dim)
    return functools.partial(fused, product, *learned, tables, layout.kv_len)


@jax.named_scope("norm_rotary")
def _norm_rotary(norm, x, positions):
  return rotate(norm(x), positions)
