"""`VideoDiT`: a diffusion transformer for video latents (DiT, arXiv 2212.09748) whose attention is any method.

adaLN-Zero, QK-norm, 3-D rotary, class conditioning with a null class. Tokens are put in tile order once, at patchify. Runs of
layers with one method are one scan over stacked parameters.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from freqformer.config import refusing
from freqformer.kernels.block_sparse.api import CHECKPOINT_NAMES
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.methods.base import Cond, Method
from freqformer.model.attention import SpectralAttention
from freqformer.model.config import DTYPES, ModelConfig

# What rematerialisation keeps: the attention kernel runs once, and no choice can flip in recomputation.
KEPT = (*CHECKPOINT_NAMES, "routing", "tables")
_ZEROS = nnx.initializers.zeros_init()


def modulate(x, shift, scale):
  """adaLN: `x (1 + scale) + shift`, both `[b, width]` over `x` `[b, n, width]`."""
  return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nnx.Module):
  """Sinusoidal features of t in [0, 1] and a two-layer MLP: `[b] -> [b, width]`."""

  def __init__(self, width: int, rngs: nnx.Rngs, frequencies: int = 128):
    self.frequencies = frequencies
    self.first = nnx.Linear(2 * frequencies, width, rngs=rngs)
    self.second = nnx.Linear(width, width, rngs=rngs)

  def __call__(self, time):
    # DiT's range was made for t in 0..1000.
    rates = 1000 * jnp.exp(
      -math.log(10_000) * jnp.arange(self.frequencies, dtype=jnp.float32) / self.frequencies
    )
    angles = time.astype(jnp.float32)[:, None] * rates
    return self.second(
      nnx.silu(self.first(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)))
    )


class DiTBlock(nnx.Module):
  """One layer: attention and MLP, each modulated and gated by the conditioning (adaLN-Zero)."""

  def __init__(self, config: ModelConfig, method: Method, layout, rngs: nnx.Rngs):
    width, dtype = config.width, DTYPES[config.dtype]
    norm = functools.partial(
      nnx.LayerNorm, width, use_bias=False, use_scale=False, dtype=dtype, rngs=rngs
    )
    init = nnx.initializers.xavier_uniform()
    hidden = int(width * config.mlp_ratio)
    self.attention_norm, self.mlp_norm = norm(), norm()
    self.attention = SpectralAttention(
      config.dims, method, layout, rngs, dtype=dtype, implementation=config.attention.implementation
    )
    self.mlp_in = nnx.Linear(width, hidden, kernel_init=init, dtype=dtype, rngs=rngs)
    self.mlp_out = nnx.Linear(hidden, width, kernel_init=init, dtype=dtype, rngs=rngs)
    self.modulation = nnx.Linear(width, 6 * width, kernel_init=_ZEROS, dtype=dtype, rngs=rngs)

  def __call__(self, x, condition, cond: Cond, layout, tables, state):
    """`x` `[b, n_buffer, width]`, `condition` `[b, width]` -> x, state, aux."""
    parts = jnp.split(self.modulation(nnx.silu(condition)), 6, axis=-1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
    y, state, aux = self.attention(
      modulate(self.attention_norm(x), shift, scale), cond, layout, tables, state
    )
    x = x + gate[:, None] * y
    y = modulate(self.mlp_norm(x), mlp_shift, mlp_scale)
    y = self.mlp_out(nnx.gelu(self.mlp_in(y), approximate=True))
    return x + mlp_gate[:, None] * y, state, aux


class FinalLayer(nnx.Module):
  """Modulated norm and a zero-initialised projection to a patch of velocities."""

  def __init__(self, config: ModelConfig, out: int, rngs: nnx.Rngs):
    dtype = DTYPES[config.dtype]
    self.norm = nnx.LayerNorm(config.width, use_bias=False, use_scale=False, dtype=dtype, rngs=rngs)
    self.modulation = nnx.Linear(
      config.width, 2 * config.width, kernel_init=_ZEROS, dtype=dtype, rngs=rngs
    )
    self.linear = nnx.Linear(config.width, out, kernel_init=_ZEROS, rngs=rngs)

  def __call__(self, x, condition):
    shift, scale = jnp.split(self.modulation(nnx.silu(condition)), 2, axis=-1)
    return self.linear(modulate(self.norm(x), shift, scale).astype(jnp.float32))


class VideoDiT(nnx.Module):
  """Predicts the velocity `eps - x_0` of latents `[b, t, y, x, c]`.

  Args:
    config: sizes and methods.
    latent_shape: `(t, y, x, c)` of the training latents; other grids work at call time, with their own tables.
    classes: number of classes; label `classes` is the null class of guidance.
    rngs: NNX random streams.
  """

  def __init__(self, config: ModelConfig, latent_shape, classes: int, rngs: nnx.Rngs):
    self.config, self.channels, self.classes = config, latent_shape[-1], classes
    layout, dtype = config.layout(latent_shape), DTYPES[config.dtype]
    patch = self.channels * math.prod(config.patch)
    self.embed = nnx.Linear(
      patch, config.width, kernel_init=nnx.initializers.xavier_uniform(), dtype=dtype, rngs=rngs
    )
    self.time = TimestepEmbedder(config.width, rngs)
    self.label = nnx.Embed(
      classes + 1, config.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
    )
    self.runs = nnx.List(
      [_stack(config, method, layout, count, rngs) for count, method in config.runs()]
    )
    self.final = FinalLayer(config, patch, rngs)

  def tables(self, latent_shape) -> dict:
    """Everything static about a grid: pass it to jit as an argument."""
    return make_tables(self.config, latent_shape)

  def init_state(self, batch: int, latent_shape, guided: bool = False) -> list:
    """What the layers remember between denoising steps, one stacked pytree per run.

    Args:
      batch: rows that run together, both halves of guidance counted; guided: whether there are two halves.
    """
    layout, dims = self.config.layout(latent_shape), self.config.dims.for_method

    def stack(count, state):
      return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), state)

    def rows(method):
      return batch // 2 if guided and method.shares_state else batch

    return [
      stack(count, method.init_state(rows(method), dims, layout))
      for count, method in self.config.runs()
    ]

  def schedule(self, steps: int) -> list[tuple[str, ...]]:
    """What each of `steps` sampling steps does: one phase per run of layers.

    Raises:
      ConfigError: if a method's schedule does not fit the run.
    """
    methods = [method for _, method in self.config.runs()]
    for method in methods:
      method.check_run(steps)
    return [tuple(method.phase(step, steps) for method in methods) for step in range(steps)]

  def __call__(self, x, time, label, tables, state=None, **where):
    """Velocity of noisy latents.

    Args:
      x: `[b, t, y, x, c]`; time: `[b]`, 1 is noise; label: int `[b]`.
      tables: of `tables(x.shape[1:])`.
      state: of `init_state`, or None to start fresh.
      **where: further fields of `Cond` (progress, rng, train, guided, soft_evaluation, want_masks), and `phases`, one per
        run of layers (of `schedule`; none in training).

    Returns:
      velocity `[b, t, y, x, c]` float32, the new state, and aux: one dict per run of layers, stacked over its layers.
    """
    embedding = self.time(time)
    condition = (embedding + self.label(label)).astype(DTYPES[self.config.dtype])
    rng, phases = where.pop("rng", None), where.pop("phases", None) or ("",) * len(self.runs)
    cond = Cond(time, embedding, **where)
    layout = tables["layout"]
    tokens = layout.pack(self.embed(patchify(x, self.config.patch)))
    state = self.init_state(x.shape[0], x.shape[1:], cond.guided) if state is None else state
    states, auxes = [], []
    for i, run in enumerate(self.runs):
      key = None if rng is None else jax.random.fold_in(rng, i)
      own = dataclasses.replace(cond, phase=phases[i])
      tokens, new, aux = self._run(
        run, tokens, condition, own, key, layout, tables["methods"][i], state[i]
      )
      states.append(new)
      auxes.append(aux)
    return (
      unpatchify(layout.unpack(self.final(tokens, condition)), x.shape[1:], self.config.patch),
      states,
      auxes,
    )

  def _run(self, run, x, condition, cond, key, layout, tables, state):
    """Scans over the stacked layers of one run."""
    graphdef, params = nnx.split(run)
    depth = jax.tree.leaves(params)[0].shape[0]
    keys = None if key is None else jax.random.split(key, depth)

    def layer(x, xs):
      params, state, key = xs
      own = dataclasses.replace(cond, rng=key)
      x, state, aux = nnx.merge(graphdef, params)(x, condition, own, layout, tables, state)
      return x, (state, aux)

    if self.config.remat and cond.train:
      policy = jax.checkpoint_policies.save_only_these_names(*KEPT)
      layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    x, (state, aux) = jax.lax.scan(layer, x, (params, state, keys))
    return x, state, aux


def _stack(config, method, layout, count, rngs):
  """`count` blocks with stacked parameters."""

  @nnx.split_rngs(splits=count)
  @nnx.vmap(in_axes=0, out_axes=0)
  def create(rngs):
    return DiTBlock(config, method, layout, rngs)

  return create(rngs)


def make_tables(config: ModelConfig, latent_shape) -> dict:
  """Tables of one grid without a model: `{"layout": LayoutTables, "methods": [one per run]}`.

  Raises:
    ConfigError: if a method cannot serve the grid.
  """
  layout = config.layout(latent_shape)

  def known(x):
    return x.with_mean() if isinstance(x, BlockMask) else x

  methods = []
  for _, method in config.runs():
    with refusing(f"attention method {type(method).__name__}"):
      methods.append(method.tables(layout))
  methods = jax.tree.map(known, methods, is_leaf=lambda x: isinstance(x, BlockMask))
  return {"layout": layout.arrays(), "methods": methods}


def patchify(x: jax.Array, patch) -> jax.Array:
  """`[b, t, y, x, c] -> [b, n, pt * py * px * c]`, raster order; cut edges are zero-padded to whole patches."""
  b, *sizes, c = x.shape
  x = jnp.pad(x, ((0, 0), *((0, -s % p) for s, p in zip(sizes, patch, strict=True)), (0, 0)))
  (t, y, w), (pt, py, px) = (s // p for s, p in zip(x.shape[1:4], patch, strict=True)), patch
  x = x.reshape(b, t, pt, y, py, w, px, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(b, t * y * w, -1)


def unpatchify(tokens: jax.Array, latent_shape, patch) -> jax.Array:
  """The inverse of `patchify`, padding dropped: `[b, n, pt * py * px * c] -> [b, t, y, x, c]`."""
  sizes, (pt, py, px), c = latent_shape[:3], patch, latent_shape[3]
  t, y, w = (-(-s // p) for s, p in zip(sizes, patch, strict=True))
  x = tokens.reshape(-1, t, y, w, pt, py, px, c).transpose(0, 1, 4, 2, 5, 3, 6, 7)
  return x.reshape(-1, t * pt, y * py, w * px, c)[:, : sizes[0], : sizes[1], : sizes[2]]
