"""UMT5's encoder (arXiv 2304.09151), which turns the tokens of a prompt into Wan's condition.

It is T5's encoder (arXiv 1910.10683) with a gated MLP (arXiv 2002.05202) and, unlike T5, a table of
relative positions in every layer. Functions over a dict of arrays by their names in the files.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.config import ConfigError, require
from freqformer.wan.json_file import read_object

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # two names of one table
_FINAL_NORM = "encoder.final_layer_norm.weight"
_ATTENTION = "layer.0.SelfAttention"
_MLP = "layer.1.DenseReluDense"
_MASKED = np.finfo(np.float32).min  # not -inf: a row that sees no token stays finite
_MOST_NAMES = 8  # choice: of one kind in a message
# The keys of config.json that say what is computed, and the only values that are.
_COMPUTED = {"model_type": "umt5", "feed_forward_proj": "gated-gelu"}


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
  """Sizes of an encoder, under the names of its config.json.

  Attributes:
    vocab_size: rows of the table of tokens.
    d_model: width of the residual stream.
    d_kv: width of a head; heads together need not be as wide as the stream.
    d_ff: width inside the MLP.
    num_layers: layers of the encoder.
    num_heads: heads of a layer.
    relative_attention_num_buckets: classes of relative position, half of them for later keys.
    relative_attention_max_distance: tokens from which on all distances are one class.
    layer_norm_epsilon: added to the mean square.
  """

  vocab_size: int
  d_model: int
  d_kv: int
  d_ff: int
  num_layers: int
  num_heads: int
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6

  def __post_init__(self):
    require(self, "vocab_size d_model d_kv d_ff num_layers num_heads", least=1)
    require(self, "relative_attention_num_buckets", least=4)
    most_exact = self.relative_attention_num_buckets // 4
    require(self, "relative_attention_max_distance", above=most_exact)
    require(self, "layer_norm_epsilon", above=0)


def read_config(path: pathlib.Path) -> TextEncoderConfig:
  """Returns the sizes that a text encoder's config.json tells.

  Raises:
    ConfigError: the file is not there or damaged, describes another model, or lacks a size.
  """
  values = read_object(path)
  for key, supported in _COMPUTED.items():
    if values.get(key) != supported:
      raise ConfigError(
        f"{path}: {key}={values.get(key)!r} is not supported; the text encoder of Wan has "
        f"{supported!r}."
      )
  fields = dataclasses.fields(TextEncoderConfig)
  lacking = [
    field.name
    for field in fields
    if field.default is dataclasses.MISSING and field.name not in values
  ]
  if lacking:
    raise ConfigError(f"{path} lacks {', '.join(lacking)}; download it again.")
  try:
    return TextEncoderConfig(**{f.name: values[f.name] for f in fields if f.name in values})
  except (TypeError, ValueError) as error:
    raise ConfigError(f"{path}: {error}") from error


def parameter_shapes(config: TextEncoderConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter by its name; the table of tokens has its first name."""
  shapes = {EMBEDDINGS[0]: (config.vocab_size, config.d_model), _FINAL_NORM: (config.d_model,)}
  for layer in range(config.num_layers):
    for name, shape in _layer_shapes(config).items():
      shapes[_of_layer(layer, name)] = shape
  return shapes


def stacked(
  config: TextEncoderConfig, params: Mapping[str, np.ndarray], dtype=None
) -> dict[str, jax.Array | dict[str, jax.Array]]:
  """Returns the parameters as `encode` takes them, with one array for all layers.

  Arrays are stacked and put on the device one after the other: the host never holds a second copy
  of all of them.

  Args:
    params: arrays by their names in the files.
    dtype: of the result, e.g. bfloat16; None keeps that of the files.

  Returns:
    `{"embedding": [vocab_size, d_model], "final_norm": [d_model], "layers": {name: [l, ...]}}`.

  Raises:
    ConfigError: names are missing or unknown, or arrays have other shapes: all in one message.
  """
  params = _checked(config, params)

  def put(array):
    return jnp.asarray(array if dtype is None else array.astype(dtype))

  layers = {}
  for name in _layer_shapes(config):
    layers[name] = put(
      np.stack([params[_of_layer(layer, name)] for layer in range(config.num_layers)])
    )
  return {
    "embedding": put(params[EMBEDDINGS[0]]),
    "final_norm": put(params[_FINAL_NORM]),
    "layers": layers,
  }


def encode(config: TextEncoderConfig, params: Mapping, ids, mask) -> jax.Array:
  """Returns the encoder's last hidden states, float32 `[b, m, d_model]`, zero where `mask` is 0.

  Residual stream, norms and softmax are float32; factors of products have the parameters' dtype.
  Scores are not divided by the root of `d_kv`: T5's initialisation contains it.

  Args:
    params: of `stacked`.
    ids: tokens, int `[b, m]`, each below `vocab_size`.
    mask: int or bool `[b, m]`: 1 for tokens, 0 for padding, which no token sees.
  """
  seen = jnp.asarray(mask) > 0
  classes = jnp.asarray(
    relative_buckets(
      ids.shape[1], config.relative_attention_num_buckets, config.relative_attention_max_distance
    )
  )
  x = params["embedding"][ids].astype(jnp.float32)

  def layer(x, weights):
    x = x + _attention(config, weights, x, seen, classes)
    x = x + _mlp(config, weights, x)
    return x, None

  x, _ = jax.lax.scan(layer, x, params["layers"])
  x = _norm(config, params["final_norm"], x)
  return jnp.where(seen[..., None], x, 0)


