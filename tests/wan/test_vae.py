"""Wan's VAEs agree with diffusers, are causal, and refuse weights and sizes that do not fit."""

import functools
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.wan import vae
from tests.golden import path
from tests.kernels.block_sparse.suite import relative_error
from tests.wan.helpers import channels_last, golden, names, vae_weights, write_vae
from tools.formula import values

SIDE = {"vae21": 8, "vae22": 16}  # pixels of a latent cell
BAR = 1e-5  # torch's own float32 is 2.5e-6 from its float64
pytestmark = pytest.mark.xdist_group("wan_vae")


@pytest.fixture(autouse=True)
def exact():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def compiled(function):
  return jax.jit(function)


def encode(name, video, mean=0.0, std=1.0):
  return np.asarray(compiled(vae.encode)(vae_weights(name), video, mean, std))


def decode(name, latents, mean=0.0, std=1.0):
  return np.asarray(compiled(vae.decode)(vae_weights(name), latents, mean, std))


def clip(name, batch=1, frames=9, seed="video"):
  """Returns a video; the first one is a golden's input."""
  shape = (batch, 3, frames, 2 * SIDE[name], 2 * SIDE[name])
  return channels_last(np.tanh(values(seed, shape)))


@pytest.mark.parametrize("name", SIDE)
def test_encodes_as_diffusers_does(name):
  found = encode(name, clip(name))
  assert found.dtype == np.float32
  assert relative_error(found, channels_last(golden(f"{name}_mean"))) < BAR


@pytest.mark.parametrize("name", SIDE)
def test_decodes_as_diffusers_does(name):
  found = decode(name, channels_last(values("z", (1, 4, 3, 2, 2))))
  assert found.dtype == np.float32
  assert relative_error(found, channels_last(golden(f"{name}_video"))) < BAR


@pytest.mark.parametrize("name", SIDE)
def test_later_frames_change_no_earlier_ones(name):
  """17 frames begin as the 9 of the goldens do, in encoding and in decoding."""
  later = clip(name, frames=8, seed="later")
  latents = encode(name, np.concatenate([clip(name), later], axis=1))
  assert latents.shape == (1, 5, 2, 2, 4)
  assert relative_error(latents[:, :3], channels_last(golden(f"{name}_mean"))) < BAR
  first = channels_last(values("z", (1, 4, 3, 2, 2)))
  shown = decode(name, np.concatenate([first, latents[:, :2]], axis=1))
  assert shown.shape == (1, 17, 2 * SIDE[name], 2 * SIDE[name], 3)
  assert relative_error(shown[:, :9], channels_last(golden(f"{name}_video"))) < BAR


def test_statistics_are_those_of_the_latents():
  mean = np.array([0.1, -0.2, 0.3, 0.0], np.float32)
  std = np.array([1.0, 2.0, 3.0, 0.5], np.float32)
  video = clip("vae21", frames=1)
  plain = encode("vae21", video)
  normalised = encode("vae21", video, mean, std)
  assert relative_error(normalised, (plain - mean) / std) < BAR
  assert relative_error(decode("vae21", normalised, mean, std), decode("vae21", plain)) < BAR


def test_samples_of_a_batch_are_apart():
  videos = np.concatenate([clip("vae21", seed="other"), clip("vae21")])
  found = encode("vae21", videos)
  assert relative_error(found[1:], channels_last(golden("vae21_mean"))) < BAR


def published(version):
  """Returns names and shapes of the real files."""
  return json.loads(path("wan_vae_shapes").read_text())[version]


