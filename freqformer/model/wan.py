"""`WanDiT`: the transformer of Wan 2.1 and 2.2 (arXiv 2503.20314), with any attention method.

Where it differs from `VideoDiT`: text by cross-attention, one modulation for all layers to which
each adds a table of its own, QK-norm over all heads, and rotary that leaves the rest of a head's
channels to time. Rotary pairs here are channels (i, i + d / 2); `freqformer.wan.weights` orders
those of pretrained weights, which are (2 i, 2 i + 1), accordingly.

The residual stream, modulation, and what makes the timestep's embedding are float32.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from freqformer.config import ConfigError, require
from freqformer.cost import BlockShape
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import dense_mask
from freqformer.methods.base import Cond, Method
from freqformer.model.attention import AttentionDims, HeadsNorm, SpectralAttention
from freqformer.model.conditioner import ClassConditioner, EmbeddingConditioner
from freqformer.model.config import DTYPES, ModelConfig
from freqformer.model.dit import patchify, unpatchify
from freqformer.model.leaves import leaf_name
from freqformer.model.stack import LayerStack, stacked
from freqformer.model.streams import named, numbered
from freqformer.placement import split
from freqformer.wan.weights import WanWeights

TIME_RANGE = 1000  # timesteps were counted so in training
THETA = 10_000.0  # of rotary, on all axes
_EPS = 1e-6
# Matrices that stay float32, whatever the others are.
_EXACT = ("time_in", "time_out", "modulation", "head")
_SLOWEST = 10_000  # timestep features: the slowest turns by 1 / 10,000 a step


@dataclasses.dataclass(frozen=True)
class WanConfig(ModelConfig):
  """Settings of a `WanDiT`; width, depth and heads are given.

  Attributes:
    mlp: hidden width of the MLP.
    text_width: numbers of a row of the text encoder.
    text_length: rows of a text; those behind its end are zero, and attended to as well.
    frequencies: features of a timestep.
  """

  size: str = "custom"
  rope_theta: tuple[float, ...] = (THETA,)
  mlp: int = 8960
  text_width: int = 4096
  text_length: int = 512
  frequencies: int = 256

  def __post_init__(self):
    super().__post_init__()
    require(self, "mlp text_width text_length frequencies", least=1)
    for name in ("skip", "precondition", "positions", "first_frame"):
      if getattr(self, name):
        raise ConfigError(f"{name}={getattr(self, name)} is of architecture 'dit'; leave it out.")
    if self.width // self.heads < 6:
      raise ConfigError(
        f"width={self.width} over heads={self.heads} leaves less than the 6 channels of a head "
        "that rotary divides among the axes."
      )

  @property
  def block_shape(self) -> BlockShape:
    """Sizes of a layer: the text is attended to, modulation is shared by all layers."""
    sizes = (self.width, self.heads, self.mlp)
    return BlockShape(*sizes, text=self.text_length, text_mode="cross", modulation=0)

  @property
  def dims(self) -> AttentionDims:
    """Sizes of the self-attention layer: y and x have a third of the channels each, t the rest."""
    half = self.width // self.heads // 2
    share = half // 3
    shares = (half - 2 * share, share, share)
    return AttentionDims(
      self.width, self.heads, self.width, 1.0, self.rope_theta, over_heads=True, shares=shares
    )

  def resolved(self, latent_shape) -> "WanConfig":
    """Returns the config itself: no grid decides anything."""
    self.layout(latent_shape)
    return self


def _norm(width: int, rngs: nnx.Rngs, affine: bool = False) -> nnx.LayerNorm:
  return nnx.LayerNorm(
    width, epsilon=_EPS, use_bias=affine, use_scale=affine, dtype=jnp.float32, rngs=rngs
  )


class CrossAttention(nnx.Module):
  """Tokens attend to a text: `[b, n, width]` and `[b, m, width]` to `[b, n, width]`."""

  def __init__(self, config: WanConfig, rngs: nnx.Rngs):
    width = config.width
    dtype = DTYPES[config.dtype]
    linear = functools.partial(nnx.Linear, width, width, dtype=dtype)
    self.shape = (config.heads, width // config.heads)
    self.block = config.attention.block
    self.implementation = config.attention.implementation
    self.q = linear(rngs=named(rngs, "q"))
    self.k = linear(rngs=named(rngs, "k"))
    self.v = linear(rngs=named(rngs, "v"))
    self.out = linear(rngs=named(rngs, "out"))
    self.q_norm = HeadsNorm(*self.shape, dtype=dtype)
    self.k_norm = HeadsNorm(*self.shape, dtype=dtype)

  def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
    def heads(y):
      return y.reshape(*y.shape[:-1], *self.shape)

    q = self.q_norm(heads(self.q(x)))
    k = self.k_norm(heads(self.k(text)))
    v = heads(self.v(text))
    everything = dense_mask(x.shape[1], text.shape[1], self.block, self.block)
    out, _ = attention(q, k, v, everything, implementation=self.implementation)
    return self.out(out.reshape(x.shape).astype(self.q.dtype))


class WanBlock(nnx.Module):
  """One layer: self-attention and MLP, modulated and gated; attention to the text, neither."""

  def __init__(self, config: WanConfig, method: Method, layout, rngs: nnx.Rngs):
    width = config.width
    self.dtype = DTYPES[config.dtype]
    self.attention_norm = _norm(width, rngs)
    self.text_norm = _norm(width, rngs, affine=True)
    self.mlp_norm = _norm(width, rngs)
    self.attention = SpectralAttention(
      config.dims,
      method,
      layout,
      named(rngs, "attention"),
      dtype=self.dtype,
      implementation=config.attention.implementation,
    )
    self.text = CrossAttention(config, named(rngs, "text"))
    linear = functools.partial(nnx.Linear, dtype=self.dtype)
    self.mlp_in = linear(width, config.mlp, rngs=named(rngs, "mlp_in"))
    self.mlp_out = linear(config.mlp, width, rngs=named(rngs, "mlp_out"))
    self.table = nnx.Param(jnp.zeros((6, width)))

  def __call__(self, x, condition, cond: Cond, layout, tables, state):
    """Returns x `[b, n_buffer, width]` in float32, the new state and the method's aux.

    The condition is the modulation, `[b, 1 or n_buffer, 6, width]`, and the text, `[b, m, width]`.
    """
    modulation, text = condition
    parts = jnp.unstack(self.table[...] + modulation, axis=-2)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
    y = (self.attention_norm(x) * (1 + scale) + shift).astype(self.dtype)
    y, state, aux = self.attention(y, cond, layout, tables, state)
    x = x + y * gate
    x = x + self.text(self.text_norm(x).astype(self.dtype), text)
    y = (self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift).astype(self.dtype)
    y = self.mlp_out(nnx.gelu(self.mlp_in(y), approximate=True))
    return x + y * mlp_gate, state, aux


class WanDiT(LayerStack):
  """A transformer that predicts the velocity `eps - x_0` of latents `[b, t, y, x, c]` of a text."""

  behind = ("table", "head")

  def __init__(
    self,
    config: WanConfig,
    latent_shape,
    rngs: nnx.Rngs,
    classes: int | None = None,
    embedding: int = 0,
  ):
    """Makes random weights.

    Args:
      config: sizes.
      latent_shape: `(t, y, x, c)`; other grids work with tables of their own.
      rngs: for the weights.
      classes: number of classes; a class is a text of one learned row, label `classes` is the null
        class. None: samples come with texts.
      embedding: numbers of the embedding that is the label in the place of a class; it is mapped to
        a text of one row. 0: classes.

    Raises:
      ConfigError: labels are classes or embeddings, and texts are not of one row.
    """
    self.config = config
    self.channels = latent_shape[-1]
    width = config.width
    layout = config.layout(latent_shape)
    patch = self.channels * math.prod(config.patch)

    def linear(name, inner, outer, dtype=jnp.float32):
      return nnx.Linear(inner, outer, dtype=dtype, rngs=named(rngs, name))

    dtype = DTYPES[config.dtype]
    label = None
    if classes is not None:
      if config.text_length != 1:
        raise ConfigError(
          f"config.model.text_length={config.text_length} must be 1: a class or an embedding is "
          "one row."
        )
      conditioner = EmbeddingConditioner if embedding else ClassConditioner
      label = conditioner(embedding or classes, config.text_width, named(rngs, "label"))
    # One assignment: flax fixes on the first one whether an attribute holds parameters.
    self.label = label
    self.embed = linear("embed", patch, width, dtype)
    self.time_in = linear("time_in", config.frequencies, width)
    self.time_out = linear("time_out", width, width)
    self.modulation = linear("modulation", width, 6 * width)
    self.text_in = linear("text_in", config.text_width, width, dtype)
    self.text_out = linear("text_out", width, width, dtype)
    runs = []
    first = 0
    for count, method in config.runs():
      keys = numbered(rngs, "layer", jnp.arange(first, first + count))
      runs.append(stacked(functools.partial(WanBlock, config, method, layout), keys))
      first += count
    self.runs = nnx.List(runs)
    self.norm = _norm(width, rngs)
    self.table = nnx.Param(jnp.zeros((2, width)))
    self.head = linear("head", width, patch)

  def null(self, count: int) -> np.ndarray:
    """Returns the label of samples without a condition.

    Of texts it is `[count, text_length, text_width]`, all zero; guidance takes the embedding of a
    negative prompt instead.
    """
    if self.label is not None:
      return self.label.null(count)
    config = self.config
    return np.zeros((count, config.text_length, config.text_width), np.float32)

  def __call__(
    self, x, time, text, tables, state=None, *, rng=None, phases=(), given=None, **moment
  ) -> tuple[jax.Array, list, list[dict]]:
    """Predicts the velocity of noisy latents.

    Args:
      x: `[b, t, y, x, c]`.
      time: `[b]`, 1 is noise, or `[b, n]` for each token in raster order.
      text: `[b, m, text_width]`, of the text encoder, zero behind a text's end; or the label, int
        `[b]` or an embedding `[b, e]`, of a model that was made for these.
      tables: as of `VideoDiT`, like what follows.
      given: None; no first frame can be given.

    Returns:
      As `VideoDiT`.
    """
    if given is not None:
      raise ConfigError("a WanDiT continues no first frame: sample without one.")
    layout = tables["layout"]
    features = time_features(time, self.config.frequencies)
    with jax.default_matmul_precision("highest"):  # as trained: TF32 would be the default
      embedding = self.time_out(nnx.silu(self.time_in(features)))
      modulation = self.modulation(nnx.silu(embedding))
    modulation = modulation.reshape(*embedding.shape[:-1], 6, -1)
    if time.ndim == 1:
      cond = Cond(time, embedding, rng=rng, **moment)
      embedding = embedding[:, None]
      modulation = modulation[:, None]
    else:
      cond = Cond(time.mean(1), embedding.mean(1), rng=rng, **moment)
      embedding = layout.pack(embedding)
      modulation = layout.pack(modulation)
    if self.label is not None:
      text = self.label(text)[:, None]
    text = self.text_out(nnx.gelu(self.text_in(text), approximate=True))
    tokens = self.embed(patchify(x, self.config.patch)).astype(jnp.float32)
    tokens = split(layout.pack(tokens), context=1)
    if state is None:
      state = self.init_state(x.shape[0], x.shape[1:], cond.guided)
    tokens, states, auxes = self.run_layers(tokens, (modulation, text), cond, tables, state, phases)
    shift, scale = jnp.unstack(self.table[...] + embedding[..., None, :], axis=-2)
    with jax.default_matmul_precision("highest"):
      velocity = self.head(self.norm(tokens) * (1 + scale) + shift)
    velocity = layout.unpack(split(velocity))
    return unpatchify(velocity, x.shape[1:], self.config.patch), states, auxes


def time_features(time: jax.Array, count: int) -> jax.Array:
  """Returns cosines and then sines of a timestep's angles, float32 `[..., count]`."""
  half = count // 2
  rates = jnp.exp(-math.log(_SLOWEST) * jnp.arange(half, dtype=jnp.float32) / half)
  # Multiplied in this order, whole thousandths stay whole.
  angles = (TIME_RANGE * time.astype(jnp.float32))[..., None] * rates
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def is_narrow(name: str) -> bool:
  """Tells whether a leaf may be kept in 16 bits: most matrices."""
  return name.endswith("kernel") and name.split("/")[0] not in _EXACT


