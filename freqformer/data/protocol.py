"""The views that are drawn from clips: the data config, its hash, and the draws.

Nothing depends on the order of clips or on threads.
"""

import dataclasses
import hashlib
import json

import numpy as np

from freqformer.config import require, require_one_of
from freqformer.data.codec import CodecConfig, LatentStatistics, make_codec
from freqformer.data.embedder import embedder_class
from freqformer.data.files import Path

_USUAL_FPS = 25.0  # of UCF-101 and of rendered clips
EMBEDDING = ".embedding.npy"  # in the place of a clip's own ending
# Keys that came later: where classes condition, caches from before them keep their hash.
_OF_CONDITION = ("condition", "embedding_size", "embedding_array", "embedder", "embedder_path")
VERSION = 2  # part of the hash: raise it when the same config draws or resizes otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Clips, views of them, and the codec.

  Attributes:
    source: "ucf101" (official lists), "folder" (any tree of videos, one subfolder per class), or
      "latents" (such a tree of arrays, made elsewhere by `codec` of `frames` and `resolution`).
    root: folder of the data set.
    split: of UCF-101: official split 1, 2 or 3; 0 trains on all clips, those of split 1's test
      list included (Latte's protocol).
    cache: folder of the encoded latents.
    resolution: (rows, cols) of a view: the largest box of this shape is cut, then resized.
    fps: frames per second of a view, chosen by the file's timestamps, so that all clips move at the
      same speed; 0 counts source frames instead, by `stride`.
    stride: source frames from one frame of a view to the next, at whatever rate the file has.
    crop: place of the box in training views, "center" or "random".
    flip: mirror every other training view of a clip; a coin decides for its first view.
    views: training views per clip. Validation has one: the clip's middle, centre crop, no mirror.
    short: treatment of clips shorter than a view. "pad" repeats the last frame, "clamp" shows them
      slower (takes the largest stride that fits), "skip" leaves them out.
    damaged: treatment of clips of which some frames cannot be decoded: "use" drops those frames,
      "skip" leaves such clips out. A decoder does not notice all damage.
    seed: of views and of the folder source's choices.
    val_fraction: of the folder source: share of clips kept for validation; see `list_folder`.
    max_clips: most clips per split, spread over the classes; 0 takes all.
    workers: threads that encode; 0 takes one per CPU.
    array: of latents: name of the array in a .npz or .safetensors file; empty takes the only one.
    axes: of latents: order of the array's axes, "tyxc" or "ctyx", perhaps behind one of size 1.
    condition: what the model is told of a clip: its "class", an "embedding", or "none".
    embedding_size: numbers of an embedding.
    embedding_array: of latents: name of the embedding in a clip's own .npz or .safetensors file;
      empty takes `EMBEDDING` beside the clip.
    embedder: "module:Class" of an `Embedder`, which makes embeddings of captions; empty: they are
      there already.
    embedder_path: of the embedder: where its weights are.
  """

  source: str
  root: str
  split: int = 1
  cache: str = "data/cache"
  resolution: tuple[int, int]
  frames: int
  fps: float = 0.0
  stride: int = 1
  crop: str = "center"
  flip: bool = False
  views: int = 1
  short: str = "clamp"
  damaged: str = "use"
  seed: int = 0
  val_fraction: float = 0.1
  max_clips: int = 0
  workers: int = 0
  array: str = ""
  axes: str = "tyxc"
  condition: str = "class"
  embedding_size: int = 0
  embedding_array: str = ""
  embedder: str = ""
  embedder_path: str = ""
  codec: CodecConfig

  def __post_init__(self):
    require_one_of(self, "source", ("ucf101", "folder", "latents"))
    require_one_of(self, "axes", ("tyxc", "ctyx"))
    require_one_of(self, "crop", ("center", "random"))
    require_one_of(self, "short", ("pad", "clamp", "skip"))
    require_one_of(self, "damaged", ("use", "skip"))
    require(self, "resolution frames stride views", least=1)
    require(self, "fps max_clips workers", least=0)
    if self.source == "latents" and (self.views != 1 or self.flip):
      raise ValueError(
        f"source='latents' has one view of each clip: set views=1, not {self.views}, flip=False: "
        "as mirrored latents are not those of a mirrored video."
      )
    if self.fps and self.stride != 1:
      raise ValueError(
        f"fps={self.fps:g} chooses frames by time, stride={self.stride} by count: set stride=1, or "
        "fps=0."
      )
    require(self, "split", least=0, most=3)
    require(self, "val_fraction", above=0, below=1)
    require_one_of(self, "condition", ("class", "embedding", "none"))
    self._check_embedding()

  def _check_embedding(self):
    """Refuses keys of embeddings that contradict each other."""
    given = [name for name in _OF_CONDITION[1:] if getattr(self, name)]
    if self.condition != "embedding":
      if given:
        raise ValueError(
          f"{given[0]}={getattr(self, given[0])!r} needs condition='embedding', not "
          f"{self.condition!r}."
        )
      return
    if self.source == "ucf101":
      raise ValueError(
        "source='ucf101' has classes alone: set condition='class', or take the videos by "
        "source='folder'."
      )
    if self.embedding_size < 1:
      raise ValueError(
        f"embedding_size={self.embedding_size} must be the numbers of an embedding, at least 1, "
        "where condition='embedding'."
      )
    if self.embedder_path and not self.embedder:
      raise ValueError(
        f"embedder_path={self.embedder_path!r} needs an embedder, 'module:Class', e.g. "
        "freqformer.data.text:ClipText."
      )
    if self.embedding_array and (self.embedder or self.source != "latents"):
      raise ValueError(
        f"embedding_array={self.embedding_array!r} names an array in files of source='latents', "
        "and goes with no embedder: leave it out."
      )
    if self.embedder:
      embedder_class(self.embedder)

  @property
  def video_shape(self) -> tuple[int, int, int]:
    """(frames, rows, cols) of a view."""
    return self.frames, *self.resolution

  @property
  def latent_shape(self) -> tuple[int, int, int, int]:
    """(t, y, x, c) of the latents that the codec makes of a view."""
    return make_codec(self.codec).latent_shape(*self.video_shape)

  def shown_fps(self, source: float = _USUAL_FPS) -> float:
    """Returns frames per second of decoded videos, of source clips with that many."""
    return self.fps or source / self.stride

  def facts(self) -> dict[str, str]:
    """Describes the views and their latents for people."""
    rows, cols = self.resolution
    latents = "x".join(map(str, self.latent_shape))
    pace = f"{self.fps:g} a second" if self.fps else f"stride {self.stride}"
    return {
      "video": f"{self.frames} frames {rows}x{cols}, {pace}",
      "latents": f"{latents} (codec {self.codec.name})",
    }

  def decode(self, latents: np.ndarray, statistics: LatentStatistics) -> np.ndarray:
    """Decodes normalised latents `[b, t, y, x, c]` to uint8 video `[b, frames, rows, cols, 3]`."""
    return make_codec(self.codec).decode(statistics.denormalise(latents), self.video_shape)

  def views_of(self, split: str) -> int:
    """Returns the views per clip of a split."""
    return self.views if split == "train" else 1

  def protocol(self) -> dict:
    """Returns all settings that decide which latents come out of the same clips, as JSON values."""
    values = dataclasses.asdict(self)
    for name in ("cache", "workers", "root"):  # data may move
      del values[name]
    # A key that the source does not read must not make another cache.
    unread = {
      "ucf101": ("val_fraction", "array", "axes"),
      "folder": ("split", "array", "axes"),
      "latents": ("split",),
    }
    for name in unread[self.source] + (_OF_CONDITION if self.condition == "class" else ()):
      del values[name]
    if self.embedder:
      values["embedder_version"] = embedder_class(self.embedder).version
    values |= {"version": VERSION, "codec_version": make_codec(self.codec).version}
    return json.loads(json.dumps(values))

  @property
  def protocol_hash(self) -> str:
    """sha256 of `protocol()`, hex."""
    return hashlib.sha256(json.dumps(self.protocol(), sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Clip:
  """One clip of a split.

  Attributes:
    key: its name in reports and hashes.
    path: of its video or latent.
    label: number of its class.
    caption: empty where it has none or none is read.
    embedding: path of its ready embedding, if it has one.
  """

  key: str
  path: Path
  label: int
  caption: str = ""
  embedding: Path | None = None

  @property
  def files(self) -> tuple[Path, ...]:
    """The files that make the clip, its caption left out: if one changes, the clip does."""
    return (self.path,) if self.embedding is None else (self.path, self.embedding)


@dataclasses.dataclass(frozen=True)
class Listing:
  """The clips of a split.

  Attributes:
    clips: those on disk.
    class_names: of all classes; index = label.
    missing: `{key: reason}` of those that are listed but not on disk.
    others: `{ending: count}` of files that were passed over.
  """

  clips: list[Clip]
  class_names: list[str]
  missing: dict[str, str] = dataclasses.field(default_factory=dict)
  others: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Footage:
  """The pictures that a clip has.

  Attributes:
    size: (rows, cols) as displayed.
    times: seconds of every frame from the first one, ascending.
  """

  size: tuple[int, int]
  times: tuple[float, ...]

  @property
  def fps(self) -> float:
    """Frames per second, on average; the usual ones if there is only one frame."""
    seconds = self.times[-1] - self.times[0]
    return (len(self.times) - 1) / seconds if seconds > 0 else _USUAL_FPS


@dataclasses.dataclass(frozen=True)
class View:
  """The part of a clip that one record shows.

  Attributes:
    frames: source frames, by number.
    fps: how many of them the clip shows in a second.
    box: (top, left, bottom, right) of the crop, as fractions of the source frame.
    flip: mirrored left to right.
  """

  frames: tuple[int, ...]
  fps: float
  box: tuple[float, float, float, float]
  flip: bool


class BrokenClip(Exception):
  """A clip that cannot be used, with its name and the reason."""

  def __init__(self, name: str, reason: str):
    super().__init__(f"{name}: {reason}")
    self.reason = reason


def draw_view(config: DataConfig, split: str, key: str, index: int, footage: Footage) -> View:
  """Draws view number `index` of a clip, a function of the arguments only.

  Args:
    key: name of the clip.
    footage: of the clip, as decoded.

  Raises:
    BrokenClip: it cannot give `config.frames` frames under `config.short`.
  """
  train = split == "train"
  when, y, x, _ = uniforms(f"{config.seed}|{key}|{index}")
  if not train:
    when = 0.5
  if not train or config.crop == "center":
    y = x = 0.5
  # Every other view is mirrored, so two views of a clip always show both sides; the coin of view 0
  # begins the count.
  coin = uniforms(f"{config.seed}|{key}|0")[3] < 0.5
  mirrored = train and config.flip and coin != bool(index % 2)
  pace = _by_time if config.fps else _by_count
  frames, fps = pace(config, key, footage, when)
  return View(frames, round(fps, 3), _box(config.resolution, footage.size, y, x), mirrored)


def _by_count(
  config: DataConfig, key: str, footage: Footage, when: float
) -> tuple[tuple[int, ...], float]:
  """Returns every stride-th frame, beginning at fraction `when` of the room, and their rate."""
  length = len(footage.times)
  stride = config.stride
  needed = (config.frames - 1) * stride + 1
  if length < needed and config.short != "pad":
    _check_short(config, key, footage, f"{needed} are needed at stride {stride}")
    stride = (length - 1) // (config.frames - 1)
  slack = max(length - 1 - (config.frames - 1) * stride, 0)
  start = min(int(when * (slack + 1)), slack)
  places = (min(start + i * stride, length - 1) for i in range(config.frames))
  return tuple(places), footage.fps / stride


def _by_time(
  config: DataConfig, key: str, footage: Footage, when: float
) -> tuple[tuple[int, ...], float]:
  """Returns the frames nearest to ticks of 1 / config.fps seconds, and the ticks' rate."""
  times = np.asarray(footage.times)
  fps = config.fps
  seconds = (config.frames - 1) / fps
  # A last frame is shown for a while, too.
  if times[-1] + 0.5 / footage.fps < seconds and config.short != "pad":
    needed = f"{seconds:.2f} s are needed at {fps:g} frames a second, it has {times[-1]:.2f}"
    _check_short(config, key, footage, needed)
    seconds = times[-1]
    fps = (config.frames - 1) / seconds
  ticks = when * max(times[-1] - seconds, 0) + np.arange(config.frames) / fps
  places = np.searchsorted((times[1:] + times[:-1]) / 2, ticks)
  return tuple(places.tolist()), fps


def _check_short(config: DataConfig, key: str, footage: Footage, needed: str) -> None:
  """Refuses a clip that is shorter than a view and cannot be shown slower."""
  length = len(footage.times)
  has = f"it has {length} frames"
  if config.short == "skip":
    raise BrokenClip(key, f"{has}, {needed}, and data.short is 'skip'")
  if length < config.frames:
    text = f"{has}, {config.frames} are needed even at stride 1; data.short='pad' would keep it"
    raise BrokenClip(key, text)


def _box(resolution, size, y: float, x: float) -> tuple[float, float, float, float]:
  """Returns the largest box of the target's shape, at fraction (y, x) of the room that is left."""
  scale = min(size[0] / resolution[0], size[1] / resolution[1])
  height = resolution[0] * scale / size[0]
  width = resolution[1] * scale / size[1]
  top = y * max(1 - height, 0)
  left = x * max(1 - width, 0)
  return tuple(round(v, 6) for v in (top, left, min(top + height, 1), min(left + width, 1)))


def uniforms(text: str) -> tuple[float, float, float, float]:
  """Returns four numbers in [0, 1) from the sha256 of a text, the same on every machine."""
  # Names of files need not be UTF-8.
  digest = hashlib.sha256(text.encode(errors="surrogateescape")).digest()
  return tuple(int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in range(0, 32, 8))
