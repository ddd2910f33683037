"""Trains the convnet of `freqformer/evaluate/motion_net.py` on random textures in random motion.

  python -m benchmarks.trained.motion_net [--clips=8000] [--steps=1600] [--seed=0]

About six minutes of one core. Writes freqformer/evaluate/weights/motionnet.npz (float16) and the
row `motion_net` of benchmarks/results/motion_net.json: R^2 of every target on held-out clips.

A clip is a picture looked up at moving coordinates. Pictures are noise of some band and direction,
gratings, dots, or any of them thresholded; coordinates are shifted, turned, spread, sheared or
bent, steadily or to and fro; polar coordinates give rings and spokes; or a few discs move over a
picture. Some clips are frozen, shuffled, cross-faded or new in every frame.
"""

import dataclasses
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from scipy import ndimage
from tqdm import tqdm

from benchmarks.rows import context, write_rows
from freqformer.command import cli
from freqformer.evaluate import motion_net
from freqformer.evaluate.motion_net import FRAMES, SIDE, TARGETS

PICTURE = 128  # pixels of a periodic picture, both ways
PERIOD = 2.0  # frame sides that it covers
COARSE = 12  # places a side where the velocity is averaged
HELD_OUT = 1024  # clips that R^2 is measured on
BATCH = 16
_KINDS = ("affine", "bent", "polar", "discs")
_FATES = ("moves", "frozen", "shuffled", "fades", "boils")
# choice: most clips move as they are; an eighth of them has no order at all.
_SHARES = (0.62, 0.08, 0.12, 0.09, 0.09)
_OF_MOTION = ("across", "down", "speed", "divergence", "rotation", "oscillation", "unsteadiness")


@dataclasses.dataclass
class Motion:
  """Coordinates of a picture over time, and the velocity that they show.

  Attributes:
    coordinates: `f(t, u, v) -> (a, b)`, in frame sides, t in clips.
    velocity: `f(t, u, v) -> (across, down)`.
    cycles: per clip, 0 if steady.
  """

  coordinates: object
  velocity: object
  cycles: float


# ---- pictures ------------------------------------------------------------------------------------


def picture(rng: np.random.Generator) -> np.ndarray:
  """Returns a random periodic picture, float32 `[PICTURE, PICTURE]`, mean 0 and deviation 1."""
  k = np.fft.fftfreq(PICTURE, 1 / PICTURE)
  ky, kx = k[:, None], k[None, :]
  kind = rng.choice(["band", "cloud", "grating", "dots"], p=[0.35, 0.15, 0.35, 0.15])
  if kind == "grating":
    x = _gratings(rng)
  else:
    source = rng.normal(size=(PICTURE, PICTURE))
    radius = np.hypot(ky, kx)
    if kind == "band":
      center = 2 ** rng.uniform(1.0, 4.3)  # cycles per PERIOD
      envelope = np.exp(-((np.log2(np.maximum(radius, 0.5) / center) / rng.uniform(0.2, 1.0)) ** 2))
      turn = np.arctan2(ky, kx) - rng.uniform(0, math.pi)
      envelope = envelope * np.exp(rng.choice([0, rng.uniform(0, 6)]) * (np.cos(2 * turn) - 1))
    elif kind == "cloud":
      envelope = np.maximum(radius, 1) ** -rng.uniform(1.2, 2.5) * (radius < 24) * (radius > 0)
    else:
      source = rng.uniform(size=source.shape) < rng.uniform(0.0005, 0.006)
      envelope = np.exp(-((radius * rng.uniform(0.012, 0.08)) ** 2))
    x = np.fft.ifft2(np.fft.fft2(source) * envelope).real
  x = (x - x.mean()) / (x.std() + 1e-6)
  return _toned(x, rng).astype(np.float32)


def _gratings(rng) -> np.ndarray:
  """Returns a sum or a product of one to three sine waves of whole periods."""
  place = np.arange(PICTURE) * (2 * math.pi / PICTURE)
  parts = []
  for _ in range(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])):
    cycles = 2 ** rng.uniform(1.0, 4.0)
    turn = rng.uniform(0, math.pi)
    wave = np.rint([cycles * math.sin(turn), cycles * math.cos(turn)])
    if not wave.any():
      wave[rng.integers(2)] = 2
    phase = wave[0] * place[:, None] + wave[1] * place[None, :]
    parts.append(np.sin(phase + rng.uniform(0, 2 * math.pi)))
  return np.prod(parts, 0) if rng.uniform() < 0.5 else np.sum(parts, 0)


