"""Clips of a camera that moves over a photograph: real textures whose motion is known exactly.

The class of a clip is how its picture moves, whatever it shows: towards a side, growing, shrinking
or turning. Points are (down, across) in pixels of the clip, from the middle of the frame; the
camera's pose is drawn for the middle of the clip. A frame that is `after` frames later shows at p

  the photograph at   place + scale (zoom^-after R(-angle after) p - velocity after).

A pixel is the mean of the photograph over its square, as on a sensor.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
import warnings
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps

from freqformer.config import ConfigError, require
from freqformer.data.protocol import uniforms

VERSION = 1  # of the pictures
# Files that are taken for photographs; what Pillow cannot read among them is named and left out.
ENDINGS = (
  ".avif .bmp .gif .heic .heif .jp2 .jpeg .jpg .jxl .png .ppm .svg .svgz .tif .tiff .webp".split()
)
_DIAGONAL = math.sqrt(0.5)
# (down, across), a unit vector; the first four are those of `directions=4`.
DIRECTIONS = {
  "right": (0.0, 1.0),
  "left": (0.0, -1.0),
  "down": (1.0, 0.0),
  "up": (-1.0, 0.0),
  "down_right": (_DIAGONAL, _DIAGONAL),
  "down_left": (_DIAGONAL, -_DIAGONAL),
  "up_right": (-_DIAGONAL, _DIAGONAL),
  "up_left": (-_DIAGONAL, -_DIAGONAL),
}
# choice: the sprite's radius and how far from the middle it passes, over a frame's shorter side.
SPRITE_RADIUS = 1 / 6
SPRITE_PLACE = 1 / 4
# choice: points of the cut photograph per pixel of the clip's closest view, along each axis; a
# frame reads them by bicubic interpolation, which at 2 leaves out little of what a pixel can show.
_OVERSAMPLING = 2
# choice: correlation of two thumbnails from which on photographs show the same scene.
ALIKE = 0.95
THUMBNAIL = 16  # pixels a side


@dataclasses.dataclass(frozen=True, kw_only=True)
class PansConfig:
  """Sizes and counts of a set of clips.

  Attributes:
    clips: of each photograph and motion; they take the speeds in turn.
    frames: of a clip.
    rows: of a frame, even.
    cols: of a frame, even.
    speeds: pixels per frame; of a zoom or a turn, those of the middle of the frame's nearer edges.
    directions: 4, or 8 with the diagonals.
    sprite: a disc of another place of the photograph crosses the frame at the clip's speed.
    val: share of the scenes whose clips are all for validation.
    seed: of places, scales, sprites and the split.
  """

  clips: int = 3
  frames: int = 32
  rows: int = 96
  cols: int = 96
  speeds: tuple[float, ...] = (0.5, 1.0, 2.0)
  directions: int = 4
  sprite: bool = False
  val: float = 0.2
  seed: int = 0

  def __post_init__(self):
    require(self, "clips", least=1)
    require(self, "frames rows cols", least=2)
    require(self, "speeds", above=0)
    require(self, "val", above=0, below=1)
    if not self.speeds:
      raise ValueError("speeds=() must have a speed, in pixels per frame.")
    if self.directions not in (4, 8):
      raise ValueError(f"directions={self.directions} must be 4, or 8 with the diagonals.")
    if self.rows % 2 or self.cols % 2:
      raise ValueError(
        f"rows={self.rows} and cols={self.cols} must be even: mp4 files keep colours for pairs."
      )

  @property
  def motions(self) -> list[str]:
    """Names of the classes."""
    return [*list(DIRECTIONS)[: self.directions], "zoom_in", "zoom_out", "turn_left", "turn_right"]


@dataclasses.dataclass(frozen=True)
class Motion:
  """Change of the picture from a frame to the next; the camera does the opposite.

  Attributes:
    velocity: (down, across), pixels per frame.
    zoom: factor per frame, above 1 if the picture grows.
    angle: degrees per frame, positive if it turns left (anticlockwise).
  """

  velocity: tuple[float, float] = (0.0, 0.0)
  zoom: float = 1.0
  angle: float = 0.0

  def pose(self, after: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the matrix and offset that take a frame's points to the middle frame's."""
    turn = math.radians(self.angle) * after
    # Of (down, across), with down pointing down: a left turn of the picture, undone.
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return self.zoom**-after * rotation, -after * np.array(self.velocity)


