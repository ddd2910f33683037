"""LPIPS (Zhang et al., arXiv 1801.03924, v0.1 with AlexNet) from a weights file that the user brings; nothing is downloaded.

The file is an .npz under torchvision's and LPIPS's own names. Where torch and lpips are installed, it is written by

  net, trained = torchvision.models.alexnet(weights="DEFAULT"), lpips.LPIPS(net="alex")
  arrays = {k: v.numpy() for k, v in net.state_dict().items() if k.startswith("features")}
  np.savez("lpips_alex.npz", **arrays, **{k: v.numpy() for k, v in trained.state_dict().items() if k.startswith("lin")})

Both nets' features are scaled to unit length over channels at five depths; the squared differences, weighted per channel,
are averaged over places and added up. 0 is equal. Not checked against the original's own numbers: its weights are not here.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.config import ConfigError

# Of `features.<number>`: stride, padding, and whether a 3 x 3 max pooling of stride 2 comes before.
_LAYERS = {0: (4, 2, False), 3: (1, 2, True), 6: (1, 1, True), 8: (1, 1, False), 10: (1, 1, False)}
_CHANNELS = (3, 64, 192, 384, 256, 256)
_KERNEL = (11, 5, 3, 3, 3)
# Of LPIPS's input, which lies in [-1, 1].
_SHIFT, _SCALE = (
  np.array([-0.030, -0.088, -0.188], np.float32),
  np.array([0.458, 0.448, 0.450], np.float32),
)
SMALLEST = 31  # pixels a side: below, the second pooling has nothing to pool.


def array_shapes() -> dict[str, tuple[int, ...]]:
  """Names and shapes of the arrays in a weights file."""
  shapes = {}
  for i, (number, side) in enumerate(zip(_LAYERS, _KERNEL, strict=True)):
    shapes[f"features.{number}.weight"] = (_CHANNELS[i + 1], _CHANNELS[i], side, side)
    shapes[f"features.{number}.bias"] = (_CHANNELS[i + 1],)
    shapes[f"lin{i}.model.1.weight"] = (1, _CHANNELS[i + 1], 1, 1)
  return shapes


def load_lpips(path):
  """`lpips(videos, reference) -> [b]`, float64, over uint8 `[b, t, y, x, 3]`: mean over frames.

  Raises:
    ConfigError: if there is no such file, or it lacks arrays or has others (named).
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(
      f"no LPIPS weights at {path}; nothing is downloaded: freqformer/evaluate/lpips.py says how to write the file."
    )
  try:
    with np.load(path) as data:
      weights = {name: data[name].astype(np.float32) for name in array_shapes() if name in data}
  except (ValueError, OSError) as error:
    raise ConfigError(
      f"{path} is not an .npz of arrays ({error}); freqformer/evaluate/lpips.py says how to write it."
    ) from error
  wrong = [
    f"{k} {s}" for k, s in array_shapes().items() if k not in weights or weights[k].shape != s
  ]
  if wrong:
    raise ConfigError(f"LPIPS weights {path} lack or have in another shape: {', '.join(wrong)}.")
  one = jax.jit(functools.partial(_distance, jax.tree.map(jnp.asarray, weights)))

  def lpips(videos, reference):
    if min(np.shape(videos)[2:4]) < SMALLEST:
      raise ConfigError(
        f"LPIPS needs frames of at least {SMALLEST} x {SMALLEST} pixels, got {np.shape(videos)[2:4]}."
      )
    return np.array(
      [np.asarray(one(a, b), np.float64).mean() for a, b in zip(videos, reference, strict=True)]
    )

  return lpips


def _distance(weights, a, b):
  """Of frames uint8 `[t, y, x, 3]`, float32 `[t]`."""
  total = 0.0
  for i, (x, y) in enumerate(zip(_features(weights, a), _features(weights, b), strict=True)):

    def unit(f):
      return f / (jnp.sqrt(jnp.square(f).sum(1, keepdims=True)) + 1e-10)

    total += (
      (jnp.square(unit(x) - unit(y)) * weights[f"lin{i}.model.1.weight"][0]).sum(1).mean((1, 2))
    )
  return total


def _features(weights, frames):
  """AlexNet's activations at five depths, `[t, channels, y, x]`."""
  x = ((frames.astype(jnp.float32) / 127.5 - 1 - _SHIFT) / _SCALE).transpose(0, 3, 1, 2)
  found = []
  for number, (stride, padding, pooled) in _LAYERS.items():
    if pooled:
      x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), "VALID")
    kernel, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
    x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(padding, padding)] * 2)
    x = jax.nn.relu(x + bias[:, None, None])
    found.append(x)
  return found
