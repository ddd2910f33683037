"""What is drawn from a clip: the data config, its hash, and the views. Nothing depends on the order of clips or on threads."""

import dataclasses
import hashlib
import json
import os

from freqformer.config import ConfigError, did_you_mean
from freqformer.data.codec import CodecConfig, make_codec

VERSION = 1  # Part of the hash: raise it when the same config draws or resizes otherwise.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Which clips, which views of them, which codec.

  Attributes:
    source: "ucf101" (official lists) or "folder" (any tree of video files, one subfolder per class).
    root: the folder of the data set.
    split: ucf101: official split 1, 2 or 3; 0 trains on all clips (those of split 1's test list too; Latte's protocol).
    cache: the folder that holds the encoded latents.
    resolution: (rows, cols) after the crop; the largest centre or random box of this shape is cut, then resized.
    frames, stride: a view is `frames` frames, each `stride` source frames after the last, at whatever fps the file has.
    crop: "center" or "random", of training views.
    flip: mirror every other training view of a clip; its first view by a coin. Pixels are mirrored before encoding.
    views: training views per clip. Validation is always one view: the middle of the clip, centre crop, not mirrored.
    short: clips with fewer than `(frames - 1) * stride + 1` frames: "pad" repeats the last frame, "clamp" takes the largest
      stride that fits, "skip" leaves them out and reports them by name. A clip with fewer than `frames` frames is left out
      and reported under "clamp" too.
    seed: of views and of the folder source's choices.
    val_fraction: folder source only: the share of clips kept for validation, by hash of their path; at least one clip goes
      to each side. A single clip serves both: training draws its views, validation takes its middle one.
    max_clips: at most so many clips per split, spread over the classes; 0 takes all.
    workers: threads that encode; 0 takes one per CPU.
    codec: see `CodecConfig`.

  Raises:
    ConfigError: for a value outside of these.
  """

  source: str
  root: str
  split: int = 1
  cache: str = "data/cache"
  resolution: tuple[int, int]
  frames: int
  stride: int = 1
  crop: str = "center"
  flip: bool = False
  views: int = 1
  short: str = "clamp"
  seed: int = 0
  val_fraction: float = 0.1
  max_clips: int = 0
  workers: int = 0
  codec: CodecConfig

  def __post_init__(self):
    for name, allowed in (
      ("source", ("ucf101", "folder")),
      ("crop", ("center", "random")),
      ("short", ("pad", "clamp", "skip")),
    ):
      if (value := getattr(self, name)) not in allowed:
        raise ConfigError(
          f"data.{name} must be one of {', '.join(allowed)}, got {value!r}; {did_you_mean(str(value), allowed)}"
        )
    for name, low in (("frames", 1), ("stride", 1), ("views", 1), ("max_clips", 0), ("workers", 0)):
      if getattr(self, name) < low:
        raise ConfigError(f"data.{name} must be at least {low}, got {getattr(self, name)}.")
    if min(self.resolution) < 1:
      raise ConfigError(
        f"data.resolution must be (rows, cols), each at least 1, got {self.resolution}."
      )
    if self.split not in (0, 1, 2, 3):
      raise ConfigError(
        f"data.split must be 1, 2 or 3, or 0 to train on all clips of UCF-101, got {self.split}."
      )
    if not 0 < self.val_fraction < 1:
      raise ConfigError(
        f"data.val_fraction must lie between 0 and 1, both excluded, got {self.val_fraction}."
      )

  @property
  def video_shape(self) -> tuple[int, int, int]:
    """(frames, rows, cols) of a view."""
    return self.frames, *self.resolution

  def protocol(self) -> dict:
    """Everything that decides which latents come out, as JSON values; not where the cache lies nor how many threads."""
    values = dataclasses.asdict(self)
    del values["cache"], values["workers"]
    values["root"] = os.path.normpath(values["root"])
    # What a source does not read must not make another cache.
    del values["val_fraction" if self.source == "ucf101" else "split"]
    values |= {"version": VERSION, "codec_version": make_codec(self.codec).version}
    return json.loads(json.dumps(values))

  @property
  def protocol_hash(self) -> str:
    """sha256 of `protocol()`, hex."""
    return hashlib.sha256(json.dumps(self.protocol(), sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Clip:
  """One video file of a split: `key` is its name in reports and hashes, `label` its class, counted from 0."""

  key: str
  path: str
  label: int


@dataclasses.dataclass(frozen=True)
class Listing:
  """The clips of a split, all class names (index = label), and the listed clips that are not on disk: `{key: reason}`."""

  clips: list[Clip]
  class_names: list[str]
  missing: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class View:
  """What one record shows of its clip.

  Attributes:
    start, stride: source frames; frame i is `min(start + i * stride, last)`.
    box: (top, left, bottom, right) of the crop, as fractions of the source frame.
    flip: mirrored left to right.
  """

  start: int
  stride: int
  box: tuple[float, float, float, float]
  flip: bool

  def indices(self, frames: int, length: int) -> list[int]:
    """The source frames of a clip of `length` frames; past its end the last one repeats."""
    return [min(self.start + i * self.stride, length - 1) for i in range(frames)]


class TooShort(ValueError):
  """A clip that `short` leaves out; the message says why."""


def draw_view(
  config: DataConfig, split: str, key: str, index: int, length: int, size: tuple[int, int]
) -> View:
  """View `index` of the clip `key`, a function of its arguments only.

  Args:
    length: frames of the clip, as decoded.
    size: (rows, cols) of its frames.

  Raises:
    TooShort: the clip cannot give `config.frames` frames under `config.short`.
  """
  stride = _stride(config, length)
  slack = max(length - 1 - (config.frames - 1) * stride, 0)
  train = split == "train"
  when, y, x, _ = uniforms(f"{config.seed}|{key}|{index}")
  if not train:
    when = 0.5
  if not train or config.crop == "center":
    y = x = 0.5
  # Every other view is mirrored, so two views of a clip always show both sides; the coin of view 0 starts the count.
  mirrored = (
    train and config.flip and (uniforms(f"{config.seed}|{key}|0")[3] < 0.5) != bool(index % 2)
  )
  return View(
    min(int(when * (slack + 1)), slack), stride, _box(config.resolution, size, y, x), mirrored
  )


def _stride(config, length):
  needed = (config.frames - 1) * config.stride + 1
  if length >= needed or config.short == "pad":
    return config.stride
  if config.short == "skip":
    raise TooShort(
      f"it has {length} frames, {needed} are needed at stride {config.stride}, and data.short is 'skip'"
    )
  if length < config.frames:
    raise TooShort(
      f"it has {length} frames, {config.frames} are needed even at stride 1; data.short='pad' would keep it"
    )
  return (length - 1) // (config.frames - 1)


def _box(resolution, size, y, x):
  """The largest box of the target's shape inside a frame of `size`, at fraction (y, x) of the room left."""
  scale = min(size[0] / resolution[0], size[1] / resolution[1])
  height, width = resolution[0] * scale / size[0], resolution[1] * scale / size[1]
  top, left = y * max(1 - height, 0), x * max(1 - width, 0)
  return tuple(round(v, 6) for v in (top, left, min(top + height, 1), min(left + width, 1)))


def uniforms(text: str) -> tuple[float, float, float, float]:
  """Four numbers in [0, 1) from the sha256 of a text: the same on every machine and version."""
  digest = hashlib.sha256(text.encode()).digest()
  return tuple(int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in range(0, 32, 8))
