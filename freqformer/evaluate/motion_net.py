"""A small 3-D convnet that sees motion and texture: features of clips with colour removed.

It was trained on random textures that move at random (`python -m benchmarks.trained.motion_net`) to
regress the moments of the velocity field and the texture's statistics, `TARGETS`. Its input is the
luma of 16 frames of 48 x 48 pixels, less the clip's mean and over its deviation: palette,
brightness and contrast of a clip are gone. It knows no object: distances in its features compare
movement and pattern, and are to be reported under its own name, never as FVD of I3D.
"""

import functools
import hashlib
import importlib.resources
import io
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.config import ConfigError

NAME = "motionnet"
FRAMES = 16  # of the input; others are taken or interpolated in equal steps
SIDE = 48  # pixels of the input, both ways
LEAST_FRAMES = 8  # of a video
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
# Regressed in training, in this order. Lengths are in frame sides, times in clips of 16 frames,
# positions from the middle of the frame.
TARGETS = {
  "across": "mean velocity to the right",
  "down": "mean velocity downwards",
  "speed": "log10 of the root mean square velocity plus 0.03",
  "divergence": "slope of the velocity away from the middle",
  "rotation": "slope of the velocity around the middle, clockwise in the picture",
  "oscillation": "cycles per clip of motion to and fro, 0 for steady motion",
  "unsteadiness": "deviation of the velocity over time, as a share of its root mean square",
  "coherence": "share of the picture that motion carries on; 0 for frames in no order",
  "orientation_cos": "structure tensor: (xx - yy) / (xx + yy)",
  "orientation_sin": "structure tensor: 2 xy / (xx + yy)",
  "frequency": "log2 of cycles per side: root mean square gradient over deviation, by 2 pi",
  "isotropy": "1 - length of the two orientation values",
  "edges": "share of pixels whose gradient exceeds twice the root mean square",
}
_CHANNELS = 24  # of the last layer
_GRID = 12  # places a side where structure tensors are averaged
MOMENTS = 5  # per channel: mean, moment across and down, deviation, deviation over time
FEATURES = MOMENTS * _CHANNELS

# Kernels (t, y, x, in, out) and strides (t, y, x); a layer of equal ends adds its input. The first
# two see one frame; the third also sees the structure tensors.
_SCALES = (1, 2, 4)  # pixels of the input to one of a tensor's
_TENSORS = 7 * len(_SCALES)
_LAYERS = (
  ((1, 5, 5, 1, 12), (1, 2, 2)),
  ((1, 3, 3, 12, 16), (1, 2, 2)),
  ((3, 3, 3, 16 + _TENSORS, 32), (2, 2, 2)),
  ((3, 3, 3, 32, 32), (1, 1, 1)),
  ((3, 3, 3, 32, 48), (2, 1, 1)),
  ((3, 3, 3, 48, _CHANNELS), (1, 1, 1)),
)
_MEETING = 2  # layer before which the tensors join
_BATCH = 32  # clips that are evaluated together

Params = Mapping[str, jax.Array]


def init(key: jax.Array) -> dict[str, jax.Array]:
  """Returns random parameters, float32: `w0`, `b0`, ... of the layers, `head` and `bias`."""
  params = {}
  for i, (shape, _) in enumerate(_LAYERS):
    scale = np.sqrt(2 / np.prod(shape[:4]))
    params[f"w{i}"] = scale * jax.random.normal(jax.random.fold_in(key, i), shape)
    params[f"b{i}"] = jnp.zeros(shape[-1])
  params["head"] = jnp.zeros((FEATURES, len(TARGETS)))
  params["bias"] = jnp.zeros(len(TARGETS))
  return params


