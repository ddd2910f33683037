"""From pixels to latents and back.

Two codecs need no weights. They work in an orthonormal luma/opponent colour space, for demos, tests
and method comparisons; a learned VAE reconstructs better. `wan_vae` is one (`data/wan_vae.py`).
Others are plug-ins, classes that `CodecConfig.name` names as "module:Class"; `data/vae.py` has one.

* `lowpass` keeps the lowest frequencies of the whole clip: a latent is a small video without
  blocks. On smooth clips it needs fewer numbers than `dct` for the same error.
* `dct` keeps the lowest coefficients of each block: more detail at few cells, and block borders.

Latents are normalised with statistics of the training views, unless the codec has its own.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from freqformer.config import ConfigError, load_class, require, require_one_of
from freqformer.grid.transforms import dct

# Rows: luma, red against blue, green against the rest. Orthonormal (it is the 3-point DCT-II).
COLOUR = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]]) / np.sqrt([[3], [2], [6]])
# choice: weights of the ranking in `dct_order`, found among sum, norm and product forms on two
# clips (live action, animation) at five factors. Averaged over channel counts they lose at most
# 0.6 dB against a ranking by those clips' own measured variance.
COLOUR_COST = np.array([1.0, 1.7, 2.5])
AXIS_COST = np.array([1.5, 1.0, 1.0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig:
  """A codec and its sizes.

  Attributes:
    name: "dct", "lowpass", "wan_vae", "none" for latents that can only be shown as they are, or
      "module:Class" of a `Codec`.
    factor: pixels per latent cell, (t, y, x).
    channels: of a latent cell; dct: `3 * t * y * x` of them keep everything; lowpass: 3, or 1
      for luma alone.
    path: of wan_vae or a plug-in: where its weights are.
  """

  name: str = "dct"
  factor: tuple[int, int, int]
  channels: int
  path: str = ""

  def __post_init__(self):
    if ":" not in self.name:
      require_one_of(self, "name", (*_CODECS, *_LEARNED, "module:Class"))
    require(self, "factor", least=1)
    most = codec_class(self.name).most_channels(self.factor)
    if not 1 <= self.channels <= most:
      raise ValueError(
        f"codec {self.name} with factor {self.factor} has 1 to {most} channels, got "
        f"{self.channels}."
      )


class Codec:
  """A map of clips in [-1, 1] to cells of `factor` pixels. NumPy in and out; thread-safe.

  Sizes that are no multiple of the factor are padded by repeating the edge. A plug-in defines
  `most_channels`, `_analyse` and `_synthesise`, and `latent_shape` where cells are of unequal size.
  """

  version = 1  # part of a cache's hash: raise it when the same config gives other latents
  joint_std = False  # latents are divided by one std for all channels

  def __init__(self, config: CodecConfig):
    self.config = config

  @property
  def frames_apart(self) -> bool:
    """True if no latent frame shows any of the frames after its own."""
    return True

  @property
  def first_frames(self) -> int:
    """Frames that the first latent frame shows."""
    return self.config.factor[0]

  @property
  def statistics(self) -> "LatentStatistics | None":
    """Statistics to normalise latents with; None: those of the training views."""
    return None

  @staticmethod
  def most_channels(factor: tuple[int, int, int]) -> int:
    """Returns how many channels a cell of so many pixels can have."""
    raise NotImplementedError

  def _analyse(self, video: np.ndarray) -> np.ndarray:
    """Maps float32 `[b, t, y, x, 3]`, of whole cells, to latents."""
    raise NotImplementedError

  def _synthesise(self, latents: np.ndarray) -> np.ndarray:
    """Maps latents to float32 `[b, t, y, x, 3]`, of whole cells."""
    raise NotImplementedError

  def latent_shape(self, frames: int, rows: int, cols: int) -> tuple[int, int, int, int]:
    """Returns (t, y, x, c) of the latents of such a video."""
    cells = (-(-n // f) for n, f in zip((frames, rows, cols), self.config.factor, strict=True))
    return (*cells, self.config.channels)

  def encode(self, video: np.ndarray) -> np.ndarray:
    """Encodes uint8 `[b, t, y, x, 3]` to un-normalised float32 `[b, t', y', x', c]`."""
    pad = [(0, -n % f) for n, f in zip(video.shape[1:4], self.config.factor, strict=True)]
    x = np.pad(video, [(0, 0), *pad, (0, 0)], mode="edge").astype(np.float32) / 127.5 - 1
    return self._analyse(x)

  def decode(self, latents: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes un-normalised latents to uint8 `[b, *shape, 3]`, shape = (frames, rows, cols)."""
    expected = self.latent_shape(*shape)
    if latents.shape[1:] != expected:
      raise ValueError(
        f"A video of {shape} (frames, rows, cols) has latents [b, {expected}], got {latents.shape}."
      )
    frames, rows, cols = shape
    x = self._synthesise(latents.astype(np.float32))[:, :frames, :rows, :cols]
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)


