"""Wan's VAE as a codec: latents as the published models expect them, clips of 4 k + 1 frames."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.data.cache import prepare
from freqformer.data.codec import CodecConfig, make_codec
from freqformer.evaluate.first_frame import first_frame_latent
from freqformer.evaluate.resize import resized
from freqformer.train.metrics import read
from freqformer.wan import vae
from tests.command.process import call, render
from tests.data.helpers import config, write_folder
from tests.evaluate.test_first_frame import given
from tests.evaluate.test_resize import run_of, tiny
from tests.wan.helpers import vae_weights, write_vae

FRAMES = 5
ROWS = 16
COLS = 24
MEAN = np.array([0.1, -0.2, 0.3, 0.0], np.float32)
STD = np.array([1.0, 2.0, 3.0, 0.5], np.float32)
pytestmark = pytest.mark.xdist_group("wan_vae")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The folder of a model, with a tiny VAE in it."""
  folder = tmp_path_factory.mktemp("model")
  write_vae(folder / "vae", "vae21")
  return folder


@pytest.fixture(scope="module")
def codec(model):
  return make_codec(settings(model))


def settings(folder, factor=(4, 8, 8), channels=4):
  return CodecConfig(name="wan_vae", factor=factor, channels=channels, path=str(folder))


def test_latents_are_those_of_the_vae_with_its_statistics(codec, model):
  video = np.random.default_rng(0).integers(0, 256, (2, FRAMES, ROWS, COLS, 3), np.uint8)
  latents = codec.encode(video)
  assert latents.dtype == np.float32
  assert latents.shape == (2, *codec.latent_shape(FRAMES, ROWS, COLS)) == (2, 2, 2, 3, 4)
  weights = vae_weights("vae21")
  expected = jax.jit(vae.encode)(weights, video[1:] / np.float32(127.5) - 1, MEAN, STD)
  np.testing.assert_allclose(latents[1:], expected, atol=1e-4)
  shown = codec.decode(latents, (FRAMES, ROWS, COLS))
  assert shown.dtype == np.uint8 and shown.shape == video.shape
  expected = jax.jit(vae.decode)(weights, latents[1:], MEAN, STD)
  np.testing.assert_allclose(shown[1:], (np.asarray(expected) + 1) * 127.5, atol=0.6)


def test_a_cache_keeps_the_vaes_own_normalisation(codec, model, tmp_path):
  root = write_folder(tmp_path / "videos", clips=2)
  data = config(
    root, tmp_path / "cache", codec=settings(model), frames=FRAMES, resolution=(ROWS, COLS)
  )
  cache = prepare(data, "train")
  assert cache.latent_shape == data.latent_shape == (2, 2, 3, 4)
  assert not cache.statistics.mean.any() and (cache.statistics.std == 1).all()
  latent = cache[0]["latent"]
  shown = cache.decode(latent[None])
  np.testing.assert_array_equal(shown, codec.decode(latent[None], data.video_shape))
  val = prepare(data, "val", cache.statistics)
  assert (val.statistics.std == 1).all()


def test_sizes_that_the_vae_cannot_take(codec, model, tmp_path):
  for shape, message in (
    ((8, 16, 16), "data.frames, data.resolution: a video of 8 frames: .* 5 and 9 are the nearest"),
    ((9, 20, 16), "multiples of 8 x 8; the nearest are 16 x 16"),
  ):
    with pytest.raises(ConfigError, match=message):
      codec.latent_shape(*shape)
    with pytest.raises(ConfigError, match=message):
      codec.encode(np.zeros((1, *shape, 3), np.uint8))


def test_folders_and_sizes_are_checked_before_anything_is_encoded(model, tmp_path):
  write_vae(tmp_path / "vae22", "vae22")
  (tmp_path / "authors").mkdir()
  (tmp_path / "authors" / "Wan2.1_VAE.pth").write_bytes(b"")
  for wrong, message in (
    (
      settings(model, channels=16),
      "has factor (4, 8, 8) and 4 channels; data.codec says (4, 8, 8) and 16: set "
      "data.codec.factor=4,8,8 and data.codec.channels=4",
    ),
    (settings(tmp_path / "vae22"), "has factor (4, 16, 16) and 4 channels"),
    (settings(""), "needs data.codec.path"),
    (settings(tmp_path / "absent"), "data.codec.path: "),
    (settings(tmp_path / "authors"), "data.codec.path: .*Wan2.1_VAE.pth is a pickle"),
  ):
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ConfigError, match=pattern):
      make_codec(wrong)


@pytest.fixture(scope="module")
def run(model):
  """A run of such latents, without weights."""
  flags = tiny()
  flags.data.update(frames=FRAMES, resolution=(ROWS, COLS))
  flags.data.codec.update(name="wan_vae", factor=(4, 8, 8), channels=4, path=str(model))
  return run_of(flags)


def test_other_lengths_are_four_frames_apart(run):
  longer = resized(run, frames=9)
  assert longer.latent_shape == (3, 2, 3, 4)
  with pytest.raises(ConfigError, match="frames=8 must be a multiple of 4 less 3.*; 5 and 9 are"):
    resized(run, frames=8)
  with pytest.raises(ConfigError, match="frames=0 must .*; 1 is the smallest"):
    resized(run, frames=0)


def test_a_picture_is_the_first_latent_frame(run, codec):
  """The first frame of a clip, encoded with the frames behind it, is the same latent."""
  codec_given = run.experiment.data.codec
  trained = given(run)
  data = dataclasses.replace(trained.experiment.data, codec=codec_given)
  trained = dataclasses.replace(
    trained,
    experiment=dataclasses.replace(trained.experiment, data=data),
    record=trained.record | {"statistics": codec.statistics.to_json()},
  )
  video = np.random.default_rng(0).integers(0, 256, (1, FRAMES, ROWS, COLS, 3), np.uint8)
  found = first_frame_latent(trained, video[0, 0])
  np.testing.assert_allclose(found, codec.encode(video)[0, 0], atol=1e-4)


def test_a_run_on_wan_latents(model, tmp_path):
  """Renders, encodes, trains two steps, and decodes a validation clip for the report."""
  render(tmp_path, 1)
  flags = {
    "data.codec.name": "wan_vae",
    "data.codec.path": model,
    "data.codec.factor": "4,8,8",
    "data.codec.channels": 4,
    "data.frames": FRAMES,
    "data.resolution": f"{ROWS},{COLS}",
    "data.views": 1,
    "model.attention.method": "dense",
    "model.depth": 1,
    "sample.guidance": 1,
    "train.steps": 2,
    "train.val_every": 0,
  }
  given = [f"--config.{key}={value}" for key, value in flags.items()]
  call(tmp_path, "train.py", *given, f"--workdir={tmp_path / 'run'}")
  rows = [row for row in read(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
  assert [row["step"] for row in rows] == [1, 2] and np.isfinite(rows[-1]["loss"])
  assert list((tmp_path / "run").glob("real/*.mp4"))