def network(params: Params, x: jax.Array) -> jax.Array:
  """Returns features `[b, FEATURES]` of clips `[b, FRAMES, SIDE, SIDE]` made by `prepare`.

  The last map is averaged over frames and places in five ways, `MOMENTS`. The moments across and
  down keep what averages lose: the velocity of an expansion or a rotation has no mean.
  """
  tensors = jnp.concatenate([_structure(x, scale) for scale in _SCALES], -1)
  x = x[..., None]
  for i, (_, stride) in enumerate(_LAYERS):
    if i == _MEETING:
      x = jnp.concatenate([x, tensors], -1)
    y = _convolve(x, params[f"w{i}"], stride) + params[f"b{i}"]
    if y.shape == x.shape:
      y = y + x
    x = jax.nn.silu(y)
  place = (jnp.arange(x.shape[2]) + 0.5) / x.shape[2] - 0.5
  mean = x.mean((1, 2, 3))
  by_time = x.mean((2, 3))
  moments = [
    mean,
    4 * (x * place[:, None]).mean((1, 2, 3)),
    4 * (x * place[:, None, None]).mean((1, 2, 3)),
    _deviation(x, (1, 2, 3)),
    _deviation(by_time, 1),
  ]
  return jnp.concatenate(moments, -1)


def _structure(clips: jax.Array, scale: int) -> jax.Array:
  """Returns the structure tensor of space and time, `[b, FRAMES, 12, 12, 7]`.

  Products of the three derivatives (means of differences over cubes of 2 x 2 x 2), averaged over
  blocks of a quarter as many places, over their trace; and the logarithm of the trace. What moves
  at velocity v has `g_t = -v . grad`: a convnet learns the quotient, hardly the products.
  """
  b, t, side, _ = clips.shape
  x = clips.reshape(b, t, side // scale, scale, side // scale, scale).mean((3, 5))
  x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 1)), mode="edge")
  parts = []
  for axis in (1, 2, 3):
    y = x
    for other in (1, 2, 3):
      low = jax.lax.slice_in_dim(y, 0, y.shape[other] - 1, axis=other)
      high = jax.lax.slice_in_dim(y, 1, y.shape[other], axis=other)
      y = high - low if other == axis else (high + low) / 2
    parts.append(y)
  gt, gy, gx = parts
  products = jnp.stack([gx * gx, gy * gy, gt * gt, gx * gy, gx * gt, gy * gt], -1)
  block = side // scale // _GRID
  products = products.reshape(b, t, _GRID, block, _GRID, block, -1).mean((3, 5))
  trace = products[..., :3].sum(-1, keepdims=True) + 1e-4
  return jnp.concatenate([products / trace, jnp.log(trace) / 4], -1)


