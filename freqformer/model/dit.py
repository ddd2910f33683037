"""`VideoDiT`: a diffusion transformer (DiT, arXiv 2212.09748) for video latents, any attention.

adaLN-Zero, QK-norm, 3-D rotary, conditioning by class or embedding. Tokens are put in tile order
once, at patchify.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from freqformer.methods.base import Cond, Method
from freqformer.model.attention import SpectralAttention
from freqformer.model.conditioner import ClassConditioner, EmbeddingConditioner
from freqformer.model.config import DTYPES, ModelConfig
from freqformer.model.precondition import Preconditioner
from freqformer.model.stack import LayerStack, layer_tables, stacked
from freqformer.model.streams import named, numbered
from freqformer.placement import split

TIME_RANGE = 1000  # DiT's features were made for t in 0..1000
TIME_FREQUENCIES = 128
PLACE_WAVES = 8  # choice: cosines of a token's place along each axis
_ZEROS = nnx.initializers.zeros_init()
_XAVIER = nnx.initializers.xavier_uniform()


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns adaLN's `x (1 + scale) + shift`, both `[b, width]`, x `[b, n, width]`."""
  return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nnx.Module):
  """Sinusoidal features of t in [0, 1] and a two-layer MLP: `[b] -> [b, width]`."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.first = nnx.Linear(2 * TIME_FREQUENCIES, width, rngs=rngs)
    self.second = nnx.Linear(width, width, rngs=rngs)

  def __call__(self, time: jax.Array) -> jax.Array:
    place = jnp.arange(TIME_FREQUENCIES, dtype=jnp.float32) / TIME_FREQUENCIES
    rates = TIME_RANGE * jnp.exp(-math.log(10_000) * place)
    angles = time.astype(jnp.float32)[:, None] * rates
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
    return self.second(nnx.silu(self.first(features)))


class DiTBlock(nnx.Module):
  """One layer: attention and MLP, each modulated and gated by the conditioning (adaLN-Zero)."""

  def __init__(self, config: ModelConfig, method: Method, layout, rngs: nnx.Rngs):
    width = config.width
    hidden = int(width * config.mlp_ratio)
    dtype = DTYPES[config.dtype]
    norm = functools.partial(
      nnx.LayerNorm, width, use_bias=False, use_scale=False, dtype=dtype, rngs=rngs
    )
    linear = functools.partial(nnx.Linear, dtype=dtype)
    self.attention_norm = norm()
    self.mlp_norm = norm()
    self.attention = SpectralAttention(
      config.dims,
      method,
      layout,
      named(rngs, "attention"),
      dtype=dtype,
      implementation=config.attention.implementation,
    )
    self.mlp_in = linear(width, hidden, kernel_init=_XAVIER, rngs=named(rngs, "mlp_in"))
    self.mlp_out = linear(hidden, width, kernel_init=_XAVIER, rngs=named(rngs, "mlp_out"))
    self.modulation = linear(width, 6 * width, kernel_init=_ZEROS, rngs=rngs)

  def __call__(self, x, condition, cond: Cond, layout, tables, state):
    """Returns x `[b, n_buffer, width]`, the new state and the method's aux.

    The condition is the sum of the timestep's and the label's embedding, `[b, width]`.
    """
    parts = jnp.split(self.modulation(nnx.silu(condition)), 6, axis=-1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
    y = modulate(self.attention_norm(x), shift, scale)
    y, state, aux = self.attention(y, cond, layout, tables, state)
    x = x + gate[:, None] * y
    y = modulate(self.mlp_norm(x), mlp_shift, mlp_scale)
    y = self.mlp_out(nnx.gelu(self.mlp_in(y), approximate=True))
    return x + mlp_gate[:, None] * y, state, aux


class FinalLayer(nnx.Module):
  """A modulated norm and a zero-initialised projection to a patch of velocities."""

  def __init__(self, config: ModelConfig, out: int, rngs: nnx.Rngs):
    width = config.width
    dtype = DTYPES[config.dtype]
    self.norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, dtype=dtype, rngs=rngs)
    self.modulation = nnx.Linear(width, 2 * width, kernel_init=_ZEROS, dtype=dtype, rngs=rngs)
    self.linear = nnx.Linear(width, out, kernel_init=_ZEROS, rngs=rngs)

  def __call__(self, x, condition):
    shift, scale = jnp.split(self.modulation(nnx.silu(condition)), 2, axis=-1)
    return self.linear(modulate(self.norm(x), shift, scale).astype(jnp.float32))


class VideoDiT(LayerStack):
  """A transformer that predicts the velocity `eps - x_0` of latents `[b, t, y, x, c]`.

  Args:
    latent_shape: `(t, y, x, c)` in training; other grids work with tables of their own.
    classes: number of classes; label `classes` is the null class of guidance.
    embedding: numbers of the embedding that is a clip's label in the place of a class; 0: classes.
  """

  behind = ("final", "skip")

  def __init__(
    self, config: ModelConfig, latent_shape, classes: int, rngs: nnx.Rngs, embedding: int = 0
  ):
    config = config.resolved(latent_shape)
    self.config = config
    self.channels = latent_shape[-1]
    width = config.width
    dtype = DTYPES[config.dtype]
    layout = config.layout(latent_shape)
    patch = self.channels * math.prod(config.patch)
    self.embed = nnx.Linear(
      patch, width, kernel_init=_XAVIER, dtype=dtype, rngs=named(rngs, "embed")
    )
    self.position = (
      nnx.Linear(
        3 * PLACE_WAVES, width, use_bias=False, kernel_init=_ZEROS, rngs=named(rngs, "position")
      )
      if config.positions
      else None
    )
    self.time = TimestepEmbedder(width, named(rngs, "time"))
    conditioner = EmbeddingConditioner if embedding else ClassConditioner
    self.label = conditioner(embedding or classes, width, named(rngs, "label"))
    runs = []
    first = 0
    for count, method in config.runs():
      # By the layer's number: runs of other lengths draw the same weights.
      keys = numbered(rngs, "layer", jnp.arange(first, first + count))
      runs.append(stacked(functools.partial(DiTBlock, config, method, layout), keys))
      first += count
    self.runs = nnx.List(runs)
    self.final = FinalLayer(config, patch, named(rngs, "final"))
    self.first_frame = nnx.Param(jnp.zeros(width)) if config.first_frame else None
    # One assignment: flax fixes on the first one whether an attribute holds parameters.
    self.skip = (
      nnx.Linear(width, self.channels, kernel_init=_ZEROS, rngs=named(rngs, "skip"))
      if config.skip
      else None
    )

  def null(self, count: int) -> np.ndarray:
    """Returns the label of clips without a condition, `[count]` or `[count, embedding]`."""
    return self.label.null(count)

  def tables(self, latent_shape, with_dense: bool = False) -> dict:
    """Returns everything static about a grid, to be passed to jit as an argument."""
    return make_tables(self.config, latent_shape, with_dense)

  def __call__(
    self, x, time, label, tables, state=None, *, rng=None, phases=(), given=None, **moment
  ) -> tuple[jax.Array, list, list[dict]]:
    """Predicts the velocity of noisy latents.

    Args:
      x: `[b, t, y, x, c]`.
      time: `[b]`, 1 is noise.
      label: int `[b]`, or embeddings float32 `[b, e]`.
      state: of `init_state`, or None to start fresh.
      rng: key for stochastic routing, or None.
      phases: one for each of `ModelConfig.parts`, of `schedule`; empty in training, unless layers
        are dense for a while.
      given: bool `[b]`, the first latent frame is clean instead of noisy (`ModelConfig.first_frame`
        only); None: nowhere. The velocity there means nothing.
      **moment: further fields of `Cond`: progress, train, guided, soft_evaluation, want_masks,
        want_finite, teacher.

    Returns:
      The velocity `[b, t, y, x, c]` in float32, the new state, and aux: one dict per part (without
      phases per run of layers), stacked over its layers.
    """
    embedding = self.time(time)
    condition = (embedding + self.label(label)).astype(DTYPES[self.config.dtype])
    cond = Cond(time, embedding, rng=rng, **moment)
    layout = tables["layout"]
    preconditioner = tables.get("preconditioner")
    seen = x if preconditioner is None else preconditioner.inputs(x, time)
    tokens = self.embed(patchify(seen, self.config.patch))
    if self.position is not None:
      tokens += self.position(tables["places"]).astype(tokens.dtype)
    if given is not None:
      tokens = self._marked(tokens, given, layout.layout.grid)
    tokens = split(layout.pack(tokens), context=1)
    if state is None:
      state = self.init_state(x.shape[0], x.shape[1:], cond.guided)
    tokens, states, auxes = self.run_layers(tokens, condition, cond, tables, state, phases)
    velocity = layout.unpack(split(self.final(tokens, condition)))
    velocity = unpatchify(velocity, x.shape[1:], self.config.patch)
    if self.skip is not None:
      velocity += self.skip(nnx.silu(condition))[:, None, None, None] * x
    if preconditioner is not None:
      velocity = preconditioner.velocity(x, velocity, time)
    return velocity, states, auxes

  def _marked(self, tokens, given, grid):
    """Adds the embedding of given tokens to those of the first frame, in raster order."""
    mark = given[:, None, None] * self.first_frame[...].astype(tokens.dtype)
    rows = grid[1] * grid[2]
    return jnp.concatenate([tokens[:, :rows] + mark, tokens[:, rows:]], 1)


def make_tables(config: ModelConfig, latent_shape, with_dense: bool = False) -> dict:
  """Returns what is static about a grid, for a `VideoDiT`: `layer_tables` and more.

  Raises:
    ConfigError: a method cannot serve the grid, or devices not share it.
  """
  tables = layer_tables(config, latent_shape, with_dense)
  if config.precondition:
    tables["preconditioner"] = Preconditioner.of(config.spectrum, latent_shape)
  if config.positions:
    tables["places"] = _places(config.layout(latent_shape).grid)
  return tables


def _places(grid) -> jax.Array:
  """Returns `cos(pi k u)`, k = 1, 2, ..., for the place u in (0, 1) along each axis, `[n, 3 k]`."""
  waves = np.arange(1, PLACE_WAVES + 1)
  axes = [np.cos(np.pi * waves * (np.arange(n)[:, None] + 0.5) / n) for n in grid]
  index = np.indices(grid).reshape(3, -1)
  found = [axis[at] for axis, at in zip(axes, index, strict=True)]
  return jnp.asarray(np.concatenate(found, -1), jnp.float32)


def patchify(x: jax.Array, patch) -> jax.Array:
  """Cuts `[b, t, y, x, c]` into tokens `[b, n, pt * py * px * c]` in raster order.

  Patches that the edge cuts are padded with zeros.
  """
  b, *sizes, c = x.shape
  pt, py, px = patch
  x = jnp.pad(x, ((0, 0), *((0, -s % p) for s, p in zip(sizes, patch, strict=True)), (0, 0)))
  _, t, y, w, _ = x.shape
  x = x.reshape(b, t // pt, pt, y // py, py, w // px, px, c)
  x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(b, -1, pt * py * px * c)


def unpatchify(tokens: jax.Array, latent_shape, patch) -> jax.Array:
  """Inverts `patchify`, padding dropped: `[b, n, pt * py * px * c] -> [b, t, y, x, c]`."""
  *sizes, c = latent_shape
  pt, py, px = patch
  t, y, w = (-(-s // p) for s, p in zip(sizes, patch, strict=True))
  x = tokens.reshape(-1, t, y, w, pt, py, px, c)
  x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
  x = x.reshape(-1, t * pt, y * py, w * px, c)
  return x[:, : sizes[0], : sizes[1], : sizes[2]]