class DctCodec(Codec):
  """Block DCT of every `factor` box of pixels, of which the lowest coefficients are kept."""

  def __init__(self, config: CodecConfig):
    super().__init__(config)
    self._synthesis = _basis(config.factor, config.channels)  # [c, 3 * t * y * x], orthonormal rows

  @staticmethod
  def most_channels(factor):
    return 3 * math.prod(factor)

  def _analyse(self, video):
    ft, fy, fx = self.config.factor
    b, t, y, w, _ = video.shape
    x = video.reshape(b, t // ft, ft, y // fy, fy, w // fx, fx, 3)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(*x.shape[:4], -1) @ self._synthesis.T

  def _synthesise(self, latents):
    ft, fy, fx = self.config.factor
    b, t, y, w, _ = latents.shape
    x = (latents @ self._synthesis).reshape(b, t, y, w, ft, fy, fx, 3)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t * ft, y * fy, w * fx, 3)


class LowpassCodec(Codec):
  """The clip's lowest frequencies along each axis, as a video that is smaller by `factor`.

  By the DCT of whole axes: `m` of `n` coefficients are kept and transformed back on m cells, times
  sqrt(m / n), which keeps means. Decoding fills the others with zeros.
  """

  joint_std = True  # luma and colour keep their proportions, as in pixels

  @property
  def frames_apart(self):
    return self.config.factor[0] == 1

  @staticmethod
  def most_channels(factor):
    return 3

  def _analyse(self, video):
    x = video @ COLOUR[: self.config.channels].T.astype(np.float32)
    return _along_axes(
      x, [_fewer(n, f) for n, f in zip(x.shape[1:4], self.config.factor, strict=True)]
    )

  def _synthesise(self, latents):
    sizes = [n * f for n, f in zip(latents.shape[1:4], self.config.factor, strict=True)]
    scale = math.prod(self.config.factor)
    back = [_fewer(n, f).T for n, f in zip(sizes, self.config.factor, strict=True)]
    return scale * _along_axes(latents, back) @ COLOUR[: self.config.channels].astype(np.float32)


def _fewer(size: int, factor: int) -> np.ndarray:
  """Returns the map of an axis of `size` cells to `size / factor`, `[size / factor, size]`."""
  kept = size // factor
  return (dct(kept).T @ dct(size)[:kept] / math.sqrt(factor)).astype(np.float32)


def _along_axes(x: np.ndarray, maps: Sequence[np.ndarray]) -> np.ndarray:
  """Applies a matrix along each of the axes t, y, x of `[b, t, y, x, c]`."""
  return np.einsum("btyxc,Tt,Yy,Xx->bTYXc", x, *maps, optimize=True)


class NoCodec(Codec):
  """Latents of unknown making, whose first three channels are shown as red, green and blue."""

  @staticmethod
  def most_channels(factor):
    return 1 << 16

  def _analyse(self, video):
    raise ConfigError(
      "codec 'none' encodes no pictures: it shows latents that were made elsewhere; name the codec "
      "that made them, data.codec.name='module:Class'."
    )

  def _synthesise(self, latents):
    colours = latents[..., np.minimum(np.arange(3), latents.shape[-1] - 1)]
    spread = colours.std() or 1.0
    shown = (colours - colours.mean()) / (2 * spread)  # two standard deviations are in range
    for axis, factor in enumerate(self.config.factor, 1):
      shown = shown.repeat(factor, axis)
    return shown