def _toned(x, rng) -> np.ndarray:
  """Returns a picture after a random tone curve: none, steep, folded, or lights alone."""
  curve = rng.choice(["none", "steep", "fold", "lights"], p=[0.45, 0.25, 0.1, 0.2])
  if curve == "steep":
    x = np.tanh(rng.uniform(0.8, 4) * (x - rng.uniform(-0.7, 0.7)))
  elif curve == "fold":
    x = np.sin(rng.uniform(0.8, 1.6) * x + rng.uniform(0, 2 * math.pi))
  elif curve == "lights":
    x = np.exp(np.clip(rng.uniform(0.4, 1.2) * x, -4, 4))
  x = x * rng.choice([-1, 1])
  return (x - x.mean()) / (x.std() + 1e-6)


# ---- motions -------------------------------------------------------------------------------------


def _course(rng):
  """Returns functions of t, a course that ends near 1 and its rate, and its cycles per clip.

  Steady, speeding up, to and fro, or in hops.
  """
  kind = rng.choice(["steady", "faster", "sway", "hop"], p=[0.5, 0.08, 0.32, 0.1])
  if kind == "steady":
    return (lambda t: t), (lambda t: np.ones_like(t)), 0.0
  if kind == "faster":
    bend = rng.uniform(-0.8, 0.8)
    return (lambda t: t + bend * t * (t - 1)), (lambda t: 1 + bend * (2 * t - 1)), 0.0
  cycles = 2 ** rng.uniform(-0.5, 2.0)
  # As fast at its fastest as a steady course, or faster.
  size = rng.uniform(0.8, 2) / (2 * math.pi * cycles)
  phase = rng.uniform(0, 2 * math.pi)
  w = 2 * math.pi * cycles
  if kind == "sway":
    return (
      (lambda t: size * np.sin(w * t + phase)),
      (lambda t: size * w * np.cos(w * t + phase)),
      cycles,
    )
  return (
    (lambda t: 2 * size * np.abs(np.sin(w * t / 2 + phase))),
    (lambda t: size * w * np.cos(w * t / 2 + phase) * np.sign(np.sin(w * t / 2 + phase))),
    cycles,
  )


def affine(rng) -> Motion:
  """Returns a motion of one or two of shift, turn, spread and shear."""
  at, rate, cycles = _course(rng)
  parts = set(rng.choice(["shift", "turn", "spread", "shear"], rng.choice([1, 2], p=[0.6, 0.4])))
  matrix = np.zeros((2, 2))
  shift = np.zeros(2)
  if "shift" in parts:
    way = rng.uniform(0, 2 * math.pi)
    shift = 2 ** rng.uniform(-4, 0.5) * np.array([math.cos(way), math.sin(way)])
  if "turn" in parts:
    matrix += _signed(rng, 0.15, 3.0) * np.array([[0, -1], [1, 0]])
  if "spread" in parts:
    matrix += _signed(rng, 0.1, 1.0) * np.eye(2)
  if "shear" in parts:
    way = rng.uniform(0, math.pi)
    across = np.array([[math.cos(way), math.sin(way)], [math.sin(way), -math.cos(way)]])
    matrix += _signed(rng, 0.1, 0.8) * across
  center = rng.uniform(-0.3, 0.3, 2)

  def coordinates(t, u, v):
    inverse = np.stack([_exponential(-matrix * s) for s in at(t).ravel()])
    inverse = inverse.reshape(*t.shape, 2, 2)
    x = u - center[0] - shift[0] * at(t)
    y = v - center[1] - shift[1] * at(t)
    return (
      inverse[..., 0, 0] * x + inverse[..., 0, 1] * y,
      inverse[..., 1, 0] * x + inverse[..., 1, 1] * y,
    )

  def velocity(t, u, v):
    x = u - center[0] - shift[0] * at(t)
    y = v - center[1] - shift[1] * at(t)
    return (
      rate(t) * (shift[0] + matrix[0, 0] * x + matrix[0, 1] * y),
      rate(t) * (shift[1] + matrix[1, 0] * x + matrix[1, 1] * y),
    )

  return Motion(coordinates, velocity, cycles)


