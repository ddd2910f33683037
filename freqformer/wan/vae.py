"""Wan's video autoencoders, 2.1 and 2.2: 4 k + 1 frames to k + 1 latent frames, causal in time.

The weights are a dict by the names of diffusers' `AutoencoderKLWan`; the structure is read off the
names. Time runs in chunks under one `lax.scan`: the first frame alone, then four frames (or one
latent frame) at a time. Each causal convolution hands its last input frames to the next chunk, so
that the result is that of the whole video and the working memory that of one chunk. Two rules make
the first frame special, as in the authors' code: halving and doubling of time leave it as it is,
and the convolution that doubles time never sees it, not even as the past of the second chunk.

Sources: Wan-Video/Wan2.1 `wan/modules/vae.py`, Wan-Video/Wan2.2 `wan/modules/vae2_2.py`; names:
huggingface/diffusers `autoencoder_kl_wan.py`.
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.config import ConfigError
from freqformer.wan import files

_PAST = 2  # frames that a causal convolution of three looks back
_COLOURS = 3
_LEAST_NORM = 1e-12  # of `torch.nn.functional.normalize`
_NAMED = 6  # names that a report gives of each kind
_DOWN = "encoder.down_blocks"
_UP = "decoder.up_blocks"
_CLASS = "AutoencoderKLWan"

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Structure:
  """The sizes of an autoencoder that are not sizes of its layers.

  Attributes:
    levels: resolutions; rows and columns halve from each to the next.
    resnets: residual blocks of a level of the encoder; the decoder has one more.
    halves_time: for each step from a level of the encoder to the next, whether time halves, too;
      the decoder doubles it in the same places.
    patch: rows and columns of pixels that are channels of the first level.
    residual: levels have shortcuts around them (2.2).
    channels: of a latent cell.
  """

  levels: int
  resnets: int
  halves_time: tuple[bool, ...]
  patch: int
  residual: bool
  channels: int

  @property
  def factor(self) -> tuple[int, int, int]:
    """Pixels of a latent cell, (t, y, x); the first latent frame shows one frame alone."""
    side = self.patch * 2 ** (self.levels - 1)
    return 2 ** sum(self.halves_time), side, side

  def down(self, level: int) -> tuple[list[str], str]:
    """Returns the names of the residual blocks of a level, and of the layer that halves it."""
    if self.residual:
      place = f"{_DOWN}.{level}"
      return [f"{place}.resnets.{i}" for i in range(self.resnets)], f"{place}.downsampler"
    first = level * (self.resnets + 1)  # one flat list
    names = [f"{_DOWN}.{first + i}" for i in range(self.resnets + 1)]
    return names[:-1], names[-1]

  def up(self, level: int) -> tuple[list[str], str]:
    """Returns the names of the residual blocks of a level, and of the layer that doubles it."""
    place = f"{_UP}.{level}"
    doubler = "upsampler" if self.residual else "upsamplers.0"
    return [f"{place}.resnets.{i}" for i in range(self.resnets + 1)], f"{place}.{doubler}"


def encode(params: Mapping[str, jax.Array], video: jax.Array, mean, std) -> jax.Array:
  """Encodes a video to normalised latents, the means of their posteriors.

  Convolutions and products have JAX's default precision; `jax.default_matmul_precision` changes it.

  Args:
    params: weights by name, as `read_structure` takes their shapes.
    video: `[b, 4 k + 1, rows, cols, 3]` in [-1, 1].
    mean: of latents, `[c]` or a number; `latents_mean` of the autoencoder's `config.json`.
    std: of latents, likewise; `latents_std`.

  Returns:
    float32 `[b, k + 1, rows / fy, cols / fx, c]`.

  Raises:
    ConfigError: the weights do not fit, or the video has other sizes.
  """
  structure = read_structure(shapes_of(params))
  if video.ndim != 5 or video.shape[-1] != _COLOURS:
    raise ConfigError(f"a video is [b, frames, rows, cols, 3], got {list(video.shape)}.")
  check_video(video.shape[1:4], structure.factor)
  x = _patches(jnp.asarray(video, jnp.float32), structure.patch)
  z = _in_chunks(_encoder(_Weights(params), structure), x, structure.factor[0])
  return (z[..., : structure.channels] - mean) / std


def decode(params: Mapping[str, jax.Array], latents: jax.Array, mean, std) -> jax.Array:
  """Decodes normalised latents to a video; the counterpart of `encode`.

  Args:
    params: weights by name, as `read_structure` takes their shapes.
    latents: `[b, k + 1, y, x, c]`.
    mean: as of `encode`.
    std: as of `encode`.

  Returns:
    float32 `[b, 4 k + 1, fy y, fx x, 3]` in [-1, 1].

  Raises:
    ConfigError: the weights do not fit, or the latents have other channels.
  """
  structure = read_structure(shapes_of(params))
  if latents.ndim != 5 or latents.shape[-1] != structure.channels:
    raise ConfigError(
      f"latents have the shape {list(latents.shape)}; this VAE takes [b, t, y, x, c] with c = "
      f"{structure.channels}."
    )
  z = jnp.asarray(latents, jnp.float32) * std + mean
  x = _in_chunks(_decoder(_Weights(params), structure), z, 1)
  return jnp.clip(_pixels(x, structure.patch), -1, 1)


@dataclasses.dataclass(frozen=True)
class Vae:
  """A VAE on the disk.

  Attributes:
    structure: of its network.
    mean: of latents, float32 `[c]`.
    std: of latents, float32 `[c]`.
    tensors: its weights, not read yet.
  """

  structure: Structure
  mean: np.ndarray
  std: np.ndarray
  tensors: files.Tensors


def open_vae(folder: str | pathlib.Path) -> Vae:
  """Opens the VAE in a folder of diffusers, or in the folder `vae` of a model.

  Weights are checked by their headers and not read: `dict(opened.tensors)` reads them.

  Raises:
    ConfigError: the config or the weights are missing, cut, or not of a Wan VAE.
  """
  folder = files.part(folder, "vae")
  config = files.read_config(folder)
  if config.get("_class_name") != _CLASS:
    files.refuse_pickles(folder)
    raise ConfigError(
      f"{folder / 'config.json'} is of {config.get('_class_name')}, not of {_CLASS}; name the "
      "folder of a Wan VAE, or of a model with one in its folder vae."
    )
  tensors = files.open_tensors(folder)
  try:
    structure = read_structure(tensors.shapes)
  except ConfigError as error:
    raise ConfigError(f"{folder}: {error}") from error
  mean = _statistic(config, "latents_mean", structure.channels, folder)
  std = _statistic(config, "latents_std", structure.channels, folder)
  if (std <= 0).any():
    raise ConfigError(f"{folder / 'config.json'}: latents_std must be above 0 in every entry.")
  return Vae(structure, mean, std, tensors)


def _statistic(config: Mapping, key: str, channels: int, folder: pathlib.Path) -> np.ndarray:
  """Returns a number per latent channel of a config."""
  given = config.get(key)
  try:
    found = np.asarray(given, np.float32)
  except (TypeError, ValueError):
    found = np.empty(0, np.float32)
  if found.shape != (channels,) or not np.isfinite(found).all():
    raise ConfigError(
      f"{folder / 'config.json'}: {key} must be {channels} numbers, one for each latent channel of "
      f"the weights, got {given!r}; download config and weights from one repository."
    )
  return found


def check_video(sizes: Shape, factor: tuple[int, int, int]) -> None:
  """Refuses (frames, rows, cols) that do not divide into latent cells of `factor` pixels.

  Raises:
    ConfigError: names the nearest sizes that do.
  """
  frames, *sides = sizes
  period = factor[0]
  if frames < 1 or (frames - 1) % period:
    below = max(frames - 1, 0) // period * period + 1
    near = f"{below} and {below + period} are the nearest" if frames > 0 else "1 is the least"
    raise ConfigError(f"a video of {frames} frames: the VAE takes {period} k + 1 of them; {near}.")
  if any(n < 1 or n % f for n, f in zip(sides, factor[1:], strict=True)):
    nearest = [max(round(n / f), 1) * f for n, f in zip(sides, factor[1:], strict=True)]
    raise ConfigError(
      f"a video of {sides[0]} x {sides[1]} pixels (rows x columns): the VAE takes multiples of "
      f"{factor[1]} x {factor[2]}; the nearest are {nearest[0]} x {nearest[1]}."
    )


def shapes_of(params: Mapping[str, jax.Array]) -> dict[str, Shape]:
  """Returns the shape of each weight."""
  return {name: tuple(array.shape) for name, array in params.items()}


def read_structure(shapes: Mapping[str, Shape]) -> Structure:
  """Reads the structure off names and shapes, and checks each of them.

  The network itself is run on shapes alone, so that what it asks for is what is checked.

  Raises:
    ConfigError: one report of all names that are missing, unknown or have another shape.
  """
  return _checked(tuple(sorted((name, tuple(shape)) for name, shape in shapes.items())))


@functools.lru_cache(maxsize=8)  # tracing a real one on shapes takes about a second
def _checked(items: tuple[tuple[str, Shape], ...]) -> Structure:
  weights = _Shapes(dict(items))
  structure = _guess(weights.shapes)
  period = structure.factor[0]
  side = 2 ** (structure.levels - 1)
  # The first chunk and another one, of a latent cell.
  pixels = (1, 1 + period, side, side, _COLOURS * structure.patch**2)
  cells = (1, 2, 1, 1, structure.channels)
  parts = (_encoder(weights, structure), pixels, period), (_decoder(weights, structure), cells, 1)
  try:
    for run, shape, size in parts:
      x = jax.ShapeDtypeStruct(shape, jnp.float32)
      jax.eval_shape(functools.partial(_in_chunks, run, size=size), x)
  except (TypeError, ValueError) as error:
    # A wrong width can make layers impossible; the report then has what came before.
    if not weights.problems():
      raise ConfigError(f"the widths of the VAE's layers do not fit together: {error}") from error
  found = weights.problems()
  if found:
    raise ConfigError(
      f"the weights are not those of a Wan VAE of {structure.levels} levels and "
      f"{structure.channels} latent channels: {'; '.join(found)}. Download the folder again, and "
      "keep one set of weights in it."
    )
  return structure


def _guess(shapes: Mapping[str, Shape]) -> Structure:
  """Returns the structure that the names suggest.

  Indices are counted, not read: a wild one cannot make a wild structure.
  """

  def distinct(pattern: str) -> int:
    return len({found[1] for name in shapes if (found := re.match(pattern, name))})

  levels = distinct(rf"{re.escape(_UP)}\.(\d+)\.")
  resnets = distinct(rf"{re.escape(_UP)}\.\d+\.resnets\.(\d+)\.") - 1
  if not levels or resnets < 1:
    raise ConfigError(
      "the weights have no names of a Wan VAE in diffusers' layout, e.g. "
      f"{_UP}.0.resnets.0.conv1.weight; download the VAE of a repository whose name ends in "
      "-Diffusers."
    )
  entry = shapes.get("encoder.conv_in.weight", ())
  latent = shapes.get("post_quant_conv.weight", ()) or shapes.get("post_quant_conv.bias", ())
  rough = Structure(
    levels=levels,
    resnets=resnets,
    halves_time=(),
    patch=max(math.isqrt(entry[1] // _COLOURS), 1) if len(entry) > 1 else 1,
    residual=any(name.startswith(f"{_DOWN}.0.resnets.") for name in shapes),
    channels=max(latent[0], 1) if latent else 1,
  )

  def has_time(place: str) -> bool:
    return any(name.startswith(f"{place}.time_conv.") for name in shapes)

  # Either half tells: what the other one lacks is then missed.
  steps = range(levels - 1)
  halves = [has_time(rough.down(i)[1]) or has_time(rough.up(levels - 2 - i)[1]) for i in steps]
  return dataclasses.replace(rough, halves_time=tuple(halves))


class _Weights:
  """Weights by name, as float32."""

  def __init__(self, params: Mapping[str, jax.Array]):
    self._params = params

  def array(self, name: str, shape: Shape) -> jax.Array:
    """Returns the weight of a name, which has the shape that the network expects."""
    return jnp.asarray(self._params[name], jnp.float32)

  def width(self, layer: str, otherwise: int) -> int:
    """Returns the output channels of a layer, where nothing else determines them."""
    return self._params[f"{layer}.weight"].shape[0]


class _Shapes:
  """Stands for `_Weights` where shapes alone are known, and keeps what the network asks for."""

  def __init__(self, shapes: Mapping[str, Shape]):
    self.shapes = shapes
    self._asked = {}

  def array(self, name: str, shape: Shape) -> jax.Array:
    self._asked[name] = shape
    return jnp.zeros(shape, jnp.float32)

  def width(self, layer: str, otherwise: int) -> int:
    for name in (f"{layer}.weight", f"{layer}.bias"):
      if self.shapes.get(name):
        return self.shapes[name][0]
    return otherwise

  def problems(self) -> list[str]:
    """Describes the names that are missing, unknown, or have another shape than was asked for."""
    missing = [name for name in self._asked if name not in self.shapes]
    unknown = [name for name in self.shapes if name not in self._asked]
    other = [
      f"{name} is {list(self.shapes[name])}, not {list(shape)}"
      for name, shape in self._asked.items()
      if name in self.shapes and self.shapes[name] != shape
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": other}
    return [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]


def _some(names: list[str]) -> str:
  rest = len(names) - _NAMED
  return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


class _Chunk:
  """The layers over one chunk of time, `[b, t, y, x, c]`.

  Attributes:
    weights: by name.
    before: what layers kept of the chunk before, by name; empty at the first one.
    kept: likewise, for the next chunk.
  """

  def __init__(self, weights, before: dict[str, jax.Array]):
    self.weights = weights
    self.before = before
    self.kept = {}

  @property
  def is_first(self) -> bool:
    return not self.before

  def causal(self, name: str, x: jax.Array, width: int, kernel=(3, 3, 3)) -> jax.Array:
    """Convolves a chunk behind the last frames of the one before it, or behind zeros."""
    if kernel[0] > 1:
      past = self.before.get(name)
      if past is None:
        past = _zeros_before(x)
      x = jnp.concatenate([past, x], axis=1)
      self.kept[name] = x[:, -_PAST:]
    around = [(size // 2,) * 2 for size in kernel[1:]]
    return self.convolve(name, x, width, kernel, (1, 1, 1), ((0, 0), *around))

  def framewise(self, name: str, x: jax.Array, width: int, size: int, stride=1, pad=None):
    """Convolves each frame by itself, with zeros around it."""
    frames = x.reshape(-1, *x.shape[2:])
    pads = (pad or (size // 2,) * 2,) * 2
    y = self.convolve(name, frames, width, (size, size), (stride, stride), pads)
    return y.reshape(*x.shape[:2], *y.shape[1:])

  def convolve(self, name: str, x: jax.Array, width: int, kernel: Shape, strides, pads):
    """Convolves over the axes between the first and the last one; kernels are as in the file."""
    axes = "TYX"[-len(kernel) :]
    y = jax.lax.conv_general_dilated(
      x,
      self.weights.array(f"{name}.weight", (width, x.shape[-1], *kernel)),
      strides,
      pads,
      dimension_numbers=(f"N{axes}C", f"OI{axes}", f"N{axes}C"),
    )
    return y + self.weights.array(f"{name}.bias", (width,))

  def norm(self, name: str, x: jax.Array, axes: int = 3) -> jax.Array:
    """Divides each cell by the root mean square of its channels, times a gain per channel.

    Args:
      axes: of size one that the gain has behind its channels in the file.
    """
    width = x.shape[-1]
    gain = self.weights.array(f"{name}.gamma", (width,) + (1,) * axes).reshape(width)
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.maximum(length, _LEAST_NORM) * math.sqrt(width) * gain


def _zeros_before(x: jax.Array) -> jax.Array:
  return jnp.zeros((x.shape[0], _PAST, *x.shape[2:]), x.dtype)


def _in_chunks(run: Callable, x: jax.Array, size: int) -> jax.Array:
  """Maps `[b, 1 + n * size, ...]` along time, the first frame alone, then `size` at a time.

  Args:
    run: maps (kept, chunk) to (kept, result), with an empty `kept` for the first chunk.
  """
  kept, first = run({}, x[:, :1])
  batch, frames = x.shape[:2]
  if frames == 1:
    return first
  chunks = x[:, 1:].reshape(batch, (frames - 1) // size, size, *x.shape[2:])
  _, rest = jax.lax.scan(run, kept, chunks.swapaxes(0, 1))
  rest = rest.swapaxes(0, 1)
  return jnp.concatenate([first, rest.reshape(batch, -1, *rest.shape[3:])], axis=1)


def _encoder(weights, structure: Structure) -> Callable:
  """Returns the map of a chunk of patches to means and log-variances of latents."""

  def run(before, x):
    net = _Chunk(weights, before)
    x = net.causal("encoder.conv_in", x, weights.width("encoder.conv_in", x.shape[-1]))
    for level in range(structure.levels):
      x = _encoder_level(net, structure, level, x)
    x = _middle(net, "encoder.mid_block", x)
    x = jax.nn.silu(net.norm("encoder.norm_out", x))
    x = net.causal("encoder.conv_out", x, 2 * structure.channels)
    x = net.causal("quant_conv", x, 2 * structure.channels, (1, 1, 1))
    return net.kept, x

  return run


def _encoder_level(net: _Chunk, structure: Structure, level: int, x: jax.Array) -> jax.Array:
  """Runs the residual blocks of a level, and halves what comes out unless it is the last."""
  resnets, halving = structure.down(level)
  is_last = level == structure.levels - 1
  in_time = not is_last and structure.halves_time[level]
  start = x
  width = net.weights.width(f"{resnets[0]}.conv1", x.shape[-1])
  for name in resnets:
    x = _resnet(net, name, x, width)
  if not is_last:
    x = _halve(net, halving, x, in_time)
  if structure.residual:
    x = x + _averages(start, width, 2 if in_time else 1, 1 if is_last else 2)
  return x


def _decoder(weights, structure: Structure) -> Callable:
  """Returns the map of a latent frame to the patches of its frames."""

  def run(before, z):
    net = _Chunk(weights, before)
    x = net.causal("post_quant_conv", z, structure.channels, (1, 1, 1))
    x = net.causal("decoder.conv_in", x, weights.width("decoder.conv_in", x.shape[-1]))
    x = _middle(net, "decoder.mid_block", x)
    for level in range(structure.levels):
      x = _decoder_level(net, structure, level, x)
    x = jax.nn.silu(net.norm("decoder.norm_out", x))
    return net.kept, net.causal("decoder.conv_out", x, _COLOURS * structure.patch**2)

  return run


def _decoder_level(net: _Chunk, structure: Structure, level: int, x: jax.Array) -> jax.Array:
  """Runs the residual blocks of a level, and doubles what comes out unless it is the last."""
  resnets, doubling = structure.up(level)
  start = x
  width = net.weights.width(f"{resnets[0]}.conv1", x.shape[-1])
  for name in resnets:
    x = _resnet(net, name, x, width)
  if level == structure.levels - 1:
    return x
  in_time = structure.halves_time[-1 - level]
  x = _double(net, doubling, x, width if structure.residual else width // 2, in_time)
  if structure.residual:
    x = x + _repeats(start, width, 2 if in_time else 1, net.is_first)
  return x


def _resnet(net: _Chunk, name: str, x: jax.Array, width: int) -> jax.Array:
  """Adds two convolutions of `x` to it, or to its map to another width."""
  short = x
  if x.shape[-1] != width:
    short = net.causal(f"{name}.conv_shortcut", x, width, (1, 1, 1))
  for i in (1, 2):
    x = jax.nn.silu(net.norm(f"{name}.norm{i}", x))
    x = net.causal(f"{name}.conv{i}", x, width)
  return short + x


def _middle(net: _Chunk, name: str, x: jax.Array) -> jax.Array:
  """Runs two residual blocks, with attention between them."""
  width = x.shape[-1]
  x = _resnet(net, f"{name}.resnets.0", x, width)
  x = _attend(net, f"{name}.attentions.0", x)
  return _resnet(net, f"{name}.resnets.1", x, width)


def _attend(net: _Chunk, name: str, x: jax.Array) -> jax.Array:
  """Adds the attention of the cells of each frame, with one head."""
  batch, frames, rows, cols, width = x.shape
  packed = net.framewise(f"{name}.to_qkv", net.norm(f"{name}.norm", x, axes=2), 3 * width, 1)
  packed = packed.reshape(batch * frames, rows * cols, 1, 3 * width)
  out = jax.nn.dot_product_attention(*jnp.split(packed, 3, axis=-1))
  return x + net.framewise(f"{name}.proj", out.reshape(x.shape), width, 1)


def _halve(net: _Chunk, name: str, x: jax.Array, in_time: bool) -> jax.Array:
  """Halves rows and columns, and frames if asked to; of the first chunk these stay as they are."""
  width = x.shape[-1]
  x = net.framewise(f"{name}.resample.1", x, width, 3, stride=2, pad=(0, 1))
  if not in_time:
    return x
  name = f"{name}.time_conv"
  net.kept[name] = x[:, -1:]
  if net.is_first:
    return x
  x = jnp.concatenate([net.before[name], x], axis=1)
  return net.convolve(name, x, width, (3, 1, 1), (2, 1, 1), ((0, 0),) * 3)


def _double(net: _Chunk, name: str, x: jax.Array, width: int, in_time: bool) -> jax.Array:
  """Doubles rows and columns, and frames if asked to; of the first chunk these stay as they are."""
  if in_time and net.is_first:
    net.kept[f"{name}.time_conv"] = _zeros_before(x)  # in place of the first frame
  elif in_time:
    batch, frames, rows, cols, old = x.shape
    pairs = net.causal(f"{name}.time_conv", x, 2 * old, (3, 1, 1))
    pairs = pairs.reshape(batch, frames, rows, cols, 2, old)
    x = jnp.moveaxis(pairs, 4, 2).reshape(batch, 2 * frames, rows, cols, old)
  x = x.repeat(2, axis=2).repeat(2, axis=3)
  return net.framewise(f"{name}.resample.1", x, width, 3)


def _averages(x: jax.Array, width: int, frames: int, side: int) -> jax.Array:
  """Returns 2.2's shortcut of an encoder's level: means over boxes of cells and groups of channels.

  Zeros stand in front of the first frame where time halves.
  """
  x = jnp.pad(x, ((0, 0), (-x.shape[1] % frames, 0), (0, 0), (0, 0), (0, 0)))
  batch, t, rows, cols, old = x.shape
  x = x.reshape(batch, t // frames, frames, rows // side, side, cols // side, side, old)
  x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # channels of the box: (channel, t, y, x)
  return x.reshape(*x.shape[:4], width, -1).mean(-1)


def _repeats(x: jax.Array, width: int, frames: int, is_first: bool) -> jax.Array:
  """Returns 2.2's shortcut of a decoder's level: repeated channels become boxes of 2 x 2 cells.

  Of the first frame, one frame remains.
  """
  batch, t, rows, cols, old = x.shape
  box = (frames, 2, 2)
  x = x.repeat(width * math.prod(box) // old, axis=-1)
  x = x.reshape(batch, t, rows, cols, width, *box)
  x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, t * frames, rows * 2, cols * 2, width)
  return x[:, frames - 1 :] if is_first else x


def _patches(video: jax.Array, side: int) -> jax.Array:
  """Makes channels (colour, column, row) of each square of pixels."""
  batch, t, rows, cols, colours = video.shape
  x = video.reshape(batch, t, rows // side, side, cols // side, side, colours)
  x = x.transpose(0, 1, 2, 4, 6, 5, 3)
  return x.reshape(*x.shape[:4], -1)


def _pixels(x: jax.Array, side: int) -> jax.Array:
  """Inverts `_patches`."""
  batch, t, rows, cols, _ = x.shape
  x = x.reshape(batch, t, rows, cols, _COLOURS, side, side)
  x = x.transpose(0, 1, 2, 6, 3, 5, 4)
  return x.reshape(batch, t, rows * side, cols * side, _COLOURS)
