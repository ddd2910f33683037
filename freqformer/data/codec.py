"""From pixels to latents and back, behind one small interface; the built-in codec needs no weights.

`dct` is an orthonormal 3-D block DCT in an orthonormal luma/opponent colour space that keeps the lowest coefficients of each
block. It is ours, and a codec for demos, tests and method comparisons, not a learned VAE: at equal channels a VAE reconstructs
better. Its virtue is that nothing has to be downloaded and that, with all channels kept, it loses nothing.

Latents are normalised per channel with statistics of the training views (`LatentStatistics`), never with constants.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from freqformer.config import ConfigError, did_you_mean

# Rows: luma, red against blue, green against the rest. Orthonormal (it is the 3-point DCT-II).
COLOUR = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]]) / np.sqrt([[3], [2], [6]])
# The ranking rule of `dct_order`, chosen among sum, norm and product forms on two clips (live action, animation) at five
# factors: averaged over channel counts it is at most 0.6 dB below ranking by those clips' own measured variance.
COLOUR_COST = np.array([1.0, 1.7, 2.5])
AXIS_COST = np.array([1.5, 1.0, 1.0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig:
  """Which codec.

  Attributes:
    name: "dct".
    factor: pixels per latent cell, (t, y, x).
    channels: channels of a latent cell; `3 * t * y * x` of them keep everything (dct).
  """

  name: str = "dct"
  factor: tuple[int, int, int]
  channels: int

  def __post_init__(self):
    if self.name not in _CODECS:
      raise ConfigError(f"There is no codec {self.name!r}; {did_you_mean(self.name, _CODECS)}")
    if min(self.factor) < 1:
      raise ConfigError(
        f"The codec's factor must be (t, y, x), each at least 1, got {self.factor}."
      )
    most = 3 * math.prod(self.factor)
    if not 1 <= self.channels <= most:
      raise ConfigError(
        f"A codec with factor {self.factor} has 1 to {most} channels, got {self.channels}."
      )


class Codec(Protocol):
  """What the data path and sampling know of a codec. NumPy in, NumPy out; thread-safe.

  Attributes:
    config: the `CodecConfig` it was made from.
    version: an integer that rises when the same config gives other latents; part of a cache's hash.
  """

  config: CodecConfig
  version: int

  def latent_shape(self, frames: int, rows: int, cols: int) -> tuple[int, int, int, int]:
    """(t, y, x, c) of the latents of such a video."""

  def encode(self, video: np.ndarray) -> np.ndarray:
    """uint8 `[b, t, y, x, 3]` to un-normalised float32 `[b, t', y', x', c]`."""

  def decode(self, latents: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Un-normalised latents to uint8 video `[b, *shape, 3]`, shape = (frames, rows, cols)."""