def _exponential(m: np.ndarray) -> np.ndarray:
  """Returns the exponential of a 2 x 2 matrix: of its trace, and of the rest, whose square is s."""
  half = np.trace(m) / 2
  rest = m - half * np.eye(2)
  s = -np.linalg.det(rest)
  root = math.sqrt(abs(s))
  if root < 1e-9:
    return math.exp(half) * (np.eye(2) + rest)
  if s > 0:
    return math.exp(half) * (math.cosh(root) * np.eye(2) + math.sinh(root) / root * rest)
  return math.exp(half) * (math.cos(root) * np.eye(2) + math.sin(root) / root * rest)


def bent(rng) -> Motion:
  """Returns a drift whose waves, running across it, bend the picture."""
  size = rng.uniform(0.02, 0.09)
  waves = 2 ** rng.uniform(-0.5, 1.2, 2)
  speeds = 2 * math.pi * rng.uniform(-2, 2, 2)
  phases = rng.uniform(0, 2 * math.pi, 2)
  drift = rng.choice([0.0, 1.0]) * rng.uniform(-0.6, 0.6, 2)

  def coordinates(t, u, v):
    return (
      u - drift[0] * t + size * np.sin(2 * math.pi * waves[0] * v + speeds[0] * t + phases[0]),
      v - drift[1] * t + size * np.sin(2 * math.pi * waves[1] * u + speeds[1] * t + phases[1]),
    )

  return Motion(coordinates, _numerical(coordinates), 0.0)


def _numerical(coordinates):
  """Returns the velocity at which coordinates stay the same: -(dq/dp)^-1 dq/dt, by differences."""
  step = 1e-3

  def velocity(t, u, v):
    def slope(dt, du, dv):
      after = coordinates(t + dt, u + du, v + dv)
      before = coordinates(t - dt, u - du, v - dv)
      return [(x - y) / (2 * step) for x, y in zip(after, before, strict=True)]

    at, bt = slope(step, 0, 0)
    au, bu = slope(0, step, 0)
    av, bv = slope(0, 0, step)
    det = au * bv - av * bu
    det = np.where(np.abs(det) < 0.2, 0.2, det)
    return (av * bt - bv * at) / det, (bu * at - au * bt) / det

  return velocity


def polar(rng) -> Motion:
  """Returns rings that run, spokes that turn, or both, around a place near the middle."""
  at, rate, cycles = _course(rng)
  center = rng.uniform(-0.2, 0.2, 2)
  outward = _signed(rng, 0.1, 1.0) * rng.choice([0, 1], p=[0.4, 0.6])
  turn = _signed(rng, 0.2, 3.0) * (rng.choice([0, 1]) if outward else 1)
  spokes = int(rng.integers(0, 7))
  rings = rng.uniform(0.2, 1.2)
  if not outward:
    spokes = max(spokes, 2)

  def coordinates(t, u, v):
    x = u - center[0]
    y = v - center[1]
    r = np.sqrt(x * x + y * y + 0.002)
    angle = (np.arctan2(y, x) - turn * at(t)) / (2 * math.pi)
    # Spokes repeat with the picture, so that the angle has no seam.
    return rings * (r - outward * at(t)), spokes * PERIOD / 2 * angle * 2

  def velocity(t, u, v):
    x = u - center[0]
    y = v - center[1]
    r = np.sqrt(x * x + y * y + 0.002)
    return (
      rate(t) * (outward * x / r - turn * y * (spokes > 0)),
      rate(t) * (outward * y / r + turn * x * (spokes > 0)),
    )

  return Motion(coordinates, velocity, cycles)


def _signed(rng, least: float, most: float) -> float:
  """Returns a number of either sign whose magnitude is log-uniform."""
  return rng.choice([-1, 1]) * math.exp(rng.uniform(math.log(least), math.log(most)))


# ---- clips ---------------------------------------------------------------------------------------


def _axes(size: int):
  """Returns t, u, v that broadcast to `[FRAMES, size, size]`."""
  t = ((np.arange(FRAMES) + 0.5) / FRAMES)[:, None, None]
  place = (np.arange(size) + 0.5) / size - 0.5
  return t, place[None, None, :], place[None, :, None]


def _looked_up(image: np.ndarray, a, b) -> np.ndarray:
  """Returns a picture at coordinates in frame sides, `[FRAMES, SIDE, SIDE]`."""
  shape = (FRAMES, SIDE, SIDE)
  at = [np.broadcast_to(c, shape) * (PICTURE / PERIOD) for c in (b, a)]
  return ndimage.map_coordinates(image, at, np.float32, order=1, mode="grid-wrap")


