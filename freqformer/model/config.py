"""The model's configuration: sizes, patch, precision, and which method runs in which layers."""

import dataclasses
import itertools
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from freqformer.config import ConfigError, refusing, require, require_one_of
from freqformer.cost import DENSE, BlockShape
from freqformer.grid.layout import TileLayout
from freqformer.grid.rotary import grid_theta
from freqformer.kernels.block_sparse.api import ATTENTION
from freqformer.kernels.core.op import ALIASES
from freqformer.methods.base import Method
from freqformer.methods.registry import method_class, parse_method, with_fields
from freqformer.model.attention import AttentionDims, keys_per_query, starting_gain
from freqformer.model.precondition import Table, measured_power
from freqformer.model.schedule import DenseSchedule, Part, check_dense, parse_schedule

# width, depth, heads of DiT (arXiv 2212.09748).
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
REMAT_POLICIES = ("full", "attention", "products")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Attention of the whole model.

  A config file may write fields behind a method's name, in `method` and in `layers`:
  `"radial(decay=0.5)"`. They replace those of the method's own group.

  Attributes:
    methods: `(name, method)` pairs.
    method: name of the method that runs in every layer, unless `layers` is given.
    layers: runs of layers with a method each, `((first, stop or None, name), ...)`, or empty.
    schedule: evaluations of a sampling run, and layers, that are dense whatever the method.
    block: rows of a tile in the buffer, `block_q = block_kv`.
    tile: extents of a tile (t, y, x), or empty for the best fit.
    qk_gain: initial gain of the query norm; 0: from the keys per query and the head dimension
      (`starting_gain`), of runs of layers with several methods the longest lists'.
    qk_bias: spread of the constant that queries and keys share at the start; with rotary it makes
      near tokens attend to each other before anything is learned. 0: none.
    implementation: of the attention kernel, or None for automatic choice.
  """

  methods: tuple[tuple[str, Method], ...]
  method: str = "freqformer"
  layers: tuple[tuple[int, int | None, str], ...] = ()
  schedule: DenseSchedule = DenseSchedule()
  block: int = 64
  tile: tuple[int, ...] = ()
  qk_gain: float = 0.0
  qk_bias: float = 0.0
  implementation: str | None = None

  def __post_init__(self):
    for name in (self.method, *(run[2] for run in self.layers)):
      self.named(name)
    require(self, "block tile", least=1)
    require(self, "qk_gain qk_bias", least=0)
    if len(self.tile) not in (0, 3):
      raise ValueError(f"tile={self.tile} must be empty or three extents (t, y, x).")
    if self.implementation is not None and self.implementation not in ALIASES:
      require_one_of(self, "implementation", tuple(ATTENTION.implementations))

  def named(self, name: str) -> Method:
    """Returns the configured method of a name; one that is not configured has its defaults."""
    configured = dict(self.methods)
    return configured[name] if name in configured else method_class(name)()

  def runs(self, depth: int) -> tuple[tuple[int, str], ...]:
    """Returns `(layers, name)` in order; raises ConfigError if they do not cover 0 to `depth`."""
    if not self.layers:
      return ((depth, self.method),)
    edges = [0, *(depth if stop is None else stop for _, stop, _ in self.layers)]
    firsts = [first for first, _, _ in self.layers]
    if firsts != edges[:-1] or edges[-1] != depth or edges != sorted(set(edges)):
      raise ConfigError(
        f"attention.layers {self.layers} must cover layers 0..{depth} in order without gaps; the "
        "last run may end with None."
      )
    names = [name for _, _, name in self.layers]
    return tuple(zip(np.diff(edges).tolist(), names, strict=True))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Settings of a `VideoDiT`; those of other models inherit it.

  Attributes:
    size: "S", "B", "L", or "custom" with width, depth and heads given; each is the size's if 0.
    patch: latent cells per token (t, y, x).
    rope_theta: base of rotary per axis (t, y, x), or one for all; empty: from the grid that the
      model is trained on (`resolved`), and kept on all others.
    mlp_ratio: hidden width of the MLP over the width.
    skip: add a learned multiple of the noisy latents to the velocity, per channel and timestep, so
      that the layers need not learn it.
    precondition: let the transformer add to the best linear prediction of each frequency instead of
      predicting all of the velocity (`freqformer/model/precondition.py`).
    spectrum: power of the training latents for it, `measured_power`; empty: measured when training
      begins.
    positions: add a learned function of a token's place in the clip to its embedding. Rotary alone
      only knows distances between tokens.
    first_frame: the first latent frame may be given clean; an embedding marks its tokens. Training
      gives it to a share of the samples (`train.first_frame`).
    dtype: of activations; parameters are float32.
    remat: compute layers again in the backward instead of keeping what it needs of them.
    remat_policy: what is kept all the same, beside a layer's input and its choices: "attention":
      output and LSE of the attention kernel, which then runs once; "full": nothing; "products":
      with attention also the outputs of projections and MLP, so that little is computed again.
  """

  attention: AttentionConfig
  size: str = "S"
  width: int = 0
  depth: int = 0
  heads: int = 0
  patch: tuple[int, int, int] = (1, 2, 2)
  rope_theta: tuple[float, ...] = ()
  mlp_ratio: float = 4.0
  skip: bool = False
  precondition: bool = False
  spectrum: Table = ()
  positions: bool = False
  first_frame: bool = False
  dtype: str = "float32"
  remat: bool = True
  remat_policy: str = "attention"

  def __post_init__(self):
    require_one_of(self, "size", (*SIZES, "custom"))
    if self.size != "custom":
      for name, value in zip(("width", "depth", "heads"), SIZES[self.size], strict=True):
        object.__setattr__(self, name, getattr(self, name) or value)
    require(self, "width depth heads patch", least=1)
    require(self, "mlp_ratio", above=0)
    require(self, "rope_theta", least=1)
    if len(self.rope_theta) not in (0, 1, 3):
      raise ValueError(
        f"rope_theta={self.rope_theta} must be empty, one base, or three bases (t, y, x)."
      )
    if len(self.rope_theta) == 1:
      object.__setattr__(self, "rope_theta", self.rope_theta * 3)
    require_one_of(self, "dtype", DTYPES)
    require_one_of(self, "remat_policy", REMAT_POLICIES)
    if self.first_frame and self.precondition:
      raise ValueError(
        "precondition=True mixes all frames, so that none can be given clean: set "
        "first_frame=False or precondition=False."
      )
    if self.first_frame and self.patch[0] > 1:
      raise ValueError(
        f"first_frame=True needs tokens of one latent frame, patch={self.patch} holds "
        f"{self.patch[0]}; set patch={(1, *self.patch[1:])}."
      )
    self.dims  # noqa: B018  refuses heads that do not divide the width
    self.attention.runs(self.depth)

  @property
  def block_shape(self) -> BlockShape:
    """Sizes of a layer, by which its work is counted."""
    return BlockShape(self.width, self.heads, int(self.width * self.mlp_ratio))

  @property
  def dims(self) -> AttentionDims:
    """Sizes of the attention layer."""
    own = self.attention
    return AttentionDims(
      self.width, self.heads, self.width, own.qk_gain, self.rope_theta, own.qk_bias
    )

  def resolved(self, latent_shape) -> "ModelConfig":
    """Returns the config in which numbers stand for what the grid of training decides.

    Args:
      latent_shape: `(t, y, x, c)` in training.

    Raises:
      ConfigError: a method cannot serve the grid.
    """
    layout = self.layout(latent_shape)
    head_dim = self.dims.head_dim
    theta = self.rope_theta or grid_theta(layout.grid, head_dim)
    keys = []
    for _, method in self.runs():
      with refusing(f"attention method {type(method).__name__}"):
        keys.append(keys_per_query(method, layout, self.heads))
    gain = self.attention.qk_gain or starting_gain(max(keys), head_dim)
    attention = dataclasses.replace(self.attention, qk_gain=gain)
    return dataclasses.replace(self, rope_theta=theta, attention=attention)

  def with_spectrum(self, latents: Iterable[np.ndarray]) -> "ModelConfig":
    """Returns the config with the spectrum of training latents `[t, y, x, c]`, if it needs one."""
    if not self.precondition or self.spectrum:
      return self
    return dataclasses.replace(self, spectrum=measured_power(latents))

  def check_training(self, latent_shape) -> None:
    """Raises ConfigError if a method's training cannot do on these latents what its config asks."""
    layout = self.layout(latent_shape)
    for _, method in self.runs():
      method.check_training(layout, self.heads)

  def runs(self) -> tuple[tuple[int, Method], ...]:
    """Returns `(layers, method)` from the first layer to the last."""
    attention = self.attention
    return tuple((count, attention.named(name)) for count, name in attention.runs(self.depth))

  @property
  def branches(self) -> tuple[str, ...]:
    """Names of what a head can be given, in any layer."""
    return tuple(dict.fromkeys(name for _, method in self.runs() for name in method.branches))

  def whole_runs(self) -> tuple[Part, ...]:
    """Returns one part per run of layers."""
    return tuple(Part(i, 0, count) for i, (count, _) in enumerate(self.runs()))

  def parts(self) -> tuple[Part, ...]:
    """Returns the runs of layers, cut at those that `attention.schedule` makes dense."""
    dense = self.attention.schedule.layers(self.depth)
    found = []
    start = 0
    for i, (count, _) in enumerate(self.runs()):
      flags = ((layer - start, layer in dense) for layer in range(start, start + count))
      for is_dense, layers in itertools.groupby(flags, key=lambda flag: flag[1]):
        numbers = [layer for layer, _ in layers]
        found.append(Part(i, numbers[0], numbers[-1] + 1, is_dense))
      start += count
    return tuple(found)

  def phases(self, evaluations: int) -> list[tuple[str, ...]]:
    """Returns the phases of each evaluation of a sampling run, one for each of `parts`.

    Raises:
      ConfigError: a method's schedule, or `attention.schedule`, does not fit so many evaluations.
    """
    runs = self.runs()
    for _, method in runs:
      method.check_run(evaluations)
    dense = self.attention.schedule.evaluations(evaluations)
    found = []
    for number in range(evaluations):
      phases = []
      for part in self.parts():
        method = runs[part.run][1]
        phase = method.phase(number, evaluations)
        if part.dense or number in dense:
          # A layer that is always dense never uses what its method would have found.
          check_dense(method, method.usual_phase if part.dense else phase, number, evaluations)
          phase = DENSE
        phases.append(phase)
      found.append(tuple(phases))
    return found

  def layout(self, latent_shape) -> TileLayout:
    """Returns the tile order of the tokens of latents `(t, y, x, c)`; cut patches count as whole.

    Raises:
      ConfigError: a tile does not fit into its block.
    """
    grid = tuple(-(-size // p) for size, p in zip(latent_shape[:3], self.patch, strict=True))
    with refusing("config.model.attention"):
      return TileLayout.fit(grid, self.attention.block, self.attention.tile or None)

  def with_schedule(self, text: str) -> "ModelConfig":
    """Returns the same model with another `attention.schedule`, e.g. "dense_first=0.1"."""
    attention = dataclasses.replace(self.attention, schedule=parse_schedule(text))
    return dataclasses.replace(self, attention=attention)

  def with_dense_layers(self, count: int) -> "ModelConfig":
    """Returns the same model with a schedule in which just the first `count` layers are dense."""
    schedule = DenseSchedule(dense_layers=tuple(range(count)))
    return dataclasses.replace(
      self, attention=dataclasses.replace(self.attention, schedule=schedule)
    )

  def with_method(self, text: str) -> "ModelConfig":
    """Returns the same model with one method everywhere, as `parse_method` reads it.

    Runs of layers keep their borders, so that the weights still fit.
    """
    name, fields = parse_method(text)
    own = with_fields(self.attention.named(name), fields, f"model.attention.{name}")
    attention = dataclasses.replace(
      self.attention,
      methods=tuple((dict(self.attention.methods) | {name: own}).items()),
      method=name,
      layers=tuple((first, stop, name) for first, stop, _ in self.attention.layers),
    )
    return dataclasses.replace(self, attention=attention)
