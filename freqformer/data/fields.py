"""Clips with a known answer: Gaussian textures that move, drawn on the fly on any token grid.

Their exact posterior mean is known (`freqformer.diffusion.posterior`), so that a loss splits into
the Bayes risk, which nobody can avoid, and the regret of the model. There is no file, no codec and
no epoch: a record is a function of the seed, the split and its number.
"""

import dataclasses
import hashlib
import itertools
import json
import math

import jax.numpy as jnp
import numpy as np

from freqformer.config import require, require_one_of
from freqformer.data.codec import LatentStatistics
from freqformer.diffusion.posterior import Posterior

VERSION = 1  # part of the hash: raise it when the same config draws other clips
TRAIN_CLIPS = 2**31 - 1  # numbers of training clips: as many as an int32 index has
SPLITS = ("train", "val")
# choice: of pictures. Three standard deviations to either side of grey; 8 x 8 pixels a token.
GREY_LEVELS = 127.5 / 3
PIXELS = 8
FPS = 8.0
BOX = (2, 4, 4)  # tokens of a planted texture


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldsConfig:
  """Moving Gaussian fields of unit variance.

  Attributes:
    source: "fields".
    grid: (t, y, x) of the latents, periodic along every axis.
    channels: independent fields that move together.
    slope: a of the spectrum `(k^2 + c^-2)^(-a/2)`; k in radians per token (frame), c = y / 2. Real
      footage has about 3.8.
    speed: velocities are all pairs (y, x) of whole tokens per frame from -speed to speed, equally
      likely.
    decorrelation: frames after which the moving pattern's correlation has fallen to 1/e; 0 moves
      it unchanged.
    copies: K textures that are planted twice each; see `plant`. 0 plants none.
    labels: "none" (one class) or "velocity" (the class is the velocity).
    target: what training regresses on: "posterior", E[v | x_t], has the same minimum as "velocity"
      without its noise, and makes the loss the regret.
    val_clips: number of validation clips.
    seed: of all clips.
  """

  condition = "class"  # as of `DataConfig`
  embedding_size = 0

  source: str = "fields"
  grid: tuple[int, int, int]
  channels: int = 4
  slope: float = 3.8
  speed: int = 1
  decorrelation: float = 0.0
  copies: int = 0
  labels: str = "none"
  target: str = "posterior"
  val_clips: int = 512
  seed: int = 0

  def __post_init__(self):
    require_one_of(self, "source", ("fields",))
    require(self, "grid channels val_clips", least=1)
    require(self, "speed copies decorrelation slope", least=0)
    require(self, "seed", least=0, below=2**32)
    require_one_of(self, "labels", ("none", "velocity"))
    require_one_of(self, "target", ("posterior", "velocity"))
    if self.copies and self.target == "posterior":
      raise ValueError(
        f"target='posterior' is not known with copies={self.copies}: planted textures are not "
        "Gaussian fields; set target='velocity', or copies=0."
      )
    if self.copies:
      self._check_room()

  def _check_room(self):
    """Refuses a grid on which `plant` could find no far place for a copy."""
    counts = [size / box for size, box in zip(self.grid, BOX, strict=True)]
    if any(count % 1 for count in counts) or max(counts[1:]) < 2:
      raise ValueError(
        f"copies={self.copies} needs a grid of whole boxes of {BOX} tokens, at least two along y "
        f"or x; got grid={self.grid}."
      )
    most = int(math.prod(counts)) // 8
    if self.copies > most:
      raise ValueError(
        f"copies={self.copies} must be at most {most} on grid={self.grid}: a quarter of its boxes "
        f"of {BOX} tokens may be planted."
      )

  @property
  def latent_shape(self) -> tuple[int, int, int, int]:
    """(t, y, x, c) of the latents."""
    return *self.grid, self.channels

  def shown_fps(self) -> float:
    """Returns frames per second of pictures of the fields."""
    return FPS

  @property
  def velocities(self) -> list[tuple[int, int]]:
    """(y, x) in tokens per frame, in the order of the labels."""
    return list(itertools.product(range(-self.speed, self.speed + 1), repeat=2))

  @property
  def class_names(self) -> list[str]:
    """Names of the classes; the index is the label."""
    if self.labels == "none":
      return ["field"]
    return [f"y{y:+d}x{x:+d}" for y, x in self.velocities]

  def facts(self) -> dict[str, str]:
    """Describes the latents for people."""
    planted = f", {self.copies} textures planted twice" if self.copies else ""
    return {
      "fields": f"{len(self.velocities)} velocities, slope {self.slope:g}{planted}; target "
      f"{self.target}",
      "latents": "x".join(map(str, self.latent_shape)),
    }

  def decode(self, latents: np.ndarray, statistics: LatentStatistics) -> np.ndarray:
    """Shows latents `[b, t, y, x, c]` as uint8 video `[b, t, 8 y, 8 x, 3]`.

    The first three channels are red, green and blue; the last one repeats if there are fewer.
    """
    raw = statistics.denormalise(latents)
    colours = raw[..., np.minimum(np.arange(3), self.channels - 1)]
    levels = np.clip(np.rint(127.5 + GREY_LEVELS * colours), 0, 255).astype(np.uint8)
    return levels.repeat(PIXELS, 2).repeat(PIXELS, 3)


