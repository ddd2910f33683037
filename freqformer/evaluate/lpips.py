"""LPIPS (Zhang et al., arXiv 1801.03924, v0.1 with AlexNet) from a weights file.

Nothing is downloaded. The user brings the file, an .npz under torchvision's and LPIPS's own names.
Where torch and lpips are installed, this writes it:

  net = torchvision.models.alexnet(weights="DEFAULT").state_dict()
  trained = lpips.LPIPS(net="alex").state_dict()
  arrays = {k: v.numpy() for k, v in net.items() if k.startswith("features")}
  arrays |= {k: v.numpy() for k, v in trained.items() if k.startswith("lin")}
  np.savez("lpips_alex.npz", **arrays)

Not checked against the original's own numbers: its weights are not here.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.config import ConfigError

SMALLEST = 31  # pixels a side: below, the second pooling has nothing to pool
_CHANNELS = (3, 64, 192, 384, 256, 256)  # of the input and of the five depths
# Of LPIPS's input, which lies in [-1, 1]; per colour channel.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


@dataclasses.dataclass(frozen=True)
class _Layer:
  """A convolution of AlexNet; lengths are in pixels."""

  number: int  # in `features` of the weights file
  kernel: int
  stride: int
  padding: int
  pooled: bool  # a 3 x 3 max pooling of stride 2 comes before it


_LAYERS = (
  _Layer(0, kernel=11, stride=4, padding=2, pooled=False),
  _Layer(3, kernel=5, stride=1, padding=2, pooled=True),
  _Layer(6, kernel=3, stride=1, padding=1, pooled=True),
  _Layer(8, kernel=3, stride=1, padding=1, pooled=False),
  _Layer(10, kernel=3, stride=1, padding=1, pooled=False),
)


def array_shapes() -> dict[str, tuple[int, ...]]:
  """Returns names and shapes of the arrays in a weights file."""
  shapes = {}
  for i, layer in enumerate(_LAYERS):
    before, after = _CHANNELS[i : i + 2]
    shapes[f"features.{layer.number}.weight"] = (after, before, layer.kernel, layer.kernel)
    shapes[f"features.{layer.number}.bias"] = (after,)
    shapes[f"lin{i}.model.1.weight"] = (1, after, 1, 1)
  return shapes


def load_lpips(path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """Returns `lpips(videos, reference)` on uint8 `[b, t, y, x, 3]`: mean over frames, float64 `[b]`.

  Raises:
    ConfigError: there is no such file, or arrays of it are missing or have other shapes (named).
  """
  path = pathlib.Path(path)
  how = "freqformer/evaluate/lpips.py says how to write the file"
  if not path.is_file():
    raise ConfigError(f"no LPIPS weights at {path}; nothing is downloaded: {how}.")
  shapes = array_shapes()
  try:
    with np.load(path) as data:
      weights = {name: data[name].astype(np.float32) for name in shapes if name in data}
  except (ValueError, OSError) as error:
    raise ConfigError(f"{path} is not an .npz of arrays ({error}); {how}.") from error
  found = {name: array.shape for name, array in weights.items()}
  if wrong := [f"{name} {shape}" for name, shape in shapes.items() if found.get(name) != shape]:
    raise ConfigError(f"LPIPS weights {path} lack or have in another shape: {', '.join(wrong)}.")
  distance = jax.jit(functools.partial(_distance, jax.tree.map(jnp.asarray, weights)))

  def lpips(videos, reference):
    size = videos.shape[2:4]
    if min(size) < SMALLEST:
      raise ConfigError(f"LPIPS needs frames of at least {SMALLEST} x {SMALLEST}, got {size}.")
    pairs = zip(videos, reference, strict=True)
    return np.array([np.asarray(distance(a, b), np.float64).mean() for a, b in pairs])

  return lpips


def _distance(weights: dict, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns each frame's weighted squared difference of features: `[t, y, x, 3] -> [t]`."""
  total = 0.0
  for i, (x, y) in enumerate(zip(_features(weights, a), _features(weights, b), strict=True)):
    squares = jnp.square(x - y) * weights[f"lin{i}.model.1.weight"][0]
    total += squares.sum(1).mean((1, 2))
  return total


def _features(weights: dict, frames: jax.Array) -> list[jax.Array]:
  """Returns AlexNet's activations at five depths, of unit length over `[t, (channels), y, x]`."""
  x = ((frames.astype(jnp.float32) / 127.5 - 1 - _SHIFT) / _SCALE).transpose(0, 3, 1, 2)
  found = []
  for layer in _LAYERS:
    if layer.pooled:
      x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), "VALID")
    kernel = weights[f"features.{layer.number}.weight"]
    strides = (layer.stride, layer.stride)
    x = jax.lax.conv_general_dilated(x, kernel, strides, [(layer.padding, layer.padding)] * 2)
    x = jax.nn.relu(x + weights[f"features.{layer.number}.bias"][:, None, None])
    found.append(x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-10))
  return found
