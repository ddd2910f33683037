"""Attention layers of any method on small grids, for the tests of methods and their laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.rotary import rotate
from freqformer.methods.base import Cond
from freqformer.model.attention import AttentionDims, SpectralAttention

RAGGED = TileLayout((9, 6, 9), (2, 4, 4), 32)  # 5 x 2 x 3 tiles of 32 to 2 tokens
DIMS = AttentionDims(48, 6, 8)
BASIS = SpectralBasis("block_dct", (0.5, 0.5, 0.5), (0.75, 0.75, 0.75))


def layer_of(method, layout=RAGGED, **options):
  """The projections are the same for every method: they are drawn first."""
  return SpectralAttention(DIMS, method, layout, nnx.Rngs(0), **options)


def tokens(layout=RAGGED, b=2, seed=0):
  x = np.random.default_rng(seed).standard_normal((b, layout.n, DIMS.width)).astype(np.float32)
  return layout.arrays().pack(x)


def where(time=(0.3, 0.9), **fields):
  time = jnp.asarray(time, jnp.float32)
  return Cond(time, jnp.stack([jnp.sin(time * k) for k in range(1, 9)], -1), **fields)


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, params, x, cond, arrays, tables, state):
  """Out of valid tokens `[b, n, width]` in raster order, the new state, and aux."""
  out, state, aux = nnx.merge(graphdef, params)(x, cond, arrays, tables, state)
  return arrays.unpack(out), state, aux


def run(layer, x, cond=None, layout=RAGGED):
  """Out and aux of a layer without memory."""
  args = (x, where() if cond is None else cond, layout.arrays(), layer.config.tables(layout), {})
  out, _, aux = apply(*nnx.split(layer), *args)
  return out, aux


def routed_to(layer, choice):
  """A copy whose router's logits make p one-hot at `choice` [h]."""
  layer = nnx.clone(layer)
  bias = layer.method.router.bias
  bias[...] = 200.0 * jax.nn.one_hot(jnp.asarray(choice), bias[...].shape[-1])
  return layer


def heads_of(layer, x, cond=None):
  """Head outputs before the out projection, `[b, n, h, d]`."""
  layer = nnx.clone(layer)
  layer.out.kernel[...] = jnp.eye(DIMS.width)
  layer.out.bias[...] = jnp.zeros(DIMS.width)
  out, _ = run(layer, x, cond)
  return out.reshape(*out.shape[:2], DIMS.heads, DIMS.head_dim)


def finished(layer, x):
  """q, k, v `[b, n, h, d]` in raster order, q and k normed and rotated, and positions `[n, 3]`."""
  shape = (len(x), RAGGED.n, 3, DIMS.heads, DIMS.head_dim)
  q, k, v = jnp.unstack(layer.qkv(RAGGED.arrays().unpack(x)).reshape(shape), axis=2)
  positions = np.stack(np.unravel_index(np.arange(RAGGED.n), RAGGED.grid), -1).astype(np.float32)
  return rotate(layer.q_norm(q), positions), rotate(layer.k_norm(k), positions), v, positions