def motion(name: str, speed: float, config: PansConfig) -> Motion:
  """Returns the motion of a class at a speed in pixels per frame."""
  if name in DIRECTIONS:
    down, across = DIRECTIONS[name]
    return Motion(velocity=(speed * down, speed * across))
  share = speed / (min(config.rows, config.cols) / 2)
  return {
    "zoom_in": Motion(zoom=math.exp(share)),
    "zoom_out": Motion(zoom=math.exp(-share)),
    "turn_left": Motion(angle=math.degrees(share)),
    "turn_right": Motion(angle=-math.degrees(share)),
  }[name]


@dataclasses.dataclass(frozen=True)
class Sprite:
  """A disc of the photograph that moves on its own.

  Attributes:
    velocity: (down, across), pixels per frame.
    center: of the disc at the middle of the clip, a point.
    radius: pixels of the clip.
    place: (down, across) of the photograph's pixels that its centre shows.
  """

  velocity: tuple[float, float]
  center: tuple[float, float]
  radius: float
  place: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Shot:
  """Everything that decides a clip's pixels, given its photograph.

  Attributes:
    motion: of the picture.
    scale: pixels of the photograph per pixel of the clip's middle frame.
    place: (down, across) of the photograph's pixels in the middle of that frame.
    sprite: or None.
  """

  motion: Motion
  scale: float
  place: tuple[float, float]
  sprite: Sprite | None


@dataclasses.dataclass(frozen=True)
class _Reach:
  """The part of the photograph that a motion shows, in pixels of the middle frame.

  Attributes:
    low: the least (down, across).
    high: the greatest.
    closest: those pixels per pixel of the closest view, at most 1.
  """

  low: np.ndarray
  high: np.ndarray
  closest: float


def _reach(moved: Motion, config: PansConfig) -> _Reach:
  half = np.array([config.rows, config.cols]) / 2
  corners = half * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
  poses = [moved.pose(after) for after in _times(config)]
  points = np.concatenate([corners @ matrix.T + offset for matrix, offset in poses])
  closest = min(moved.zoom**-after for after in _times(config))
  return _Reach(points.min(0), points.max(0), closest)


def _times(config: PansConfig) -> np.ndarray:
  """Returns the frames' numbers from the middle of the clip."""
  return np.arange(config.frames) - (config.frames - 1) / 2


def least_size(config: PansConfig) -> tuple[int, int]:
  """Returns (rows, cols) of the smallest photograph that every motion fits into.

  No view is larger than the photograph's own pixels.
  """
  sizes = []
  for name in config.motions:
    reach = _reach(motion(name, max(config.speeds), config), config)
    sizes.append((reach.high - reach.low) / reach.closest)
  rows, cols = np.ceil(np.max(sizes, 0)).astype(int)
  return int(rows), int(cols)


def draw_shot(config: PansConfig, key: str, name: str, number: int, size: tuple[int, int]) -> Shot:
  """Draws a clip, a function of the arguments only.

  Args:
    key: name of the photograph.
    name: of the motion.
    number: of the clip among those of the photograph and motion.
    size: (rows, cols) of the photograph, at least `least_size`.
  """
  text = f"{config.seed}|{key}|{name}|{number}"
  zoomed, down, across, _ = uniforms(text)
  speed = config.speeds[number % len(config.speeds)]
  moved = motion(name, speed, config)
  reach = _reach(moved, config)
  least = 1 / reach.closest
  most = min(np.array(size) / (reach.high - reach.low))
  scale = float(least * (most / least) ** zoomed)
  room = np.array(size) - scale * (reach.high - reach.low)
  place = np.array([down, across]) * room - scale * reach.low
  sprite = _draw_sprite(config, f"{text}|sprite", speed, scale, size) if config.sprite else None
  return Shot(moved, scale, tuple(place.tolist()), sprite)


