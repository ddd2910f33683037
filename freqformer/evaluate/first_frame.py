"""From a picture to the first latent frame that all samples begin with."""

import dataclasses
import pathlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from freqformer.config import ConfigError
from freqformer.data.codec import LatentStatistics, make_codec
from freqformer.data.fields import FieldsConfig
from freqformer.data.protocol import Footage, draw_view
from freqformer.evaluate.restore import Run


def first_frame_latent(run: Run, image: str | pathlib.Path | np.ndarray) -> np.ndarray:
  """Encodes a picture as a run's first latent frame, normalised: float32 `[y, x, c]`.

  It is cropped in the middle and resized as a validation clip is, and stands still over the frames
  of a latent frame.

  Args:
    run: at the size that is sampled.
    image: file, or uint8 `[rows, cols, 3]`.

  Raises:
    ConfigError: the model was not trained with first frames, or this is no picture.
  """
  exp = run.experiment
  if not (run.model.config.first_frame and exp.train.first_frame):
    raise ConfigError(
      "first_frame: this model was not trained with first frames; train one with "
      "--config.model.first_frame=True --config.train.first_frame=0.5."
    )
  if isinstance(exp.data, FieldsConfig):
    raise ConfigError("first_frame: a model of random fields has no codec that encodes a picture.")
  from freqformer.data.decode import crop_resize  # needs av, the package of an extra

  pixels = _pixels(image)
  config = dataclasses.replace(exp.data, short="pad")  # a clip of one frame
  view = draw_view(config, "val", "first_frame", 0, Footage(pixels.shape[:2], (0.0,)))
  frame = crop_resize(pixels, view.box, config.resolution)
  codec = make_codec(config.codec)
  still = np.repeat(frame[None, None], codec.first_frames, axis=1)
  statistics = LatentStatistics.from_json(run.record["statistics"])
  return statistics.normalise(codec.encode(still)[0, 0])


def _pixels(image) -> np.ndarray:
  """Returns a picture as uint8 `[rows, cols, 3]`, upright."""
  if isinstance(image, np.ndarray):
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
      raise ConfigError(
        f"first_frame must be uint8 [rows, cols, 3], got {image.dtype} {list(image.shape)}."
      )
    return image
  try:
    with Image.open(image) as opened:
      return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
  except (FileNotFoundError, UnidentifiedImageError) as error:
    raise ConfigError(f"first_frame={str(image)!r} cannot be read as a picture.") from error
