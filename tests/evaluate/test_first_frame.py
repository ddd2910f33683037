"""Pictures that samples begin with: encoded as clips are, and refused in one sentence."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from freqformer.command.files import read_config
from freqformer.config import ConfigError
from freqformer.data.codec import make_codec
from freqformer.data.fields import FieldsConfig
from freqformer.evaluate.first_frame import first_frame_latent
from freqformer.evaluate.resize import resized
from freqformer.model.dit import VideoDiT
from tests.command.process import ROOT
from tests.evaluate.test_resize import run_of, tiny


def given(run):
  """The run as if it were trained with first frames."""
  train = dataclasses.replace(run.experiment.train, first_frame=0.5)
  model = dataclasses.replace(run.model.config, first_frame=True, precondition=False)
  data = run.experiment.data
  if isinstance(data, FieldsConfig):
    data = dataclasses.replace(data, target="velocity")
  else:
    data = dataclasses.replace(data, codec=dataclasses.replace(data.codec, name="dct"))
  exp = dataclasses.replace(run.experiment, train=train, model=model, data=data)
  abstract = nnx.eval_shape(lambda: VideoDiT(model, run.latent_shape, 2, nnx.Rngs(0)))
  return dataclasses.replace(run, model=abstract, experiment=exp)


def test_a_picture_is_encoded_as_a_still_clip(tmp_path):
  run = given(run_of(tiny()))
  pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
  got = first_frame_latent(run, pixels)
  codec = make_codec(run.experiment.data.codec)
  still = codec.encode(np.stack([pixels, pixels])[None])[0, 0]
  np.testing.assert_allclose(got, (still - np.arange(3)) / (1 + np.arange(3)), rtol=1e-5)
  # Cut in the middle, as a clip is, and as the size asks.
  wide = np.concatenate([0 * pixels[:, :8], pixels, 0 * pixels[:, :8]], 1)
  np.testing.assert_array_equal(first_frame_latent(run, wide), got)
  assert first_frame_latent(resized(run, size=(32, 32)), pixels).shape == (4, 4, 3)
  Image.fromarray(pixels).save(tmp_path / "picture.png")
  np.testing.assert_array_equal(first_frame_latent(run, tmp_path / "picture.png"), got)


def test_pictures_that_are_refused(tmp_path):
  picture = np.zeros((24, 32, 3), np.uint8)
  # The second could be trained with first frames, but never was given any.
  for run in (run_of(tiny()), run_of(tiny(first_frame=True, precondition=False))):
    with pytest.raises(ConfigError, match="was not trained with first frames"):
      first_frame_latent(run, picture)
  run = given(run_of(tiny()))
  fields = given(run_of(read_config(ROOT / "configs" / "fields.py")))
  with pytest.raises(ConfigError, match="random fields has no codec"):
    first_frame_latent(fields, picture)
  (tmp_path / "text.png").write_text("no picture")
  for wrong in (tmp_path / "text.png", tmp_path / "absent.png"):
    with pytest.raises(ConfigError, match="cannot be read as a picture"):
      first_frame_latent(run, wrong)
  with pytest.raises(ConfigError, match=r"must be uint8 \[rows, cols, 3\], got float64"):
    first_frame_latent(run, picture / 1.0)
