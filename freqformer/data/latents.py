"""Latents that were made elsewhere, an array per clip."""

import io
import os
import zipfile

import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load  # NumPy's own knows no bfloat16

from freqformer.data import files
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
  array = array_of(clip, config.array, "data.array")
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


def array_of(clip: Clip, name: str, key: str) -> np.ndarray:
  """Returns an array of a clip's file; bfloat16 comes as float32.

  Args:
    name: of the array; empty takes the only one.
    key: of the config that names it.

  Raises:
    BrokenClip: the file cannot be read, or has no such array.
  """
  contents = files.read(clip.path)
  ending = os.path.splitext(clip.key)[1].lower()
  try:
    if ending == ".safetensors":
      found = load(contents)
      array = np.asarray(found[_name(clip, name, key, list(found))])
      return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    found = np.load(io.BytesIO(contents), allow_pickle=False)
    return found if ending == ".npy" else found[_name(clip, name, key, found.files)]
  except (ValueError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
    raise BrokenClip(clip.key, f"it is not a readable array ({_first_line(error)})") from error


def _name(clip: Clip, name: str, key: str, names: list[str]) -> str:
  """Returns the name of the array to take."""
  if name in names:
    return name
  if not name and len(names) == 1:
    return names[0]
  wanted = f"no array {name!r}" if name else f"{len(names)} arrays"
  raise BrokenClip(clip.key, f"it has {wanted}; set {key} to one of {', '.join(names)}")


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0] if str(error) else type(error).__name__