def load_params(model: WanDiT, tensors: Mapping[str, np.ndarray], dtype=None) -> tuple:
  """Returns a model's parameters from the arrays of its files, and which ones those lack.

  What they lack are a method's own leaves, routers and gates.

  Args:
    model: also abstract, without arrays.
    tensors: by diffusers' names or the authors'.
    dtype: of the parameters of matrices; None: float32. All others are float32.

  Returns:
    A pytree as of `nnx.state(model)`; lacking leaves are the model's own. And their names.

  Raises:
    ConfigError: arrays are missing, unknown or of other shapes; lists them.
  """
  config = model.config
  weights = WanWeights(tensors, config.heads, config.width)
  lacking = []
  firsts = np.cumsum([0, *(count for count, _ in config.runs())])

  def value(path, leaf):
    name = leaf_name(path)
    if name.startswith("runs/"):
      _, run, inner = name.split("/", 2)
      shape = leaf.shape[1:]
      parts = [weights.leaf(inner, shape, int(firsts[int(run)] + i)) for i in range(len(leaf))]
      array = None if parts[0] is None else np.stack(parts)
    else:
      array = weights.leaf(name, leaf.shape)
    if array is None:
      lacking.append(name)
      return leaf
    narrow = dtype is not None and is_narrow(name)
    return jnp.asarray(array, dtype if narrow else jnp.float32)

  params = jax.tree_util.tree_map_with_path(value, nnx.state(model))
  weights.check()
  return params, lacking
