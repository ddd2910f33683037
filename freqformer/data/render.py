"""Renders a small data set in the shape of UCF-101: same folders, file names, codec and split lists, no download.

It exists so that the whole path (lists, decoding, broken and short clips, training, sampling by class) runs anywhere in
seconds. Classes differ in texture and in motion; one pair shares its texture and differs only in motion (DriftingStripes,
SwayingStripes), one pair shares its motion and differs in texture (RotatingChecker, RotatingPetals). As in UCF-101 a *group*
is one scene: its clips share colours, frequency and direction and differ in phase, place, speed and length. Nothing here is
real footage: results on it say that the machine works, not that a method is good.

Every picture is a smooth scalar field in [0, 1] looked up in a palette of 256 colours. Lengths are in frame heights, speeds
per second, so a class looks alike at every resolution.
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

VERSION = 2  # Part of the marker: a change of any picture must render sets of older versions again.
SHORT_EVERY = (
  16  # One clip in so many is shorter than 16 frames at stride 3, as some of UCF-101's are.
)
TWO_PI = 2 * math.pi


@dataclasses.dataclass(frozen=True)
class Scene:
  """What is drawn at random for a clip; all lengths in frame heights.

  Attributes:
    frequency, angle: cycles per height and direction in radians; the group's.
    speed: the clip's, in the class's own unit per second, signed.
    phase: two offsets in cycles, the clip's.
    center: `(u, v)`, the clip's.
    size: relative size of objects, the clip's.
  """

  frequency: float
  angle: float
  speed: float
  phase: tuple[float, float]
  center: tuple[float, float]
  size: float


def _wave(cycles):
  return 0.5 + 0.5 * np.sin(np.float32(TWO_PI) * cycles)


def _disc(s: Scene, u, v, center, radius: float):
  """1 inside, 0 outside, with an edge of about a tenth of the height: nothing sharper survives the codec."""
  r = np.sqrt((u - center[0]) ** 2 + (v - center[1]) ** 2)
  return 1 / (1 + np.exp(np.clip((r - radius * s.size) / 0.03, -30, 30)))


def _around(s: Scene, u, v, turn):
  """Coordinates relative to the scene's centre, turned by `turn` cycles."""
  u, v, c, w = u - s.center[0], v - s.center[1], np.cos(TWO_PI * turn), np.sin(TWO_PI * turn)
  return c * u + w * v, c * v - w * u


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
  field, width = 0.3 * v + 0.15 * u, float(u.max())
  for i in range(2):
    hop = np.abs(np.sin(math.pi * (abs(s.speed) * t + s.phase[i])))
    side = np.abs(
      (0.25 * s.speed * t + s.phase[1 - i] + i / 2) % 2 - 1
    )  # A triangle wave: it turns at the walls.
    field = np.maximum(
      field, (1 - 0.2 * i) * _disc(s, u, v, (0.15 + (width - 0.3) * side, 0.8 - 0.55 * hop), 0.15)
    )
  return field


def morphing_clouds(s, u, v, t):
  a, b = s.speed * t + s.phase[0], s.speed * t - s.phase[1]
  bend = 0.25 * np.sin(TWO_PI * (0.7 * v + a))
  first = np.sin(np.float32(TWO_PI) * (s.frequency * (u + bend) + b))
  second = np.sin(TWO_PI * (s.frequency * 0.8 * v - 1.3 * a)) * np.sin(
    TWO_PI * (s.frequency * 0.6 * u + 0.7 * b)
  )
  return 0.5 + 0.25 * (first + second)


def orbiting_discs(s, u, v, t):
  field = 0.25 * (1 - v)
  for i in range(3):
    turn = TWO_PI * (s.speed * t + s.phase[0] + i / 3)
    center = (s.center[0] + 0.3 * np.cos(turn), s.center[1] + 0.3 * np.sin(turn))
    field = np.maximum(field, (1 - 0.15 * i) * _disc(s, u, v, center, 0.13))
  return field


def pulsing_grid(s, u, v, t):
  k = s.frequency * (1 + 0.22 * np.sin(TWO_PI * (s.speed * t + s.phase[0])))
  return 0.5 + 0.25 * (
    np.cos(TWO_PI * k * (u - s.center[0])) + np.cos(TWO_PI * k * (v - s.center[1]))
  )


@dataclasses.dataclass(frozen=True)
class Look:
  """A class: its picture, palette stops (RGB, from field 0 to 1), typical frequency, speed and angle."""

  field: Callable
  palette: tuple[tuple[int, int, int], ...]
  frequency: float
  speed: float
  angle: float = 0.0


