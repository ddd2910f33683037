"""Latents that were made elsewhere, an array per clip."""

import pathlib
import zipfile

import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file  # NumPy's own knows no bfloat16

from freqformer.data.codec import Codec
from freqformer.data.protocol import BrokenClip, Clip, DataConfig


def read_latent(config: DataConfig, codec: Codec, clip: Clip) -> tuple[np.ndarray, dict]:
  """Reads the latent of a clip.

  Returns:
    Latents float32 `[1, t, y, x, c]` and the manifest's entries, as of `decode_clip`.

  Raises:
    BrokenClip: the file holds no such array, or one of another shape, or numbers that are not
      finite.
  """
  array = _array(config, clip)
  if array.ndim == 5 and array.shape[0] == 1:
    array = array[0]
  if array.ndim == 4 and config.axes == "ctyx":
    array = array.transpose(1, 2, 3, 0)
  expected = codec.latent_shape(*config.video_shape)
  if array.shape != expected:
    raise BrokenClip(
      clip.key,
      f"its latent is {'x'.join(map(str, array.shape))}, data.frames, resolution and codec give "
      f"{'x'.join(map(str, expected))} (t, y, x, c; data.axes={config.axes!r})",
    )
  if not np.issubdtype(array.dtype, np.floating):
    raise BrokenClip(clip.key, f"its latent is {array.dtype}, not a floating-point array")
  array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise BrokenClip(clip.key, "its latent has numbers that are not finite")
  view = {"frames": list(range(config.frames)), "fps": config.shown_fps()}
  drawn = {"frames": config.frames, "fps": config.shown_fps(), "views": [view], "notes": []}
  return array[None], drawn


def _array(config: DataConfig, clip: Clip) -> np.ndarray:
  """Returns the array of a file; bfloat16 comes as float32."""
  path = pathlib.Path(clip.path)
  try:
    if path.suffix.lower() == ".npy":
      return np.load(path, allow_pickle=False)
    if path.suffix.lower() == ".npz":
      with np.load(path, allow_pickle=False) as found:
        return found[_name(config, clip, found.files)]
    return _safetensors(config, clip)
  except (ValueError, EOFError, zipfile.BadZipFile) as error:
    raise BrokenClip(clip.key, f"it is not a readable array ({_first_line(error)})") from error


def _safetensors(config: DataConfig, clip: Clip) -> np.ndarray:
  """Returns the array of a .safetensors file."""
  try:
    found = load_file(clip.path)
  except SafetensorError as error:
    raise BrokenClip(clip.key, f"it is not a readable array ({_first_line(error)})") from error
  array = np.asarray(found[_name(config, clip, list(found))])
  return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _name(config: DataConfig, clip: Clip, names: list[str]) -> str:
  """Returns the name of the array to take."""
  if config.array in names:
    return config.array
  if not config.array and len(names) == 1:
    return names[0]
  wanted = f"no array {config.array!r}" if config.array else f"{len(names)} arrays"
  raise BrokenClip(clip.key, f"it has {wanted}; set data.array to one of {', '.join(names)}")


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0] if str(error) else type(error).__name__