def _convolve(x: jax.Array, w: jax.Array, stride: Sequence[int]) -> jax.Array:
  """Convolves `[b, t, y, x, c]` in three dimensions, zeros around.

  As a convolution of frames whose channels are those of all taps in time: XLA's own convolution of
  three dimensions has a derivative 14 times as slow on a CPU.
  """
  taps, *_, channels = w.shape
  before = taps // 2
  padded = jnp.pad(x, ((0, 0), (before, before), (0, 0), (0, 0), (0, 0)))
  frames = [padded[:, i : i + x.shape[1] : stride[0]] for i in range(taps)]
  x = jnp.concatenate(frames, -1)
  w = w.transpose(1, 2, 0, 3, 4).reshape(*w.shape[1:3], -1, channels)
  out = jax.lax.conv_general_dilated(
    x.reshape(-1, *x.shape[2:]), w, stride[1:], "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  return out.reshape(*x.shape[:2], *out.shape[1:])


def _deviation(x: jax.Array, axes) -> jax.Array:
  return jnp.sqrt(x.var(axes) + 1e-6)


def regress(params: Params, features: jax.Array) -> jax.Array:
  """Returns the targets `[b, len(TARGETS)]` in units of their deviation in training."""
  return features @ params["head"] + params["bias"]


# ---- from videos to features ---------------------------------------------------------------------


def prepare(videos: np.ndarray, mix: np.ndarray = LUMA) -> np.ndarray:
  """Returns the network's input, float32 `[b, FRAMES, SIDE, SIDE]`: grey, mean 0 and deviation 1.

  Frames are squeezed to a square by a triangular filter as wide as a pixel of the input. Of a
  longer video FRAMES frames in equal steps are taken; a shorter one is interpolated.

  Args:
    videos: uint8 `[b, t, y, x, 3]`.
    mix: weights of red, green and blue.

  Raises:
    ConfigError: videos have other axes or fewer than LEAST_FRAMES frames.
  """
  if videos.ndim != 5 or videos.shape[-1] != 3 or videos.shape[1] < LEAST_FRAMES:
    raise ConfigError(
      f"{NAME} takes videos [b, t, y, x, 3] of at least {LEAST_FRAMES} frames, got "
      f"{list(videos.shape)}."
    )
  _, t, rows, cols, _ = videos.shape
  down = resize_matrix(rows, SIDE)
  across = resize_matrix(cols, SIDE).T
  clips = []
  for video in videos:  # one at a time: a float32 copy of them all may not fit
    clip = down @ (video @ mix) @ across
    clips.append(np.tensordot(_times(t), clip, 1))
  return standardised(np.stack(clips))


def standardised(clips: np.ndarray) -> np.ndarray:
  """Returns clips `[b, t, y, x]` with mean 0 and deviation 1 each, float32; a flat clip is 0."""
  x = clips - clips.mean((1, 2, 3), keepdims=True)
  # choice: a tenth of a grey level; less contrast than that is rounding.
  return (x / np.maximum(x.std((1, 2, 3), keepdims=True), 0.1)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def resize_matrix(n: int, size: int) -> np.ndarray:
  """Returns the weights of a triangular filter that resizes an axis, float32 `[size, n]`."""
  scale = max(n / size, 1)  # pixels: no narrower than a pixel of the source
  center = (np.arange(size) + 0.5) * n / size - 0.5
  weights = np.maximum(1 - np.abs(np.arange(n) - center[:, None]) / scale, 0)
  return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _times(t: int) -> np.ndarray:
  """Returns the weights of a video's frames in each frame of the input, float32 `[FRAMES, t]`."""
  at = np.linspace(0, t - 1, FRAMES)
  if t >= FRAMES:
    at = np.rint(at)
  weights = np.maximum(1 - np.abs(np.arange(t) - at[:, None]), 0)
  return weights.astype(np.float32)


@functools.lru_cache(maxsize=1)
def load() -> dict[str, np.ndarray]:
  """Returns the committed parameters, float32."""
  with np.load(io.BytesIO(weights_file().read_bytes())) as data:
    return {name: data[name].astype(np.float32) for name in data}


def weights_hash() -> str:
  """Returns the beginning of the sha256 of the committed weights, hex."""
  return hashlib.sha256(weights_file().read_bytes()).hexdigest()[:12]


def weights_file():
  """Returns the file of the committed weights, in a checkout or a wheel."""
  return importlib.resources.files("freqformer.evaluate") / "weights" / f"{NAME}.npz"


_network = jax.jit(network)


def features_of(clips: np.ndarray, params: Params | None = None) -> np.ndarray:
  """Returns features, float32 `[b, FEATURES]`, of clips made by `prepare`; in batches."""
  params = load() if params is None else params
  found = []
  for start in range(0, len(clips), _BATCH):
    batch = clips[start : start + _BATCH]
    missing = [(0, _BATCH - len(batch)), (0, 0), (0, 0), (0, 0)]  # one shape, one program
    found.append(np.asarray(_network(params, np.pad(batch, missing)))[: len(batch)])
  return np.concatenate(found)


def features(batches: Iterable[np.ndarray]) -> np.ndarray:
  """Returns features, float32 `[n, FEATURES]`, of videos in batches uint8 `[b, t, y, x, 3]`."""
  return np.concatenate([features_of(prepare(videos)) for videos in batches])