def test_working_memory_does_not_grow_with_frames():
  """At the real widths, of which a layer's activations are 32 times the video."""
  params = {k: jax.ShapeDtypeStruct(s, np.float32) for k, s in published("2.1").items()}

  def temporary(frames):
    latents = jax.ShapeDtypeStruct((1, (frames + 3) // 4, 2, 2, 16), np.float32)
    run = jax.jit(vae.decode).lower(params, latents, 0.0, 1.0).compile()
    return run.memory_analysis().temp_size_in_bytes

  video = 4 * 3 * 16 * 16  # bytes of a frame of the output
  assert temporary(41) - temporary(9) < 4 * 32 * video


@pytest.mark.parametrize(
  "version, factor, channels", [("2.1", (4, 8, 8), 16), ("2.2", (4, 16, 16), 48)]
)
def test_the_published_weights_fit(version, factor, channels):
  structure = vae.read_structure(published(version))
  assert (structure.factor, structure.channels) == (factor, channels)
  assert structure.residual == (version == "2.2")


def refused(shapes):
  with pytest.raises(ConfigError) as error:
    vae.read_structure(shapes)
  return str(error.value)


@pytest.mark.parametrize("name", SIDE)
def test_each_lost_name_is_missed(name):
  shapes = names()[name]
  for lost in list(shapes)[::29]:  # all of them take a minute
    message = refused({k: s for k, s in shapes.items() if k != lost})
    assert re.search(rf"missing \([^)]*{re.escape(lost)}", message), (lost, message)


def test_everything_that_is_wrong_is_in_one_report():
  shapes = dict(names()["vae22"])
  del shapes["decoder.norm_out.gamma"]
  del shapes["encoder.down_blocks.1.downsampler.time_conv.weight"]
  del shapes["encoder.down_blocks.1.downsampler.time_conv.bias"]
  shapes["decoder.conv_out.bias"] = [3]
  shapes["encoder.mid_block.resnets.0.conv1.weight"] = [8, 8, 3, 3]
  shapes["decoder.conv_out.lora"] = [3]
  message = refused(shapes)
  for words in (
    "3 missing (",
    "encoder.down_blocks.1.downsampler.time_conv.weight",
    "decoder.norm_out.gamma",
    "1 unknown (decoder.conv_out.lora)",
    "2 of another shape (encoder.mid_block.resnets.0.conv1.weight is [8, 8, 3, 3], not [8, 8, 3,",
    "decoder.conv_out.bias is [3], not [12]",
  ):
    assert words in message, message


def test_a_whole_block_that_is_lost():
  shapes = {k: s for k, s in names()["vae21"].items() if ".up_blocks.2.resnets.1." not in k}
  assert "decoder.up_blocks.2.resnets.1.conv1.weight" in refused(shapes)
  shapes = {k: s for k, s in names()["vae21"].items() if not k.startswith("encoder.")}
  assert "encoder.conv_in.weight" in refused(shapes)


def test_other_layouts_and_impossible_widths_are_refused():
  assert "-Diffusers" in refused({"encoder.conv1.weight": [96, 3, 3, 3, 3]})
  assert "-Diffusers" in refused({})
  shapes = dict(names()["vae22"])
  for name in list(shapes):  # 7 channels are no mean of the 4 x 4 of a box
    if name.startswith("encoder.down_blocks.1.resnets.0.conv1."):
      shapes[name] = [7, *shapes[name][1:]]
  assert "encoder.down_blocks.1." in refused(shapes)


@pytest.mark.parametrize(
  "shape, message",
  [
    ((1, 8, 16, 16, 3), "8 frames: the VAE takes 4 k [+] 1 of them; 5 and 9 are the nearest"),
    ((1, 0, 16, 16, 3), "1 is the least[.]"),
    ((1, 9, 18, 30, 3), "18 x 30 pixels .* multiples of 8 x 8; the nearest are 16 x 32"),
    ((1, 9, 3, 8, 3), "the nearest are 8 x 8"),
    ((9, 16, 16, 3), r"\[b, frames, rows, cols, 3\]"),
    ((1, 9, 16, 16, 4), r"\[b, frames, rows, cols, 3\]"),
  ],
)
def test_videos_that_do_not_fit(shape, message):
  with pytest.raises(ConfigError, match=message):
    vae.encode(vae_weights("vae21"), np.zeros(shape, np.float32), 0.0, 1.0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_of_two_bytes_are_computed_with_in_float32(dtype):
  params = {k: jax.ShapeDtypeStruct(s, dtype) for k, s in names()["vae21"].items()}
  video = jax.ShapeDtypeStruct((1, 5, 8, 8, 3), np.float32)
  program = jax.make_jaxpr(vae.encode)(params, video, 0.0, 1.0)
  used = re.findall(r":(\w+)\[[\d,]*\] = conv_general_dilated", str(program))
  assert len(used) > 40 and set(used) == {"f32"}


def test_latents_that_do_not_fit():
  for shape in ((1, 2, 2, 2, 3), (2, 2, 2, 4)):
    with pytest.raises(ConfigError, match=r"takes \[b, t, y, x, c\] with c = 4"):
      vae.decode(vae_weights("vae21"), np.zeros(shape, np.float32), 0.0, 1.0)


def test_a_folder_has_config_and_weights_of_one_vae(tmp_path):
  folder = write_vae(tmp_path / "model" / "vae", "vae22")
  for place in (folder, folder.parent, str(folder.parent)):
    opened = vae.open_vae(place)
    assert opened.structure.factor == (4, 16, 16) and opened.structure.channels == 4
    np.testing.assert_allclose(opened.mean, [0.1, -0.2, 0.3, 0])
    np.testing.assert_allclose(opened.std, [1, 2, 3, 0.5])
  for i, (change, message) in enumerate(
    (
      (dict(latents_mean=[0.0] * 16), "latents_mean must be 4 numbers"),
      (dict(latents_std=None), "latents_std must be 4 numbers, .*got None"),
      (dict(latents_std=[1, 1, float("nan"), 1]), "latents_std must be 4 numbers"),
      (dict(latents_std=[1, 1, 0, 1]), "latents_std must be above 0"),
      (dict(_class_name="AutoencoderKL"), "is of AutoencoderKL, not of AutoencoderKLWan"),
    )
  ):
    with pytest.raises(ConfigError, match=message):
      vae.open_vae(write_vae(tmp_path / str(i), "vae22", **change))