class Fields:
  """The clips of one split, by number. Picklable, and safe to read from many threads.

  Attributes:
    config: a `FieldsConfig`.
    hash: of the config and the version of the draws.
    latent_shape: (t, y, x, c).
    video_shape: (frames, rows, cols) of decoded videos.
    fps: of decoded videos.
    class_names: index = label.
    statistics: mean 0 and standard deviation 1, which the fields have by themselves.
  """

  class_counts = None

  def __init__(self, config: FieldsConfig, split: str):
    """Opens a split, "train" or "val"."""
    self.config = config
    self.hash = _hash(config)
    self.latent_shape = config.latent_shape
    self.fps = config.shown_fps()
    self.video_shape = (config.grid[0], *(PIXELS * size for size in config.grid[1:]))
    self.class_names = config.class_names
    zeros = np.zeros(config.channels, np.float32)
    self.statistics = LatentStatistics(zeros, zeros + 1)
    self._split = SPLITS.index(split)
    self._gains = np.sqrt(spectra(config))

  def __len__(self) -> int:
    return TRAIN_CLIPS if self._split == 0 else self.config.val_clips

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns `{"latent": float32 [t, y, x, c], "label": int32, "index": int32}`."""
    if not 0 <= index < len(self):
      raise IndexError(f"There are {len(self)} fields, number {index} is not among them.")
    rng = np.random.default_rng([self.config.seed, self._split, index])
    velocity = int(rng.integers(len(self._gains)))
    noise = rng.standard_normal(self.latent_shape)
    gain = self._gains[velocity][..., None]
    axes = (0, 1, 2)
    latent = np.fft.ifftn(np.fft.fftn(noise, axes=axes) * gain, axes=axes).real
    for first, second in plant(self.config, rng):
      latent[first] = rng.standard_normal((*BOX, self.config.channels))
      latent[second] = latent[first]
    return {
      "latent": latent.astype(np.float32),
      "label": np.int32(velocity if self.config.labels == "velocity" else 0),
      "index": np.int32(index),
    }

  @property
  def reference(self) -> Posterior | None:
    """The exact posterior mean, or None if textures are planted."""
    if self.config.copies:
      return None
    found = jnp.asarray(self._gains**2, jnp.float32)
    return Posterior(found, labelled=self.config.labels == "velocity")

  @property
  def target(self) -> Posterior | None:
    """The posterior that training regresses on; None is the velocity of the draw."""
    return self.reference if self.config.target == "posterior" else None


def spectra(config: FieldsConfig) -> np.ndarray:
  """Returns the power spectrum of every velocity, float64 `[V, t, y, x]` in the FFT's order.

  `S_v(w, k) = S(wrap(w + v . k), k)` with `S(w, k) = ((2 pi)^2 (w^2 + k^2) + c^-2)^(-slope / 2)`, w
  and k in cycles per frame and per token, wrapped to [-1/2, 1/2); scaled to mean 1, the variance of
  a token. `decorrelation` T multiplies the covariance at a lag of d frames
  by `exp(-|d| / T)`, summed over the periods of the clip and scaled to 1 at lag 0. In the spectrum
  that is a Lorentzian of half width `1 / (2 pi T)` cycles per frame about `w + v . k`, folded into
  one period.
  """
  w, y, x = np.meshgrid(*map(np.fft.fftfreq, config.grid), indexing="ij")
  cut = 2 / config.grid[1]
  found = []
  for down, across in config.velocities:
    moved = (w + down * y + across * x + 0.5) % 1 - 0.5
    power = (2 * np.pi) ** 2 * (moved**2 + y**2 + x**2) + cut**2
    found.append(power ** (-config.slope / 2))
  found = np.stack(found)
  if config.decorrelation:
    frames = config.grid[0]
    lag = np.arange(frames)
    # cosh((n/2 - d) / T), the sum over periods, without its overflow.
    decay = np.exp(-lag / config.decorrelation) + np.exp((lag - frames) / config.decorrelation)
    fading = (decay / decay[0])[:, None, None]
    found = np.fft.fft(np.fft.ifft(found, axis=1) * fading, axis=1).real
  return found / found.mean((1, 2, 3), keepdims=True)


def plant(config: FieldsConfig, rng: np.random.Generator) -> list[tuple[tuple, tuple]]:
  """Draws where textures are planted: pairs of index tuples of a latent, `config.copies` of them.

  A texture is `BOX` tokens of white noise of unit variance, which replaces the field in both
  places. The places of a clip do not overlap, and both of a pair are at least a third of the grid
  apart along y or x, counted around the period. They are on no fixed lattice.

  Only a copy tells more about a texture than its own noisy tokens do. The mean square error of v in
  such a box is at best `1 / (t^2 + (1 - t)^2)` by one observation of the texture, and
  `1 / (t^2 + 2 (1 - t)^2)` by both: the bound of every method that must find the copy first. A
  posterior mean of the whole clip is not known.
  """
  if not config.copies:
    return []
  ranges = [range(0, size, box) for size, box in zip(config.grid, BOX, strict=True)]
  free = list(rng.permutation(list(itertools.product(*ranges))))
  origin = rng.integers(config.grid)
  pairs = []
  for _ in range(config.copies):
    first = free.pop()
    partner = next(i for i, other in enumerate(free) if _far(first, other, config.grid))
    second = free.pop(partner)
    pairs.append(tuple(_box(place + origin, config.grid) for place in (first, second)))
  return pairs


def _far(first, second, grid) -> bool:
  """Tells whether two corners are a third of the grid apart along y or x, around the period."""
  gap = np.abs(first - second)
  gap = np.minimum(gap, grid - gap)
  return bool((3 * gap >= grid)[1:].any())


def _box(corner, grid) -> tuple:
  """Returns the index of a box of tokens, which may reach across the period's border."""
  ranges = [(at + np.arange(n)) % size for at, n, size in zip(corner, BOX, grid, strict=True)]
  return np.ix_(*ranges)


def _hash(config: FieldsConfig) -> str:
  values = dataclasses.asdict(config) | {"version": VERSION}
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
