"""Renders a small data set in the shape of UCF-101: same folders, file names and split lists.

  python -m freqformer.data.render data/comparison

Classes differ in texture and in motion; DriftingStripes and SwayingStripes in motion only. A
*group* is one scene: its clips share colours, frequency and direction and differ in phase, place,
speed and length. A picture is a smooth scalar field in [0, 1] looked up in 256 colours. Lengths are
in frame heights, speeds per second. Results on these data say that the machine works, no more.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

VERSION = 2  # of the pictures: sets of another version are rendered again
FPS = 25
SEED = 0
# One clip in so many is shorter than 16 frames at stride 3, as some of UCF-101's are.
SHORT_EVERY = 16
BROKEN_BYTES = 2048  # of the clip that cannot be decoded: it ends inside the header
TWO_PI = 2 * math.pi


@dataclasses.dataclass(frozen=True)
class RenderedSet:
  """Sizes of a data set.

  Attributes:
    classes: how many of `LOOKS`, from the first.
    groups: per class; at least 2, so that train and test share none.
    clips_per_group: below 99.
    rows: of a frame, even.
    cols: of a frame, even.
  """

  classes: int = 8
  groups: int = 5
  clips_per_group: int = 4
  rows: int = 120
  cols: int = 160


# choice: more clips than a small test needs, so that a model learns classes and not clips.
DEMO = RenderedSet(clips_per_group=12)


@dataclasses.dataclass(frozen=True)
class Scene:
  """The draws of a clip, of which frequency and angle are its group's.

  Attributes:
    frequency: cycles per frame height.
    angle: radians.
    speed: in the class's own unit per second, signed.
    phase: two offsets in cycles.
    center: `(u, v)` in frame heights.
    size: relative size of objects.
  """

  frequency: float
  angle: float
  speed: float
  phase: tuple[float, float]
  center: tuple[float, float]
  size: float


# ---- fields: (scene, u across, v down, t in seconds) -> about [0, 1], all of them broadcast ----


def _wave(cycles):
  return 0.5 + 0.5 * np.sin(np.float32(TWO_PI) * cycles)


def _around(s: Scene, u, v, turn):
  """Returns coordinates relative to the scene's centre, turned by `turn` cycles."""
  u = u - s.center[0]
  v = v - s.center[1]
  cos = np.cos(TWO_PI * turn)
  sin = np.sin(TWO_PI * turn)
  return cos * u + sin * v, cos * v - sin * u


def _stripes(s: Scene, u, v, shift):
  return _wave(s.frequency * (math.cos(s.angle) * u + math.sin(s.angle) * v - shift) + s.phase[0])


def drifting_stripes(s, u, v, t):
  return _stripes(s, u, v, s.speed * t)


def swaying_stripes(s, u, v, t):
  return _stripes(s, u, v, 0.06 * np.sin(TWO_PI * (s.speed * t + s.phase[1])))


def rotating_checker(s, u, v, t):
  a, b = _around(s, u, v, s.speed * t + s.phase[0])
  k = np.float32(TWO_PI * s.frequency)
  return 0.5 + 0.6 * np.tanh(1.2 * np.sin(k * a) * np.sin(k * b))


def rotating_petals(s, u, v, t):
  a, b = _around(s, u, v, 0.0)
  r = np.sqrt(a * a + b * b)
  petals = 2 * round(s.frequency)
  field = np.cos(np.float32(petals) * (np.arctan2(b, a) - TWO_PI * (s.speed * t + s.phase[0])))
  return 0.5 + 0.5 * field * np.clip(r / 0.3, 0, 1) ** 2 * np.exp(-((r / 0.85) ** 4))


def expanding_rings(s, u, v, t):
  r = np.sqrt((u - s.center[0]) ** 2 + (v - s.center[1]) ** 2 + 0.004)
  return _wave(s.frequency * (r - abs(s.speed) * t) + s.phase[0])


def falling_dots(s, u, v, t):
  k = s.frequency
  down = v - abs(s.speed) * t + 0.12 * np.sin(TWO_PI * (0.6 * u + s.phase[1]))
  across = np.cos(TWO_PI * (k * u + s.phase[0])) - 1
  return 0.35 * v + 0.65 * np.exp(
    1.1 * (across + np.cos(np.float32(TWO_PI) * (k * down + s.phase[1])) - 1)
  )