_CODECS = {"dct": DctCodec, "lowpass": LowpassCodec, "none": NoCodec}
# By module, as plug-ins are: what they need is imported where they are used.
_LEARNED = {"wan_vae": "freqformer.data.wan_vae:WanVae"}


def codec_class(name: str) -> type[Codec]:
  """Returns the class of a codec; ConfigError if "module:Class" names none."""
  name = _LEARNED.get(name, name)
  return load_class(name, "codec") if ":" in name else _CODECS[name]


@functools.lru_cache(maxsize=8)
def make_codec(config: CodecConfig) -> Codec:
  """Returns the codec of a config; weights are loaded once."""
  return codec_class(config.name)(config)


def dct_order(factor: tuple[int, int, int]) -> np.ndarray:
  """Ranks the coefficients of a block, first kept first: int `[3 * t * y * x, 4]`.

  A row is (colour, kt, ky, kx). The rank is by total frequency, luma first:
  `COLOUR_COST[colour] * (1 + 1.5 kt + ky + kx)`; ties keep the order of the columns.
  """
  index = np.stack(np.meshgrid(*map(np.arange, (3, *factor)), indexing="ij"), -1).reshape(-1, 4)
  cost = COLOUR_COST[index[:, 0]] * (1 + index[:, 1:] @ AXIS_COST)
  return index[np.argsort(np.round(cost, 9), kind="stable")]


@functools.lru_cache(maxsize=8)
def _basis(factor, channels) -> np.ndarray:
  """float32 `[channels, 3 * t * y * x]`; a row is one coefficient's pixels as (t, y, x, rgb)."""
  t, y, x = (dct(n) for n in factor)
  rows = [
    np.einsum("t,y,x,c->tyxc", t[kt], y[ky], x[kx], COLOUR[colour]).ravel()
    for colour, kt, ky, kx in dct_order(factor)[:channels]
  ]
  return np.stack(rows).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
  """Mean and standard deviation of un-normalised training latents, float32 `[c]` both."""

  mean: np.ndarray
  std: np.ndarray

  def normalise(self, latents: np.ndarray) -> np.ndarray:
    """Returns `(x - mean) / std` per channel, float32."""
    return ((latents - self.mean) / self.std).astype(np.float32)

  def denormalise(self, latents: np.ndarray) -> np.ndarray:
    """Returns `x * std + mean` per channel, float32."""
    return (np.asarray(latents, np.float32) * self.std + self.mean).astype(np.float32)

  def to_json(self) -> dict[str, list[float]]:
    """Returns lists of floats."""
    return {"mean": self.mean.tolist(), "std": self.std.tolist()}

  @classmethod
  def from_json(cls, values: Mapping) -> "LatentStatistics":
    """Inverts `to_json`; other keys, which earlier versions wrote, are ignored."""
    return cls(np.asarray(values["mean"], np.float32), np.asarray(values["std"], np.float32))


class StatisticsAccumulator:
  """Running mean and variance per channel, in float64."""

  def __init__(self):
    self._cells = 0
    self._mean = 0.0
    self._squares = 0.0  # sum of squared deviations from the mean

  def add(self, latent: np.ndarray) -> None:
    """Adds one un-normalised latent `[t, y, x, c]`."""
    x = latent.reshape(-1, latent.shape[-1]).astype(np.float64)
    step = x.mean(0) - self._mean
    share = len(x) / (self._cells + len(x))
    self._squares += len(x) * x.var(0) + step**2 * self._cells * share
    self._mean += step * share
    self._cells += len(x)

  def result(self, joint: bool = False) -> LatentStatistics:
    """Returns the statistics so far; a channel that never varies gets std 1.

    Args:
      joint: give all channels one std, so that they keep their proportions.
    """
    variance = self._squares / self._cells
    if joint:
      variance = np.full_like(variance, variance.mean())
    constant = variance < 1e-10 * max(1.0, float(np.max(self._mean**2)))
    std = np.sqrt(np.where(constant, 1.0, variance))
    return LatentStatistics(self._mean.astype(np.float32), std.astype(np.float32))