class DctCodec:
  """Block DCT of every `factor` box of pixels in [-1, 1]; sizes that are no multiple are padded by repeating the edge."""

  version = 1

  def __init__(self, config: CodecConfig):
    self.config = config
    self._synthesis = _basis(config.factor, config.channels)  # [c, 3 * t * y * x], orthonormal rows

  def latent_shape(self, frames: int, rows: int, cols: int) -> tuple[int, int, int, int]:
    """(t, y, x, c), each axis rounded up."""
    cells = (-(-n // f) for n, f in zip((frames, rows, cols), self.config.factor, strict=True))
    return (*cells, self.config.channels)

  def encode(self, video: np.ndarray) -> np.ndarray:
    """uint8 `[b, t, y, x, 3]` to float32 `[b, t', y', x', c]`; `|latent| <= sqrt(3 * t * y * x of factor)`."""
    if video.ndim != 5 or video.shape[-1] != 3 or video.dtype != np.uint8:
      raise ValueError(
        f"The codec encodes uint8 video [b, t, y, x, 3], got {video.dtype} {video.shape}."
      )
    pad = [(0, -n % f) for n, f in zip(video.shape[1:4], self.config.factor, strict=True)]
    x = np.pad(video, [(0, 0), *pad, (0, 0)], mode="edge").astype(np.float32) / 127.5 - 1
    (ft, fy, fx), (b, t, y, w, _) = self.config.factor, x.shape
    x = x.reshape(b, t // ft, ft, y // fy, fy, w // fx, fx, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(*x.shape[:4], -1) @ self._synthesis.T

  def decode(self, latents: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """float `[b, t', y', x', c]` to uint8 `[b, frames, rows, cols, 3]`, rounded and clipped."""
    expected = self.latent_shape(*shape)
    if latents.shape[1:] != expected:
      raise ValueError(
        f"A video of {shape} (frames, rows, cols) has latents [b, {expected}], got {latents.shape}."
      )
    ft, fy, fx = self.config.factor
    b, t, y, w, _ = latents.shape
    x = (latents.astype(np.float32) @ self._synthesis).reshape(b, t, y, w, ft, fy, fx, 3)
    x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t * ft, y * fy, w * fx, 3)[
      :, : shape[0], : shape[1], : shape[2]
    ]
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)


_CODECS = {"dct": DctCodec}


def make_codec(config: CodecConfig) -> Codec:
  """The codec of a config; pretrained ones join by a further entry in the registry."""
  return _CODECS[config.name](config)


def dct_order(factor: tuple[int, int, int]) -> np.ndarray:
  """All (colour, kt, ky, kx) of a block, first kept first: int `[3 * t * y * x, 4]`.

  Ranked by total frequency, luma first: `COLOUR_COST[colour] * (1 + 1.5 kt + ky + kx)`, k the index of a coefficient in its
  block; ties keep the order of the columns.
  """
  index = np.stack(np.meshgrid(*map(np.arange, (3, *factor)), indexing="ij"), -1).reshape(-1, 4)
  cost = COLOUR_COST[index[:, 0]] * (1 + index[:, 1:] @ AXIS_COST)
  return index[np.argsort(np.round(cost, 9), kind="stable")]


@functools.lru_cache(maxsize=8)
def _basis(factor, channels) -> np.ndarray:
  """float32 `[channels, 3 * t * y * x]`; a row is one coefficient's pixels, flattened as (t, y, x, rgb)."""
  axes = [_dct(n) for n in factor]
  rows = [
    np.einsum("t,y,x,c->tyxc", axes[0][kt], axes[1][ky], axes[2][kx], COLOUR[colour]).ravel()
    for colour, kt, ky, kx in dct_order(factor)[:channels]
  ]
  return np.stack(rows).astype(np.float32)


def _dct(length: int) -> np.ndarray:
  """Orthonormal DCT-II, `[frequency, sample]`, float64."""
  k, i = np.arange(length)[:, None], np.arange(length)[None]
  matrix = np.cos(np.pi * (2 * i + 1) * k / (2 * length)) * math.sqrt(2 / length)
  matrix[0] /= math.sqrt(2)
  return matrix


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB of two uint8 videos `[..., t, y, x, 3]`: per frame, then the mean; 100 where equal."""
  if a.shape != b.shape:
    raise ValueError(f"PSNR compares videos of one shape, got {a.shape} and {b.shape}.")
  error = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, axis=(-3, -2, -1))
  return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, 255.0**2 * 1e-10))))


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
  """Of un-normalised training latents.

  Attributes:
    mean, std: float32 `[c]`.
    power: float32 `[t, y, x]` or None: mean squared coefficient of the latent grid's orthonormal 3-D DCT, of normalised
      latents, averaged over channels and clips; its mean over the grid is 1 (Parseval).
  """

  mean: np.ndarray
  std: np.ndarray
  power: np.ndarray | None = None

  def normalise(self, latents: np.ndarray) -> np.ndarray:
    """`(x - mean) / std` per channel, float32."""
    return ((latents - self.mean) / self.std).astype(np.float32)

  def denormalise(self, latents: np.ndarray) -> np.ndarray:
    """`x * std + mean` per channel, float32."""
    return (np.asarray(latents, np.float32) * self.std + self.mean).astype(np.float32)

  def to_json(self) -> dict:
    """Lists of floats; exact for float32."""
    return {
      f.name: None if (v := getattr(self, f.name)) is None else np.asarray(v).tolist()
      for f in dataclasses.fields(self)
    }

  @classmethod
  def from_json(cls, values: Mapping) -> "LatentStatistics":
    """The inverse of `to_json`."""
    return cls(
      **{name: None if v is None else np.asarray(v, np.float32) for name, v in values.items()}
    )


class StatisticsAccumulator:
  """Adds latents one by one, in float64; `result()` at any time."""

  def __init__(self, shape: tuple[int, int, int, int]):
    self.count, self._sum, self._power = 0, np.zeros(shape[-1]), np.zeros(shape)
    self._axes = [_dct(n).astype(np.float32) for n in shape[:3]]

  def add(self, latent: np.ndarray) -> None:
    """One un-normalised latent `[t, y, x, c]`."""
    x = latent.astype(np.float32)
    self._sum += x.mean((0, 1, 2), dtype=np.float64)
    for axis, matrix in enumerate(self._axes):
      x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
    self._power += np.square(x, dtype=np.float64)
    self.count += 1

  def result(self) -> LatentStatistics:
    """The statistics so far; a channel that never varies gets std 1."""
    size = math.prod(self._power.shape[:3])
    mean, power = self._sum / self.count, self._power / self.count
    # Only the constant has a mean: E (X_0 - sqrt(n) m)^2 = E X_0^2 - n m^2, as E X_0 = sqrt(n) m.
    power[0, 0, 0] = np.maximum(power[0, 0, 0] - size * mean**2, 0)
    variance = power.mean((0, 1, 2))
    flat = variance < 1e-10 * max(1.0, float(np.max(mean**2)))
    std = np.where(flat, 1.0, np.sqrt(np.where(flat, 1.0, variance)))
    power = (power / std**2)[..., ~flat].mean(-1) if not flat.all() else power[..., 0] * 0
    return LatentStatistics(
      mean.astype(np.float32), std.astype(np.float32), power.astype(np.float32)
    )