def bouncing_balls(s, u, v, t):
  field = 0.3 * v + 0.15 * u
  width = float(u.max())
  for i in range(2):
    hop = np.abs(np.sin(math.pi * (abs(s.speed) * t + s.phase[i])))
    # A triangle wave: it turns at the walls.
    side = np.abs((0.25 * s.speed * t + s.phase[1 - i] + i / 2) % 2 - 1)
    r = np.sqrt((u - (0.15 + (width - 0.3) * side)) ** 2 + (v - (0.8 - 0.55 * hop)) ** 2)
    # The edge, a tenth of the height, is as sharp as codecs keep.
    ball = 1 / (1 + np.exp(np.clip((r - 0.15 * s.size) / 0.03, -30, 30)))
    field = np.maximum(field, (1 - 0.2 * i) * ball)
  return field


def morphing_clouds(s, u, v, t):
  a, b = s.speed * t + s.phase[0], s.speed * t - s.phase[1]
  bend = 0.25 * np.sin(TWO_PI * (0.7 * v + a))
  first = np.sin(np.float32(TWO_PI) * (s.frequency * (u + bend) + b))
  second = np.sin(TWO_PI * (s.frequency * 0.8 * v - 1.3 * a)) * np.sin(
    TWO_PI * (s.frequency * 0.6 * u + 0.7 * b)
  )
  return 0.5 + 0.25 * (first + second)


@dataclasses.dataclass(frozen=True)
class Look:
  """A class: its picture, RGB in hexadecimal from field 0 to 1, and typical values of a `Scene`."""

  field: Callable
  palette: tuple[str, ...]
  frequency: float
  speed: float
  angle: float = 0.0


_STRIPES = ("264653", "2a9d8f", "e9c46a")
LOOKS = {
  "DriftingStripes": Look(drifting_stripes, _STRIPES, 1.9, 0.24, 0.5),
  "SwayingStripes": Look(swaying_stripes, _STRIPES, 1.9, 0.8, 0.5),
  "RotatingChecker": Look(rotating_checker, ("3c1428", "be3c46", "fadcbe"), 1.5, 0.17),
  "RotatingPetals": Look(rotating_petals, ("141e5a", "466ec8", "e6ebff"), 3.0, 0.17),
  "ExpandingRings": Look(expanding_rings, ("321446", "9646a0", "f0bedc"), 2.4, 0.35),
  "FallingDots": Look(falling_dots, ("1e3228", "467846", "ebf096"), 2.6, 0.4),
  "BouncingBalls": Look(bouncing_balls, ("5a6e82", "c8c8be", "dc5a1e"), 1.0, 1.1),
  "MorphingClouds": Look(morphing_clouds, ("285aa0", "82aad2", "fafafa"), 1.6, 0.35),
}


def render_clip(
  name: str, group: int, clip: int, frames: int, rows: int = 120, cols: int = 160
) -> np.ndarray:
  """Renders one clip, uint8 `[frames, rows, cols, 3]`; the same arguments give the same bytes."""
  look = LOOKS[name]
  key = zlib.crc32(name.encode())
  by_group = np.random.default_rng([SEED, key, group])
  by_clip = np.random.default_rng([SEED, key, group, clip])
  palette = _palette(look, by_group)
  # Draws are in the order of the pictures' version.
  frequency = look.frequency * by_group.uniform(0.88, 1.12)
  angle = look.angle + by_group.uniform(-0.35, 0.35)
  speed = look.speed * by_clip.uniform(0.75, 1.25) * by_clip.choice([-1, 1])
  center = (cols / rows * by_clip.uniform(0.38, 0.62), by_clip.uniform(0.38, 0.62))
  phase = (by_clip.uniform(), by_clip.uniform())
  scene = Scene(frequency, angle, speed, phase, center, size=by_clip.uniform(0.85, 1.2))
  v = ((np.arange(rows, dtype=np.float32) + 0.5) / rows)[None, :, None]
  u = ((np.arange(cols, dtype=np.float32) + 0.5) / rows)[None, None, :]
  t = (np.arange(frames, dtype=np.float32) / FPS)[:, None, None]
  field = np.broadcast_to(look.field(scene, u, v, t), (frames, rows, cols))
  return palette[np.clip(field * 255 + 0.5, 0, 255).astype(np.uint8)]


def _palette(look: Look, rng) -> np.ndarray:
  """Returns uint8 `[256, 3]`: the class's stops, each moved a little, joined by straight lines."""
  brightness = rng.uniform(0.88, 1.08)
  stops = np.array([list(bytes.fromhex(stop)) for stop in look.palette]) * brightness
  stops += rng.uniform(-14, 14, stops.shape)
  at = np.linspace(0, 1, len(stops))
  channels = [np.interp(np.linspace(0, 1, 256), at, stops[:, c]) for c in range(3)]
  return np.clip(np.stack(channels, -1) + 0.5, 0, 255).astype(np.uint8)