STRIPES = ((38, 70, 83), (42, 157, 143), (233, 196, 106))
LOOKS = {
  "DriftingStripes": Look(drifting_stripes, STRIPES, 1.9, 0.24, 0.5),
  "SwayingStripes": Look(swaying_stripes, STRIPES, 1.9, 0.8, 0.5),
  "RotatingChecker": Look(
    rotating_checker, ((60, 20, 40), (190, 60, 70), (250, 220, 190)), 1.5, 0.17
  ),
  "RotatingPetals": Look(
    rotating_petals, ((20, 30, 90), (70, 110, 200), (230, 235, 255)), 3.0, 0.17
  ),
  "ExpandingRings": Look(
    expanding_rings, ((50, 20, 70), (150, 70, 160), (240, 190, 220)), 2.4, 0.35
  ),
  "FallingDots": Look(falling_dots, ((30, 50, 40), (70, 120, 70), (235, 240, 150)), 2.6, 0.4),
  "BouncingBalls": Look(bouncing_balls, ((90, 110, 130), (200, 200, 190), (220, 90, 30)), 1.0, 1.1),
  "MorphingClouds": Look(
    morphing_clouds, ((40, 90, 160), (130, 170, 210), (250, 250, 250)), 1.6, 0.35
  ),
  "OrbitingDiscs": Look(orbiting_discs, ((20, 20, 30), (90, 60, 50), (255, 170, 60)), 1.0, 0.45),
  "PulsingGrid": Look(pulsing_grid, ((20, 60, 60), (60, 150, 150), (220, 250, 240)), 2.4, 0.7),
}


def render_clip(
  name: str,
  group: int,
  clip: int,
  frames: int,
  rows: int = 120,
  cols: int = 160,
  fps: int = 25,
  seed: int = 0,
):
  """One clip, uint8 `[frames, rows, cols, 3]`; the same arguments give the same bytes.

  Raises:
    ValueError: for a class that is not in `LOOKS`.
  """
  if name not in LOOKS:
    raise ValueError(f"no class {name!r} is drawn here; known: {', '.join(LOOKS)}.")
  look, key = LOOKS[name], zlib.crc32(name.encode())
  by_group, by_clip = (
    np.random.default_rng([seed, key, group]),
    np.random.default_rng([seed, key, group, clip]),
  )
  palette = _palette(look, by_group)
  frequency, angle = (
    look.frequency * by_group.uniform(0.88, 1.12),
    look.angle + by_group.uniform(-0.35, 0.35),
  )
  speed = look.speed * by_clip.uniform(0.75, 1.25) * by_clip.choice([-1, 1])
  aspect = cols / rows
  center = (aspect * by_clip.uniform(0.38, 0.62), by_clip.uniform(0.38, 0.62))
  phase = (by_clip.uniform(), by_clip.uniform())
  scene = Scene(frequency, angle, speed, phase, center, by_clip.uniform(0.85, 1.2))
  v = ((np.arange(rows, dtype=np.float32) + 0.5) / rows)[None, :, None]
  u = ((np.arange(cols, dtype=np.float32) + 0.5) / rows)[None, None, :]
  t = (np.arange(frames, dtype=np.float32) / fps)[:, None, None]
  field = np.broadcast_to(look.field(scene, u, v, t), (frames, rows, cols))
  return palette[np.clip(field * 255 + 0.5, 0, 255).astype(np.uint8)]


def _palette(look: Look, rng) -> np.ndarray:
  """uint8 `[256, 3]`: the class's stops, each moved a little, joined by straight lines."""
  stops = np.asarray(look.palette, np.float64) * rng.uniform(0.88, 1.08) + rng.uniform(
    -14, 14, (len(look.palette), 3)
  )
  at = np.linspace(0, 1, len(stops))
  channels = [np.interp(np.linspace(0, 1, 256), at, stops[:, c]) for c in range(3)]
  return np.clip(np.stack(channels, -1) + 0.5, 0, 255).astype(np.uint8)


def write_avi(path, video: np.ndarray, fps: int = 25) -> None:
  """Writes uint8 `[t, y, x, 3]` as XviD-tagged MPEG-4 .avi, bit-exact between runs; y and x must be even."""
  import av  # only files need it: clips that are rendered into memory do not

  with av.open(str(path), "w", format="avi", options={"fflags": "+bitexact"}) as container:
    stream = container.add_stream("mpeg4", rate=fps)
    stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
    stream.codec_tag = "XVID"
    stream.options = {"flags": "+bitexact", "qmin": "2", "qmax": "4"}
    stream.thread_count = (
      1  # Clips run in parallel; slices would also make the bytes depend on the machine.
    )
    stream.bit_rate = 2_000_000
    for image in video:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode())


