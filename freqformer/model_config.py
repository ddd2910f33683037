"""The model's configuration: sizes, patch, precision, and which method runs in which layers."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from freqformer.attention import AttentionDims
from freqformer.config import ConfigError, build, did_you_mean
from freqformer.layout import TileLayout
from freqformer.methods.base import Method
from freqformer.methods.registry import METHODS, method_class, parse_method, with_fields
from kernels.attention import BACKENDS

# width, depth, heads of DiT (arXiv 2212.09748).
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Attention of the whole model.

  Attributes:
    methods: `(name, method)` pairs, one per configured method.
    method: the name that runs in layers without a run of their own.
    layers: runs of layers with their own method, `((first, stop or None, name), ...)`; empty: `method` everywhere.
    block: rows of a tile in the buffer, `block_q = block_kv`.
    tile: extents of a tile (t, y, x), or empty for the best fit.
    qk_gain: initial gain of the query norm.
    implementation: attention backend, or None for automatic choice.
  """

  methods: tuple[tuple[str, Method], ...]
  method: str = "freqformer"
  layers: tuple[tuple[int, int | None, str], ...] = ()
  block: int = 64
  tile: tuple[int, ...] = ()
  qk_gain: float = 1.0
  implementation: str | None = None

  def __post_init__(self):
    for name in (self.method, *(run[2] for run in self.layers)):
      self.named(name)
    if self.block < 1 or len(self.tile) not in (0, 3):
      raise ValueError(f"{self.block=} must be >= 1 and {self.tile=} empty or three extents (t, y, x).")
    if self.implementation is not None and self.implementation not in BACKENDS:
      raise ValueError(f"{self.implementation=} must be None or one of {', '.join(BACKENDS)}.")

  def named(self, name: str) -> Method:
    """The configured method of a name; a known method without keys of its own runs with its defaults."""
    return dict(self.methods)[name] if name in dict(self.methods) else method_class(name)()

  def runs(self, depth: int) -> tuple[tuple[int, str], ...]:
    """`(layers, name)` from the first layer to the last.

    Raises:
      ConfigError: if the runs leave a gap, overlap or do not end at `depth`.
    """
    if not self.layers:
      return ((depth, self.method),)
    at, runs = 0, []
    for first, stop, name in self.layers:
      stop = depth if stop is None else stop
      if first != at or not first < stop <= depth:
        raise ConfigError(
          f"attention.layers {self.layers} must cover layers 0..{depth} in order without gaps; "
          f"the run ({first}, {stop}, {name!r}) does not start at {at} or does not end within the model."
        )
      runs.append((stop - first, name))
      at = stop
    if at != depth:
      raise ConfigError(f"attention.layers {self.layers} ends at layer {at}, the model has {depth}; end it with None.")
    return tuple(runs)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Of a `VideoDiT`.

  Attributes:
    attention: see `AttentionConfig`.
    size: "S", "B", "L", or "custom" with width, depth and heads given.
    width, depth, heads: 0 takes the size's.
    patch: latent cells per token (t, y, x).
    mlp_ratio: hidden width of the MLP over the width.
    dtype: of activations; parameters are float32.
    remat: recompute blocks in the backward, keeping attention outputs, LSE, routing and tables.
  """

  attention: AttentionConfig
  size: str = "S"
  width: int = 0
  depth: int = 0
  heads: int = 0
  patch: tuple[int, int, int] = (1, 2, 2)
  mlp_ratio: float = 4.0
  dtype: str = "float32"
  remat: bool = True

  def __post_init__(self):
    if self.size != "custom":
      if self.size not in SIZES:
        raise ValueError(f"size={self.size!r} is unknown; choose one of {', '.join(SIZES)} or custom with width, depth, heads.")
      for name, value in zip(("width", "depth", "heads"), SIZES[self.size], strict=True):
        object.__setattr__(self, name, getattr(self, name) or value)
    if min(self.width, self.depth, self.heads) < 1 or min(self.patch) < 1 or self.mlp_ratio <= 0:
      raise ValueError(
        f"sizes must be positive: {self.width=}, {self.depth=}, {self.heads=}, {self.patch=}, {self.mlp_ratio=}."
      )
    if self.dtype not in DTYPES:
      raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}.")
    self.dims  # noqa: B018  refuses heads that do not divide the width
    self.attention.runs(self.depth)

  @property
  def dims(self) -> AttentionDims:
    """Sizes of the attention layer."""
    return AttentionDims(self.width, self.heads, self.width, self.attention.qk_gain)

  def runs(self) -> tuple[tuple[int, Method], ...]:
    """`(layers, method)` from the first layer to the last."""
    return tuple((count, self.attention.named(name)) for count, name in self.attention.runs(self.depth))

  def grid(self, latent_shape) -> tuple[int, int, int]:
    """Token grid of latents `(t, y, x, c)`; a cell that fills only part of its patch is padded."""
    return tuple(-(-size // p) for size, p in zip(latent_shape[:3], self.patch, strict=True))

  def layout(self, latent_shape) -> TileLayout:
    """Tile order of the tokens of latents `(t, y, x, c)`."""
    return TileLayout.fit(self.grid(latent_shape), self.attention.block, self.attention.tile or None)

  def with_method(self, text: str) -> "ModelConfig":
    """The same model with one method everywhere; runs of layers keep their borders, so that the weights still fit.

    Args:
      text: as `parse_method` reads it: a name, or a name with some fields that replace the configured ones.
    """
    name, fields = parse_method(text)
    own = with_fields(self.attention.named(name), fields, f"model.attention.{name}")
    methods = (*(pair for pair in self.attention.methods if pair[0] != name), (name, own))
    layers = tuple((first, stop, name) for first, stop, _ in self.attention.layers)
    attention = dataclasses.replace(self.attention, methods=methods, method=name, layers=layers)
    return dataclasses.replace(self, attention=attention)


def model_config(values: Mapping) -> ModelConfig:
  """Builds the config from `config.model`; method groups sit beside the other keys of `attention`.

  Raises:
    ConfigError: names the key that is unknown, missing or wrong.
  """
  values = dict(values)
  attention = dict(values.get("attention", {}))
  methods = tuple(
    (name, build(method_class(name), attention.pop(name), f"model.attention.{name}")) for name in METHODS if name in attention
  )
  known = {f.name for f in dataclasses.fields(AttentionConfig)} | set(METHODS)
  for name in attention:
    if name not in known:
      raise ConfigError(f"config.model.attention has no key {name!r}; {did_you_mean(name, known)}")
  values["attention"] = build(AttentionConfig, {**attention, "methods": methods}, "model.attention")
  return build(ModelConfig, values, "model")