def _discs(rng):
  """Returns a clip of one to five discs over a picture, their velocity, and cycles."""
  t, u, v = _axes(SIDE)
  ct, cu, cv = _axes(COARSE)
  clip = rng.uniform(0, 1) * _looked_up(picture(rng), u, v)
  flow = np.zeros((2, FRAMES, COARSE, COARSE))
  cycles = 0.0
  for _ in range(rng.integers(1, 6)):
    at, rate, cycles = _course(rng)
    start = rng.uniform(-0.45, 0.45, 2)
    way = rng.uniform(0, 2 * math.pi)
    speed = 2 ** rng.uniform(-3, 0.7) * np.array([math.cos(way), math.sin(way)])
    radius = rng.uniform(0.06, 0.2)
    soft = rng.uniform(0.01, 0.06)
    tone = rng.choice([-1, 1]) * rng.uniform(1.5, 3)

    def mask(t, u, v, start=start, speed=speed, radius=radius, soft=soft, at=at):
      x = (u - start[0] - speed[0] * at(t) + 0.7) % 1.4 - 0.7
      y = (v - start[1] - speed[1] * at(t) + 0.7) % 1.4 - 0.7
      return 1 / (1 + np.exp(np.clip((np.hypot(x, y) - radius) / soft, -30, 30)))

    here = mask(t, u, v)
    clip = (1 - here) * clip + here * tone
    there = mask(ct, cu, cv)
    flow = (1 - there) * flow + there * speed[:, None, None, None] * rate(ct)
  return clip, flow, cycles


