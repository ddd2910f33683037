"""Attention layers of any method on small grids, for the tests of methods and their laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from freqformer.kernels.around.prepare import Prepared

from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.rotary import rotate
from freqformer.methods.base import Cond, Projected
from freqformer.model.attention import AttentionDims, SpectralAttention
from freqformer.tables.topk import pool_tiles

RAGGED = TileLayout((9, 6, 9), (2, 4, 4), 32)  # 5 x 2 x 3 tiles of 32 to 2 tokens
THETA = (50.0, 20.0, 90.0)  # of rotary; not that of any grid here
DIMS = AttentionDims(48, 6, 8, theta=THETA)
# As a `WanDiT` has them: the norm is over all heads, and the axes' shares of a head are its own.
WAN_DIMS = AttentionDims(48, 6, 8, 1.0, (10_000.0,) * 3, over_heads=True, shares=(2, 1, 1))
BASIS = SpectralBasis("block_dct", (0.5, 0.5, 0.5), (0.75, 0.75, 0.75))


def layer_of(method, layout=RAGGED, dims=DIMS, **options):
  """The projections are the same for every method: they are drawn first."""
  # The reference backend compiles fastest; backends are held to it elsewhere.
  options = {"implementation": "reference"} | options
  return SpectralAttention(dims, method, layout, nnx.Rngs(0), **options)


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


def run(layer, x, cond=None, layout=RAGGED, apply=apply):
  """Out and aux of a layer without memory."""
  args = (x, where() if cond is None else cond, layout.arrays(), layer.config.tables(layout), {})
  out, _, aux = apply(*nnx.split(layer), *args)
  return out, aux


@functools.partial(jax.jit, static_argnums=0)
def apply_without_attention(*args):
  """Like `apply`, without the output: what a step lists and weighs compiles no attention."""
  _, state, aux = apply.__wrapped__(*args)
  return None, state, aux


def aux_of(layer, x, cond=None, layout=RAGGED):
  """Aux of a layer without memory."""
  return run(layer, x, cond, layout, apply_without_attention)[1]


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
  norms = (layer.q_norm, layer.k_norm)
  q, k = (rotate(norm(x), positions, layer.theta) for norm, x in zip(norms, (q, k), strict=True))
  return q, k, v, positions


# ---- a method without a layer ------------------------------------------------------------


def projected(q, k, v, layout) -> Projected:
  """Wraps finished q, k, v `[b, n_buffer, h, d]` as a layer hands them over; none is rotated."""

  def unrotated(x, positions):
    return x

  def prepare(cells=None, pooled=False):
    def pack(x):
      coarse = cells.compress(x)
      filler = jnp.zeros((x.shape[0], cells.front - coarse.shape[1], *x.shape[2:]))
      return jnp.concatenate([coarse, filler, x], 1)

    if cells is None:
      return Prepared(q, k, v)
    return Prepared(*map(pack, (q, k, v)), *(pool_tiles(x, layout.arrays()) for x in (q, k)))

  return Projected(q, k, v, unrotated, unrotated, layout.arrays(), "reference", prepare)


def step(method, qkv, layout, phase, state, **fields):
  """Out, state and aux of one step of a method on q, k, v."""
  b = len(qkv[0])
  cond = Cond(jnp.full(b, 0.5), jnp.ones((b, 4)), phase=phase, **fields)
  tables = method.tables(layout)
  run = jax.jit(lambda qkv, state: method(None, projected(*qkv, layout), cond, tables, state))
  return run(qkv, state)