def relative_buckets(length: int, buckets: int, most: int) -> np.ndarray:
  """Returns the class of each relative position from `1 - length` to `length - 1`, int32.

  The position is that of the key minus that of the query. Half of the classes are for later keys;
  of each half one half is for single distances, and the others widen by a constant factor up to
  `most` (arXiv 1910.10683, section 2.1).

  The logarithms are float32, as in the published code, so that distances at which a class begins
  fall where they fell in training. For 32 classes up to 128 those of float64 give the same classes.
  """
  relative = np.arange(1 - length, length)
  half = buckets // 2
  exact = half // 2
  distance = np.abs(relative)
  logarithm = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  share = logarithm / np.float32(math.log(most / exact))
  wide = exact + (share * np.float32(half - exact)).astype(np.int64)
  found = np.where(distance < exact, distance, np.minimum(wide, half - 1))
  return (found + half * (relative > 0)).astype(np.int32)


def _attention(config: TextEncoderConfig, weights, x, seen, classes):
  """Returns what attention adds, `[b, m, d_model]`."""
  batch, length, _ = x.shape
  y = _norm(config, weights["layer.0.layer_norm.weight"], x)

  def heads(name):
    projected = _linear(weights[f"{_ATTENTION}.{name}.weight"], y)
    return projected.reshape(batch, length, config.num_heads, config.d_kv)

  q = heads("q")
  k = heads("k")
  v = heads("v")
  dtype = weights[f"{_ATTENTION}.v.weight"].dtype
  scores = jnp.einsum(
    "bqhd,bkhd->bhqk", q.astype(dtype), k.astype(dtype), preferred_element_type=jnp.float32
  )
  table = weights[f"{_ATTENTION}.relative_attention_bias.weight"].astype(jnp.float32)
  places = jnp.arange(length)
  bias = table[classes][places[None] - places[:, None] + length - 1]  # [query, key, head]
  scores = scores + jnp.moveaxis(bias, -1, 0)
  shares = jax.nn.softmax(jnp.where(seen[:, None, None], scores, _MASKED))
  out = jnp.einsum(
    "bhqk,bkhd->bqhd", shares.astype(dtype), v.astype(dtype), preferred_element_type=jnp.float32
  )
  return _linear(weights[f"{_ATTENTION}.o.weight"], out.reshape(batch, length, -1))


def _mlp(config: TextEncoderConfig, weights, x):
  """Returns what the gated MLP adds, `[b, m, d_model]`."""
  y = _norm(config, weights["layer.1.layer_norm.weight"], x)
  gate = jax.nn.gelu(_linear(weights[f"{_MLP}.wi_0.weight"], y), approximate=True)
  return _linear(weights[f"{_MLP}.wo.weight"], gate * _linear(weights[f"{_MLP}.wi_1.weight"], y))


def _norm(config: TextEncoderConfig, gain, x):
  """Returns float32 rows of root mean square 1, times a gain; no mean is subtracted."""
  mean_square = jnp.square(x).mean(-1, keepdims=True)
  return x * jax.lax.rsqrt(mean_square + config.layer_norm_epsilon) * gain.astype(jnp.float32)


def _linear(weight, x):
  """Returns `x W^T`, float32, of a weight `[out, in]`."""
  return jnp.einsum(
    "...i,oi->...o", x.astype(weight.dtype), weight, preferred_element_type=jnp.float32
  )


def _of_layer(layer: int, name: str) -> str:
  """Returns the whole name of a layer's parameter."""
  return f"encoder.block.{layer}.{name}"


def _layer_shapes(config: TextEncoderConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a layer's parameters by their names behind the layer's own."""
  inner = config.num_heads * config.d_kv
  inward = (inner, config.d_model)
  hidden = (config.d_ff, config.d_model)
  return {
    f"{_ATTENTION}.q.weight": inward,
    f"{_ATTENTION}.k.weight": inward,
    f"{_ATTENTION}.v.weight": inward,
    f"{_ATTENTION}.o.weight": (config.d_model, inner),
    f"{_ATTENTION}.relative_attention_bias.weight": (
      config.relative_attention_num_buckets,
      config.num_heads,
    ),
    "layer.0.layer_norm.weight": (config.d_model,),
    f"{_MLP}.wi_0.weight": hidden,
    f"{_MLP}.wi_1.weight": hidden,
    f"{_MLP}.wo.weight": (config.d_model, config.d_ff),
    "layer.1.layer_norm.weight": (config.d_model,),
  }


def _checked(config: TextEncoderConfig, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the parameters, the table of tokens under its first name, if they are the config's."""
  given = dict(params)
  first, second = EMBEDDINGS
  repeated = second in given
  if repeated:
    other = given.pop(second)
    table = given.setdefault(first, other)
    repeated = table is not other
  wanted = parameter_shapes(config)
  problems = {
    "missing": [name for name in wanted if name not in given],
    "unknown": [name for name in given if name not in wanted],
    "of another shape": [
      f"{name} {tuple(given[name].shape)} instead of {shape}"
      for name, shape in wanted.items()
      if name in given and tuple(given[name].shape) != shape
    ],
  }
  if repeated and not np.array_equal(table, other):
    problems["two tables of tokens that differ"] = list(EMBEDDINGS)
  lines = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
  if lines:
    raise ConfigError(
      "the weights are not those of the text encoder that its config.json describes; "
      + "; ".join(lines)
      + "."
    )
  return given


def _listed(names: list[str]) -> str:
  """Returns the first names, and how many there are more."""
  more = len(names) - _MOST_NAMES
  return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