def write_avi(path, video: np.ndarray) -> None:
  """Writes uint8 `[t, y, x, 3]` as XviD-tagged MPEG-4 .avi, bit-exact between runs."""
  import av  # only files need it: clips that are rendered into memory do not

  with av.open(str(path), "w", format="avi", options={"fflags": "+bitexact"}) as container:
    stream = container.add_stream("mpeg4", rate=FPS)
    stream.height = video.shape[1]
    stream.width = video.shape[2]
    stream.pix_fmt = "yuv420p"
    stream.codec_tag = "XVID"
    stream.options = {"flags": "+bitexact", "qmin": "2", "qmax": "4"}
    # Clips run in parallel; slices would also make the bytes depend on the machine.
    stream.thread_count = 1
    stream.bit_rate = 2_000_000
    for image in video:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode())


def _relative(name: str, group: int, clip: int) -> str:
  return f"{name}/v_{name}_g{group:02d}_c{clip:02d}.avi"


def render_ucf101(root, sizes: RenderedSet | None = None) -> None:
  """Renders `UCF-101/` and `ucfTrainTestlist/` below `root`, and one clip that cannot be decoded.

  The broken clip is the last of the first class's last group and is listed in trainlist01, because
  a data path must name what it cannot read. `root/.complete` holds the parameters, and none while
  the set is being made: an existing set with the same ones is kept, another is replaced.

  Raises:
    FileExistsError: `root` holds a data set that was not rendered here.
  """
  root = pathlib.Path(root)
  sizes = sizes or RenderedSet()
  wanted = {"version": VERSION, **dataclasses.asdict(sizes), "fps": FPS, "seed": SEED}
  complete = root / ".complete"
  videos = root / "UCF-101"
  lists = root / "ucfTrainTestlist"
  if complete.exists() and json.loads(complete.read_text()) == wanted:
    return
  if (videos.exists() or lists.exists()) and not complete.exists():
    raise FileExistsError(
      f"{root} holds a data set that was not rendered here; render into another folder."
    )
  root.mkdir(parents=True, exist_ok=True)
  complete.write_text("{}")
  shutil.rmtree(videos, ignore_errors=True)
  shutil.rmtree(lists, ignore_errors=True)
  names = sorted(list(LOOKS)[: sizes.classes])
  groups = range(1, sizes.groups + 1)
  numbers = range(1, sizes.clips_per_group + 1)
  clips = [(name, group, number) for name in names for group in groups for number in numbers]
  for name in names:
    (videos / name).mkdir(parents=True)

  def render(index: int):
    rng = np.random.default_rng([SEED, index])
    frames = int(rng.integers(14, 36) if index % SHORT_EVERY == 5 else rng.integers(40, 91))
    video = render_clip(*clips[index], frames, sizes.rows, sizes.cols)
    write_avi(videos / _relative(*clips[index]), video)

  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    rendered = pool.map(render, range(len(clips)))
    list(tqdm(rendered, "rendering clips", len(clips), leave=False))
  broken = (names[0], sizes.groups, sizes.clips_per_group + 1)
  whole = (videos / _relative(*clips[0])).read_bytes()
  (videos / _relative(*broken)).write_bytes(whole[:BROKEN_BYTES])
  _write_lists(lists, names, sorted([*clips, broken]), sizes.groups)
  complete.write_text(json.dumps(wanted))


def _write_lists(
  folder: pathlib.Path, names: list[str], clips: list[tuple[str, int, int]], groups: int
) -> None:
  """Writes class ids and three splits; each tests on other groups, about 28 % (7 of 25) of them."""
  folder.mkdir()
  ids = {name: i for i, name in enumerate(names, 1)}
  (folder / "classInd.txt").write_text("".join(f"{i} {name}\n" for name, i in ids.items()))
  tested = max(1, round(0.28 * groups))
  for split in range(3):
    held = {(split * tested + i) % groups + 1 for i in range(tested)}
    train = [f"{_relative(*clip)} {ids[clip[0]]}\n" for clip in clips if clip[1] not in held]
    test = [f"{_relative(*clip)}\n" for clip in clips if clip[1] in held]
    (folder / f"trainlist{split + 1:02d}.txt").write_text("".join(train))
    (folder / f"testlist{split + 1:02d}.txt").write_text("".join(test))


if __name__ == "__main__":
  import sys

  if len(sys.argv) != 2:
    sys.exit("error: give one folder to render into, such as data/comparison.")
  render_ucf101(sys.argv[1])