def _draw_sprite(config: PansConfig, text: str, speed: float, scale: float, size) -> Sprite:
  turn, aside, down, across = uniforms(text)
  direction = np.array([math.sin(math.tau * turn), math.cos(math.tau * turn)])
  shorter = min(config.rows, config.cols)
  # It passes the middle on one side, at right angles to its path.
  center = direction[::-1] * (1, -1) * (2 * aside - 1) * SPRITE_PLACE * shorter
  radius = SPRITE_RADIUS * shorter
  edge = scale * (radius + 1)
  place = edge + np.array([down, across]) * (np.array(size) - 2 * edge)
  return Sprite(
    tuple((speed * direction).tolist()), tuple(center.tolist()), radius, tuple(place.tolist())
  )


class _Cut:
  """A part of a photograph, reduced to `_OVERSAMPLING` points per pixel of the closest view."""

  def __init__(self, photo: Image.Image, place, scale: float, low, high, closest: float):
    """Cuts the box between the points `low` and `high` around `place`."""
    sides = np.asarray(high) - low
    self._low = np.asarray(low)
    rows, cols = np.ceil(sides * _OVERSAMPLING / closest).astype(int).tolist()
    self._step = sides / (rows, cols)  # between points, in pixels of the middle frame
    top, left = np.asarray(place) + scale * self._low
    bottom, right = np.asarray(place) + scale * np.asarray(high)
    # A border may lie a rounding error outside the photograph; Pillow refuses more than that.
    box = np.round((left, top, right, bottom), 6).tolist()
    self._image = photo.resize((cols, rows), Image.Resampling.LANCZOS, box=box)

  def frame(self, pose: tuple[np.ndarray, np.ndarray], config: PansConfig) -> np.ndarray:
    """Returns a frame at a pose, uint8 `[rows, cols, 3]`; black beyond the cut."""
    matrix, offset = pose
    # As many samples a pixel as there are points in it.
    parts = math.ceil(math.sqrt(np.linalg.det(matrix)) / self._step.min() - 1e-6)
    half = np.array([config.rows, config.cols]) / 2
    scaled = matrix / parts / self._step[:, None]
    (yy, yx), (xy, xx) = scaled
    y, x = (offset - self._low - matrix @ half) / self._step
    size = (config.cols * parts, config.rows * parts)
    affine = (xx, xy, x, yx, yy, y)  # Pillow's order: across before down
    fine = self._image.transform(size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.asarray(fine.reduce(parts))


def render_clip(photo: Image.Image, shot: Shot, config: PansConfig) -> np.ndarray:
  """Renders a clip from an RGB photograph, uint8 `[frames, rows, cols, 3]`."""
  reach = _reach(shot.motion, config)
  cut = _Cut(photo, shot.place, shot.scale, reach.low, reach.high, reach.closest)
  video = np.stack([cut.frame(shot.motion.pose(after), config) for after in _times(config)])
  if shot.sprite:
    _add_sprite(video, photo, shot, config)
  return video


def _add_sprite(video: np.ndarray, photo: Image.Image, shot: Shot, config: PansConfig) -> None:
  """Puts the sprite over a clip; the disc's edge is a pixel wide."""
  sprite = shot.sprite
  corner = np.full(2, sprite.radius + 1)
  cut = _Cut(photo, sprite.place, shot.scale, -corner, corner, 1.0)
  down = np.arange(config.rows)[:, None] + 0.5 - config.rows / 2
  across = np.arange(config.cols) + 0.5 - config.cols / 2
  for frame, after in zip(video, _times(config), strict=True):
    y, x = np.add(sprite.center, np.multiply(sprite.velocity, after))
    inside = np.clip(sprite.radius + 0.5 - np.hypot(down - y, across - x), 0, 1)[..., None]
    disc = cut.frame((np.eye(2), np.array([-y, -x])), config)
    frame[:] = np.rint(inside * disc + (1 - inside) * frame)


# ---- photographs ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Photographs:
  """The usable pictures of a folder.

  Attributes:
    folder: that holds them.
    sizes: (rows, cols) by key, the path inside the folder.
    splits: "train" or "val" by key.
    skipped: reason by key.
  """

  folder: pathlib.Path
  sizes: Mapping[str, tuple[int, int]]
  splits: Mapping[str, str]
  skipped: Mapping[str, str]

  def open(self, key: str) -> Image.Image:
    """Returns a photograph in RGB, upright."""
    return _open(self.folder / key)


def find_photographs(folder: str | os.PathLike, config: PansConfig) -> Photographs:
  """Finds the photographs of a tree of folders and splits them by scene.

  Photographs whose thumbnails are alike (copies in other sizes, one scene taken twice) are one
  scene and in one split; crops of different shape are not recognised. Links are left out.

  Raises:
    ConfigError: the folder is missing, or holds fewer than two usable scenes.
  """
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise ConfigError(f"--photos={str(folder)!r} is not a folder: name one that holds photographs.")
  rows, cols = least_size(config)
  sizes = {}
  thumbnails = []
  skipped = {}
  for key in _pictures(root):
    try:
      photo = _open(root / key)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
      reason = "no known format" if isinstance(error, Image.UnidentifiedImageError) else error
      skipped[key] = f"Pillow cannot read it ({reason})"
      continue
    if photo.height < rows or photo.width < cols:
      skipped[key] = (
        f"it has {photo.height} x {photo.width} pixels (rows x cols), the moves need {rows} x "
        f"{cols}; fewer frames, lower speeds or smaller frames need less"
      )
      continue
    sizes[key] = (photo.height, photo.width)
    thumbnails.append(_thumbnail(photo))
  scenes = _scenes(np.array(thumbnails), list(sizes))
  if len(set(scenes.values())) < 2:
    examples = "".join(f"\n  {key}: {reason}" for key, reason in list(skipped.items())[:5])
    raise ConfigError(
      f"--photos={str(folder)!r} must hold photographs of two scenes at least, one for validation; "
      f"{len(sizes)} can be used ({len(set(scenes.values()))} scenes), {len(skipped)} cannot; "
      f"endings are {', '.join(ENDINGS)}.{examples}"
    )
  return Photographs(root, sizes, _split(scenes, config), skipped)


def _pictures(root: pathlib.Path) -> list[str]:
  found = []
  for folder, _, names in os.walk(root):
    for name in names:
      path = pathlib.Path(folder, name)
      if path.suffix.lower() in ENDINGS and not path.is_symlink():
        found.append(path.relative_to(root).as_posix())
  return sorted(found)


def _open(path: pathlib.Path) -> Image.Image:
  with warnings.catch_warnings(), Image.open(path) as image:
    # A palette's transparency may be stored in a way that Pillow warns of.
    warnings.simplefilter("ignore")
    return ImageOps.exif_transpose(image).convert("RGB")


def _thumbnail(photo: Image.Image) -> np.ndarray:
  """Returns brightness of mean 0 and norm 1, float64 `[THUMBNAIL ** 2]`."""
  small = photo.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, reducing_gap=2).convert("L")
  values = np.asarray(small, np.float64).ravel()
  values -= values.mean()
  return values / max(np.linalg.norm(values), 1e-9)


def _scenes(thumbnails: np.ndarray, keys: list[str]) -> dict[str, str]:
  """Returns the scene of each photograph, named after its first one."""
  scenes = {key: key for key in keys}
  if not keys:
    return scenes
  for i, j in np.argwhere(np.tril(thumbnails @ thumbnails.T > ALIKE, -1)):
    other = scenes[keys[i]]
    scenes = {key: scenes[keys[j]] if own == other else own for key, own in scenes.items()}
  return scenes


def _split(scenes: Mapping[str, str], config: PansConfig) -> dict[str, str]:
  """Returns the split of each photograph; the lowest hashes of scenes are validation."""
  places = {scene: uniforms(f"{config.seed}|split|{scene}")[0] for scene in scenes.values()}
  count = min(max(round(config.val * len(places)), 1), len(places) - 1)
  val = sorted(places, key=places.get)[:count]
  return {key: "val" if scene in val else "train" for key, scene in scenes.items()}


def clip_path(split: str, name: str, key: str, number: int) -> str:
  """Returns the path of a clip inside its set."""
  digest = hashlib.sha256(key.encode()).hexdigest()[:8]
  return f"{split}/{name}/{pathlib.PurePath(key).stem}-{digest}-{number:02d}.mp4"