def _frames(index: int, seed: int) -> int:
  """40 to 90, and fewer than 40 for one clip in `SHORT_EVERY`."""
  rng = np.random.default_rng([seed, index])
  return int(rng.integers(14, 36) if index % SHORT_EVERY == 5 else rng.integers(40, 91))


def _relative(name: str, group: int, clip: int) -> str:
  return f"{name}/v_{name}_g{group:02d}_c{clip:02d}.avi"


def _write_lists(
  folder: pathlib.Path, names: list[str], clips: list[tuple[str, int, int]], groups: int
) -> None:
  """The three splits; like the official ones each tests on other groups, about 28 % of them (7 of 25)."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
  tested = max(1, round(0.28 * groups))
  for split in range(3):
    held = {(split * tested + i) % groups + 1 for i in range(tested)}
    train = [f"{_relative(*c)} {names.index(c[0]) + 1}\n" for c in clips if c[1] not in held]
    test = [f"{_relative(*c)}\n" for c in clips if c[1] in held]
    (folder / f"trainlist{split + 1:02d}.txt").write_text("".join(train))
    (folder / f"testlist{split + 1:02d}.txt").write_text("".join(test))


def _prepare(root: pathlib.Path, wanted: dict) -> bool:
  """Whether there is something to render; empties an unfinished or different set, refuses to touch one it did not make."""
  complete, begun = root / ".complete", root / ".rendering"
  if complete.exists() and json.loads(complete.read_text()) == wanted:
    return False
  held = [root / "UCF-101", root / "ucfTrainTestlist"]
  if any(p.exists() for p in held) and not (complete.exists() or begun.exists()):
    raise FileExistsError(
      f"{root} holds a data set that was not rendered here; render into another folder."
    )
  root.mkdir(parents=True, exist_ok=True)
  begun.write_text("")
  complete.unlink(missing_ok=True)
  for path in held:
    shutil.rmtree(path, ignore_errors=True)
  return True


def render_ucf101(
  root, classes=8, groups=5, clips_per_group=4, rows=120, cols=160, fps=25, seed=0, progress=True
) -> None:  # fmt: skip
  """Renders `classes * groups * clips_per_group` clips below `root`, and one that cannot be decoded.

  The broken clip is the last of the first class's last group and stands in trainlist01, because a data path must name what
  it cannot read. `root/.complete` holds the parameters: an existing set with the same ones is kept, another is replaced.

  Args:
    root: folder; `UCF-101/` and `ucfTrainTestlist/` appear in it.
    classes: how many of `LOOKS`, from the first, 1 to 10; ids follow the alphabet, as in classInd.
    groups: at least 2, so that train and test share none.
    rows, cols: even.

  Raises:
    ValueError: for a parameter outside these.
    FileExistsError: if `root` holds a data set that was not rendered here.
  """
  if (
    not 1 <= classes <= len(LOOKS)
    or not 2 <= groups <= 99
    or not 1 <= clips_per_group <= 98
    or rows % 2
    or cols % 2
  ):
    raise ValueError(
      f"render_ucf101 needs 1 <= classes <= {len(LOOKS)}, 2 <= groups <= 99, 1 <= clips_per_group <= 98 and even rows, "
      f"cols; got {classes=}, {groups=}, {clips_per_group=}, {rows=}, {cols=}."
    )
  root = pathlib.Path(root)
  wanted = dict(version=VERSION, classes=classes, groups=groups, clips_per_group=clips_per_group)
  wanted |= dict(rows=rows, cols=cols, fps=fps, seed=seed)
  if not _prepare(root, wanted):
    return
  names = sorted(list(LOOKS)[:classes])
  clips = [
    (n, g, c) for n in names for g in range(1, groups + 1) for c in range(1, clips_per_group + 1)
  ]
  for name in names:
    (root / "UCF-101" / name).mkdir(parents=True)

  def one(index):
    name, group, clip = clips[index]
    video = render_clip(name, group, clip, _frames(index, seed), rows, cols, fps, seed)
    write_avi(root / "UCF-101" / _relative(name, group, clip), video, fps)

  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    list(
      tqdm(
        pool.map(one, range(len(clips))),
        "rendering clips",
        len(clips),
        disable=not progress,
        leave=False,
      )
    )
  broken = (names[0], groups, clips_per_group + 1)
  whole = (root / "UCF-101" / _relative(*clips[0])).read_bytes()
  (root / "UCF-101" / _relative(*broken)).write_bytes(
    whole[:2048]
  )  # An interrupted download: it ends inside the header.
  _write_lists(root / "ucfTrainTestlist", names, sorted([*clips, broken]), groups)
  (root / ".complete").write_text(json.dumps(wanted))
  (root / ".rendering").unlink()