def clip_and_targets(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
  """Renders a clip and its targets, a function of the arguments.

  Returns:
    clip: float32 `[FRAMES, SIDE, SIDE]`, mean 0 and deviation 1.
    targets: float32 `[len(TARGETS)]`; NaN where there is no such thing.
  """
  rng = np.random.default_rng([seed, index])
  kind = rng.choice(_KINDS, p=[0.45, 0.13, 0.25, 0.17])
  fate = rng.choice(_FATES, p=_SHARES)
  t, u, v = _axes(SIDE)
  if kind == "discs":
    clip, flow, cycles = _discs(rng)
  else:
    motion = {"affine": affine, "bent": bent, "polar": polar}[kind](rng)
    image = picture(rng)
    a, b = motion.coordinates(t, u, v)
    clip = _looked_up(image, a, b)
    flow = np.stack(np.broadcast_arrays(*motion.velocity(*_axes(COARSE))))
    flow = np.broadcast_to(flow, (2, FRAMES, COARSE, COARSE))
    cycles = motion.cycles
  coherence = 1.0
  if fate == "frozen":
    clip = np.repeat(clip[rng.integers(FRAMES)][None], FRAMES, 0)
    flow = np.zeros_like(flow)
    cycles = 0.0
  elif fate == "shuffled":
    clip = clip[rng.permutation(FRAMES)]
    coherence = 0.0
  elif fate == "fades" and kind != "discs":
    # Another picture that moves alike comes in as the first goes out.
    rate = rng.uniform(0.5, 3)
    weight = 0.5 + 0.5 * np.sin(2 * math.pi * (rate * t + rng.uniform()))
    clip = np.sqrt(1 - weight) * clip + np.sqrt(weight) * _looked_up(picture(rng), a, b)
    coherence = 1 / (1 + rate)
  elif fate == "boils":
    keep = rng.uniform(0, 0.95)
    coherence = keep if rng.uniform() < 0.5 else 0.0
    held = _boiling(rng, keep if coherence else 0.0)
    clip = held if kind == "discs" else math.sqrt(keep) * clip + math.sqrt(1 - keep) * held
    cycles = 0.0
  clip = _degraded(clip, rng)
  targets = _moments(flow, cycles) | _texture(clip)
  targets["coherence"] = coherence
  if coherence < 0.5:
    for name in (
      "across",
      "down",
      "divergence",
      "rotation",
      "oscillation",
      "unsteadiness",
      "speed",
    ):
      targets[name] = np.nan
  return clip, np.array([targets[name] for name in TARGETS], np.float32)


def _boiling(rng, keep: float) -> np.ndarray:
  """Returns frames of new pictures, of each of which the next frame keeps a part."""
  _, u, v = _axes(SIDE)
  fresh = [_looked_up(picture(rng), u, v)[0] for _ in range(4)]
  frames = [fresh[0]]
  for i in range(1, FRAMES):
    # Four pictures at other places each time are as good as sixteen, and cheaper.
    new = np.roll(fresh[i % 4], (17 * i, 11 * i), (0, 1))
    frames.append(keep * frames[-1] + math.sqrt(1 - keep**2) * new)
  return np.stack(frames)


def _degraded(clip, rng) -> np.ndarray:
  """Returns a clip after light that falls off to a side, blur and noise; standardised."""
  clip = (clip - clip.mean()) / (clip.std() + 1e-6)
  _, u, v = _axes(SIDE)
  if rng.uniform() < 0.4:
    slope = rng.normal(size=2) * rng.uniform(0, 2)
    clip = clip + slope[0] * u + slope[1] * v
  if rng.uniform() < 0.4:
    blur = rng.uniform(0.3, 1.3)  # pixels
    clip = ndimage.gaussian_filter(clip, (rng.uniform(0, 0.5), blur, blur), mode="nearest")
  if rng.uniform() < 0.5:
    clip = clip + rng.uniform(0, 0.15) * rng.normal(size=clip.shape)
  return motion_net.standardised(clip[None])[0]


def _moments(flow: np.ndarray, cycles: float) -> dict[str, float]:
  """Returns targets of the velocity `[across or down, t, y, x]`."""
  place = (np.arange(COARSE) + 0.5) / COARSE - 0.5
  square = (place**2).mean()
  by_u = (flow * place).mean((1, 2, 3)) / square
  by_v = (flow * place[:, None]).mean((1, 2, 3)) / square
  rms = math.sqrt((flow**2).sum(0).mean())
  varying = math.sqrt(flow.var(1).sum(0).mean())
  return {
    "across": flow[0].mean(),
    "down": flow[1].mean(),
    "speed": math.log10(rms + 0.03),
    "divergence": by_u[0] + by_v[1],
    "rotation": by_u[1] - by_v[0],
    "oscillation": cycles,
    "unsteadiness": varying / (rms + 0.03),
  }


def _texture(clip: np.ndarray) -> dict[str, float]:
  """Returns targets of a clip's pictures, by differences over 2 x 2 pixels of every second frame.

  Both slopes are of the same places: one-sided differences of noise are correlated.
  """
  frames = clip[::2]
  across = frames[:, :, 1:] - frames[:, :, :-1]
  down = frames[:, 1:] - frames[:, :-1]
  gx = (across[:, 1:] + across[:, :-1]) / 2
  gy = (down[:, :, 1:] + down[:, :, :-1]) / 2
  xx = (gx**2).mean()
  yy = (gy**2).mean()
  xy = (gx * gy).mean()
  both = xx + yy + 1e-9
  cos = (xx - yy) / both
  sin = 2 * xy / both
  deviation = frames.std((1, 2)).mean() + 1e-6
  length = np.sqrt(gx**2 + gy**2)
  return {
    "orientation_cos": cos,
    "orientation_sin": sin,
    "frequency": math.log2(math.sqrt(both) * SIDE / (2 * math.pi * deviation) + 0.3),
    "isotropy": 1 - math.hypot(cos, sin),
    "edges": (length > 2 * math.sqrt(both)).mean(),
  }


def render(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns clips, float16 `[count, FRAMES, SIDE, SIDE]`, and targets `[count, len(TARGETS)]`."""
  clips = np.empty((count, FRAMES, SIDE, SIDE), np.float16)
  targets = np.empty((count, len(TARGETS)), np.float32)
  for i in tqdm(range(count), "rendering", leave=False):
    clips[i], targets[i] = clip_and_targets(seed, i)
  return clips, targets


# ---- training ------------------------------------------------------------------------------------

# Sign of each target when a clip is mirrored left to right, turned upside down, or run backwards.
_ORDER = list(TARGETS)


def _signs(*changed: str) -> np.ndarray:
  return np.array([-1 if name in changed else 1 for name in _ORDER], np.float32)


_MIRRORED = _signs("across", "rotation", "orientation_sin")
_OVERTURNED = _signs("down", "rotation", "orientation_sin")
_BACKWARDS = _signs("across", "down", "divergence", "rotation")


def augmented(clips, targets, rng) -> tuple[np.ndarray, np.ndarray]:
  """Returns clips mirrored, overturned, run backwards or inverted by coins, and their targets."""
  clips = clips.astype(np.float32)
  targets = targets.copy()
  for axis, signs in ((3, _MIRRORED), (2, _OVERTURNED), (1, _BACKWARDS)):
    coin = rng.uniform(size=len(clips)) < 0.5
    clips[coin] = np.flip(clips[coin], axis)
    targets[coin] *= signs
  clips *= rng.choice(np.float32([-1, 1]), (len(clips), 1, 1, 1))
  return clips, targets


def train(clips, targets, steps: int, seed: int) -> dict:
  """Returns parameters whose head gives targets in their own units."""
  mean = np.nanmean(targets, 0)
  deviation = np.nanstd(targets, 0)
  schedule = optax.warmup_cosine_decay_schedule(0, 2e-3, min(200, steps // 4), steps)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-3))
  params = motion_net.init(jax.random.key(seed))

  def loss_of(params, clips, targets):
    error = motion_net.regress(params, motion_net.network(params, clips)) - targets
    there = ~jnp.isnan(targets)
    return jnp.where(there, optax.huber_loss(jnp.where(there, error, 0)), 0).sum() / there.sum()

  @jax.jit
  def step(params, state, clips, targets):
    loss, gradients = jax.value_and_grad(loss_of)(params, clips, targets)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  state = optimizer.init(params)
  rng = np.random.default_rng(seed)
  losses = []
  bar = tqdm(range(steps), "training", leave=False)
  for _ in bar:
    chosen = rng.integers(0, len(clips), BATCH)
    batch, wanted = augmented(clips[chosen], targets[chosen], rng)
    params, state, loss = step(params, state, batch, (wanted - mean) / deviation)
    losses.append(float(loss))
    bar.set_postfix(loss=np.mean(losses[-100:]))
  params = {name: np.asarray(value) for name, value in params.items()}
  params["head"] = params["head"] * deviation
  params["bias"] = params["bias"] * deviation + mean
  return params


def r_squared(params, clips, targets) -> dict[str, float]:
  """Returns 1 - squared error over variance for each target."""
  found = motion_net.features_of(clips.astype(np.float32), params) @ params["head"]
  error = found + params["bias"] - targets
  share = np.nanmean(error**2, 0) / np.nanvar(targets, 0)
  return {name: round(float(1 - x), 4) for name, x in zip(TARGETS, share, strict=True)}


def main(_):
  clock = time.monotonic()
  command = (
    f"python -m benchmarks.trained.motion_net --clips={_CLIPS.value} --steps={_STEPS.value} "
    f"--seed={_SEED.value}"
  )
  here = context(command)  # of the code that runs, whatever is edited meanwhile
  clips, targets = render(_SEED.value, _CLIPS.value)
  rendered = time.monotonic() - clock
  logging.info("%d clips in %.0f s", len(clips), rendered)
  params = train(clips, targets, _STEPS.value, _SEED.value)
  half = {name: value.astype(np.float16) for name, value in params.items()}
  path = pathlib.Path(_OUT.value)
  np.savez_compressed(path, **half)
  kept = {name: value.astype(np.float32) for name, value in half.items()}
  scores = r_squared(kept, *render(_SEED.value + 1, HELD_OUT))
  row = {
    "name": "motion_net",
    "clips": len(clips),
    "steps": _STEPS.value,
    "seed": _SEED.value,
    "held_out": HELD_OUT,
    "r_squared": scores,
    "bytes": path.stat().st_size,
    "render_seconds": round(rendered),
    "seconds": round(time.monotonic() - clock),
    "cpu_seconds": round(time.process_time()),
  }
  if _WRITE.value:
    write_rows("motion_net", [here | row], command)
  for name, score in scores.items():
    print(f"{name:<16} {score:6.3f}  {TARGETS[name]}")
  print(f"{path}: {row['bytes']:,} bytes, {row['seconds']} s")


if __name__ == "__main__":
  _CLIPS = flags.DEFINE_integer("clips", 8000, "Clips to train on.", lower_bound=BATCH)
  _STEPS = flags.DEFINE_integer("steps", 1600, "Optimisation steps.", lower_bound=4)
  _SEED = flags.DEFINE_integer("seed", 0, "Seed of clips and parameters.")
  _OUT = flags.DEFINE_string("out", str(motion_net.weights_file()), "File of the weights.")
  _WRITE = flags.DEFINE_bool("write", True, "Write the row.")
  cli.run(main)
