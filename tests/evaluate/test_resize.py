"""Runs at other sizes: shapes, positions, decoded videos, pictures; sizes that cannot be."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from freqformer.command.files import read_config
from freqformer.config import ConfigError
from freqformer.data.codec import make_codec
from freqformer.evaluate.resize import first_frame_latent, parse_size, resized, video_shape
from freqformer.evaluate.restore import Run
from freqformer.model.dit import VideoDiT
from freqformer.train.experiment import experiment
from tests.command.process import ROOT, TINY


def run_of(config):
  """A run without parameters, trained at 6 frames of 24 x 32 pixels: 3 x 3 x 4 tokens."""
  exp = experiment(config)
  shape = exp.latent_shape
  model = nnx.eval_shape(lambda: VideoDiT(exp.model, shape, 2, nnx.Rngs(0)))
  mean = np.arange(shape[-1], dtype=float)
  record = {
    "class_names": ["a", "b"],
    "latent_shape": shape,
    "statistics": {"mean": mean.tolist(), "std": (1 + mean).tolist()},
  }
  return Run(model, None, exp, record)


def tiny(**model):
  config = read_config(TINY)
  config.model.attention.method = "dense"
  config.model.update(model)
  return config


def test_everything_follows_the_size():
  run = run_of(tiny())
  assert resized(run) is run and resized(run, 6, (24, 32)) is run
  other = resized(run, frames=8, size=(48, 32))
  assert video_shape(other) == (8, 48, 32) and other.latent_shape == (4, 6, 4, 4)
  videos = other.decode(np.zeros((2, *other.latent_shape), np.float32))
  assert videos.shape == (2, 8, 48, 32, 3)
  assert run.latent_shape == (3, 3, 4, 4)
  theta = run.model.config.rope_theta
  assert other.model.config.rope_theta == theta
  scaled = resized(run, frames=8, size=(48, 32), rope="ntk").model
  assert scaled.config.rope_theta[1] > theta[1] and scaled.config.rope_theta[2] == theta[2]
  assert scaled.runs[0].attention.theta == scaled.config.rope_theta


def test_fields_have_sizes_of_tokens():
  run = run_of(read_config(ROOT / "configs" / "fields.py"))
  other = resized(run, frames=4, size=(64, 256))
  assert other.latent_shape == (4, 8, 32, 4) and video_shape(other) == (4, 64, 256)
  assert other.decode(np.zeros((1, 4, 8, 32, 4), np.float32)).shape == (1, 4, 64, 256, 3)
  with pytest.raises(ConfigError, match="random fields has no codec"):
    first_frame_latent(given(run), np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
  "wrong, message",
  [
    (dict(frames=7), "frames=7 must be a multiple of 2.*; 6 and 8 are"),
    (dict(frames=0), "frames=0 must be a multiple of 2.*; 2 is the smallest"),
    (dict(size=(24, 33)), "cols=33 must be a multiple of 8.*; 32 and 40 are"),
    (dict(size=(24,)), "must be .rows, cols. in pixels"),
    (dict(frames=8, rope="yarn"), "rope='yarn' is unknown; known: ntk, trained"),
  ],
)
def test_sizes_that_cannot_be(wrong, message):
  with pytest.raises(ConfigError, match=message):
    resized(run_of(tiny()), **wrong)


def test_a_grid_that_the_method_cannot_serve():
  config = tiny()
  config.model.attention.update(method="adaspa", adaspa=dict(sparsity=0.7))
  with pytest.raises(ConfigError, match="next larger size that it serves is frames=6, size=24x24"):
    resized(run_of(config), frames=2, size=(8, 8))


@pytest.mark.parametrize("text", ["96", "96x", "96x-4", "axb", "96x96x3"])
def test_sizes_are_rows_times_columns(text):
  assert parse_size("96x128") == (96, 128)
  with pytest.raises(ConfigError, match="must be ROWSxCOLS in pixels"):
    parse_size(text)


def given(run):
  """The run as if it were trained with first frames."""
  train = dataclasses.replace(run.experiment.train, first_frame=0.5)
  model = dataclasses.replace(run.model.config, first_frame=True)
  data = run.experiment.data
  if hasattr(data, "target"):
    data = dataclasses.replace(data, target="velocity")
  exp = dataclasses.replace(run.experiment, train=train, model=model, data=data)
  abstract = nnx.eval_shape(lambda: VideoDiT(model, run.latent_shape, 2, nnx.Rngs(0)))
  return dataclasses.replace(run, model=abstract, experiment=exp)


def test_a_picture_is_encoded_as_a_still_clip(tmp_path):
  run = given(run_of(tiny()))
  pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
  got = first_frame_latent(run, pixels)
  codec = make_codec(run.experiment.data.codec)
  still = codec.encode(np.stack([pixels, pixels])[None])[0, 0]
  np.testing.assert_allclose(got, (still - np.arange(4)) / (1 + np.arange(4)), rtol=1e-5)
  # Cut in the middle, as a clip is, and as the size asks.
  wide = np.concatenate([0 * pixels[:, :8], pixels, 0 * pixels[:, :8]], 1)
  np.testing.assert_array_equal(first_frame_latent(run, wide), got)
  assert first_frame_latent(resized(run, size=(32, 32)), pixels).shape == (4, 4, 4)
  Image.fromarray(pixels).save(tmp_path / "picture.png")
  np.testing.assert_array_equal(first_frame_latent(run, tmp_path / "picture.png"), got)


def test_pictures_that_are_refused(tmp_path):
  picture = np.zeros((24, 32, 3), np.uint8)
  for run in (run_of(tiny()), run_of(tiny(first_frame=True))):  # the latter is never given any
    with pytest.raises(ConfigError, match="was not trained with first frames"):
      first_frame_latent(run, picture)
  run = given(run_of(tiny()))
  (tmp_path / "text.png").write_text("no picture")
  for wrong in (tmp_path / "text.png", tmp_path / "absent.png"):
    with pytest.raises(ConfigError, match="cannot be read as a picture"):
      first_frame_latent(run, wrong)
  with pytest.raises(ConfigError, match=r"must be uint8 \[rows, cols, 3\], got float64"):
    first_frame_latent(run, picture / 1.0)
