"""Latents and codecs that were made elsewhere."""

import builtins
import contextlib
import json
import re
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from freqformer.config import ConfigError
from freqformer.data.cache import prepare
from freqformer.data.codec import Codec, CodecConfig, make_codec
from freqformer.data.protocol import DataConfig
from freqformer.data.vae import ImageVae
from tests.data.helpers import config, moving_square, psnr, write_folder

SHAPE = (3, 4, 6, 16)  # of 5 frames of 32 x 48 in cells of 2 x 8 x 8, 16 channels


def settings(root, **changes) -> DataConfig:
  codec = changes.pop("codec", CodecConfig(name="none", factor=(2, 8, 8), channels=16))
  values = dict(source="latents", root=str(root), cache=str(root.parent / "cache"), codec=codec)
  return DataConfig(**values | dict(resolution=(32, 48), frames=5, val_fraction=0.3) | changes)


def write_latents(root, count=4, shape=SHAPE):
  """Writes `<class>/<i>.npy`; returns the arrays by key."""
  rng = np.random.default_rng(0)
  found = {}
  for name in ("cat", "dog"):
    (root / name).mkdir(parents=True)
    for i in range(count):
      found[f"{name}/{i}.npy"] = 3 + 2 * rng.standard_normal(shape).astype(np.float32)
      np.save(root / name / f"{i}.npy", found[f"{name}/{i}.npy"])
  return found


def test_arrays_become_normalised_latents_with_labels(tmp_path):
  arrays = write_latents(tmp_path / "latents")
  train, val = (prepare(settings(tmp_path / "latents"), split) for split in ("train", "val"))
  assert len(train) + len(val) == 8 and train.class_names == ["cat", "dog"]
  everything = np.stack([item["latent"] for item in train])
  np.testing.assert_allclose(everything.mean((0, 1, 2, 3)), 0, atol=1e-3)
  np.testing.assert_allclose(everything.std((0, 1, 2, 3)), 1, atol=1e-3)
  for split in (train, val):
    for item, clip in zip(split, split.manifest["clips"], strict=True):
      stored = split.statistics.denormalise(item["latent"])
      np.testing.assert_allclose(stored, arrays[clip["key"]], atol=1e-2)
      assert split.class_names[item["label"]] == clip["key"].split("/")[0]
  # What no decoder knows is shown as it is: 2 x 8 x 8 pixels a cell.
  shown = train.decode(everything[:1])
  assert shown.shape == (1, 5, 32, 48, 3) and shown.std() > 20
  assert (shown[:, :, :8, :8] == shown[:, :, :1, :1]).all()


@pytest.mark.parametrize("form", ["npy", "npz", "safetensors", "named", "ctyx", "batch", "half"])
def test_every_form_of_file_gives_the_same_array(tmp_path, form):
  array = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
  root = tmp_path / "latents"
  root.mkdir()
  changes = {}
  if form in ("npy", "half", "batch", "ctyx"):
    stored = {"half": array.astype(np.float16), "batch": array[None]}.get(form, array)
    if form == "ctyx":
      stored = array.transpose(3, 0, 1, 2)
      changes["axes"] = "ctyx"
    np.save(root / "a.npy", stored)
  elif form == "safetensors":
    save_file({"x": array}, root / "a.safetensors")
  else:
    others = {"mask": array[0]} if form == "named" else {}
    np.savez(root / "a.npz", latent=array, **others)
    changes["array"] = "latent" if others else ""
  cache = prepare(settings(root, **changes), "train")
  stored = cache.statistics.denormalise(cache[0]["latent"])
  np.testing.assert_allclose(stored, array, atol=5e-3)


def test_arrays_that_are_none_or_of_other_sizes_are_named(tmp_path):
  root = tmp_path / "latents"
  write_latents(root, 2)
  bad = np.zeros(SHAPE, np.float32)
  bad[0, 0, 0, 0] = np.nan
  np.save(root / "cat" / "nan.npy", bad)
  np.save(root / "cat" / "large.npy", np.zeros((3, 8, 6, 16), np.float32))
  np.save(root / "cat" / "whole.npy", np.zeros(SHAPE, np.int32))
  np.save(root / "cat" / "pickled.npy", np.array({"a": 1}, object), allow_pickle=True)
  np.savez(root / "cat" / "two.npz", a=bad, b=bad)
  (root / "cat" / "cut.safetensors").write_bytes(b"12")
  (root / "cat" / "cut.npz").write_bytes(b"PK12")
  cache = prepare(settings(root), "all")
  reasons = {entry["key"][4:]: entry["reason"] for entry in cache.manifest["skipped"]}
  assert len(cache) == 4 and len(reasons) == 7
  assert "numbers that are not finite" in reasons["nan.npy"]
  assert (
    "its latent is 3x8x6x16, data.frames, resolution and codec give 3x4x6x16"
    in (reasons["large.npy"])
  )
  assert "int32, not a floating-point" in reasons["whole.npy"]
  assert "it has 2 arrays; set data.array to one of a, b" in reasons["two.npz"]
  for name in ("pickled.npy", "cut.safetensors", "cut.npz"):
    assert "it is not a readable array (" in reasons[name], name


def test_settings_that_latents_cannot_have(tmp_path):
  for changes in (dict(views=2), dict(flip=True)):
    with pytest.raises(ValueError, match="source='latents' has one view of each clip"):
      settings(tmp_path / "x", **changes)
  codec = make_codec(CodecConfig(name="none", factor=(2, 8, 8), channels=16))
  with pytest.raises(ConfigError, match="codec 'none' encodes no pictures"):
    codec.encode(np.zeros((1, 2, 8, 8, 3), np.uint8))


class HalfCodec(Codec):
  """A plug-in for tests: every second pixel, of one frame in two."""

  loaded = 0

  def __init__(self, config):
    super().__init__(config)
    HalfCodec.loaded += 1
    self.scale = float(json.loads(config.path or "1"))

  @staticmethod
  def most_channels(factor):
    return 3

  def _analyse(self, video):
    return self.scale * video[:, ::2, ::2, ::2]

  def _synthesise(self, latents):
    return (latents / self.scale).repeat(2, 1).repeat(2, 2).repeat(2, 3)


def test_a_codec_of_ones_own_is_named_by_module_and_class(tmp_path):
  name = f"{__name__}:HalfCodec"
  codec = CodecConfig(name=name, factor=(2, 2, 2), channels=3, path="4")
  root = write_folder(tmp_path / "videos")
  c = config(root, tmp_path / "cache", codec=codec, resolution=(24, 32), stride=1)
  before = HalfCodec.loaded
  cache = prepare(c, "train")
  assert cache.latent_shape == (2, 12, 16, 3) and HalfCodec.loaded <= before + 1
  video = moving_square(20, seed=int(cache.manifest["clips"][0]["key"][4]))
  shown = cache.decode(cache[0]["latent"][None])[0]
  frames = list(cache.manifest["clips"][0]["views"][0]["frames"])
  assert psnr(shown, video[frames]) > 12
  # The plug-in's own settings are part of the protocol.
  other = CodecConfig(name=name, factor=(2, 2, 2), channels=3, path="2")
  assert config(root, tmp_path, codec=other).protocol_hash != c.protocol_hash
  for wrong, words in (
    ("nowhere.at_all:Codec", "there is no module 'nowhere'"),
    (f"{__name__}:Codex", "has no class 'Codex'"),
  ):
    with pytest.raises(ConfigError, match=words):
      CodecConfig(name=wrong, factor=(2, 2, 2), channels=3)


class Tensor(np.ndarray):
  """The part of a torch tensor that ImageVae touches."""

  def float(self):
    return self.astype(np.float32)

  def cpu(self):
    return self

  def numpy(self):
    return np.asarray(self)


class Pooling:
  """An autoencoder of cells of 2x2 pixels, channels first: means, and four copies of each."""

  config = types.SimpleNamespace(block_out_channels=(1, 2), latent_channels=3, scaling_factor=0.5)

  @classmethod
  def from_pretrained(cls, path, **_):
    if path != "weights":
      raise OSError("no such folder")
    return cls()

  def eval(self):
    return self

  def encode(self, x):
    cells = x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2)
    return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=cells.mean((3, 5))))

  def decode(self, z):
    return types.SimpleNamespace(sample=z.repeat(2, 2).repeat(2, 3))


def test_the_autoencoder_keeps_frames_axes_and_scale_apart(monkeypatch):
  """With stand-ins for torch and diffusers, which no other part needs."""
  torch = types.SimpleNamespace(
    from_numpy=lambda x: x.view(Tensor), inference_mode=contextlib.nullcontext
  )
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=Pooling))
  settings = dict(name="freqformer.data.vae:ImageVae", factor=(1, 2, 2), channels=3)
  codec = ImageVae(CodecConfig(**settings, path="weights"))
  video = np.random.default_rng(0).integers(0, 255, (2, 9, 6, 8, 3), np.uint8)
  latents = codec.encode(video)
  cells = (video / 127.5 - 1).reshape(2, 9, 3, 2, 4, 2, 3).mean((3, 5))
  np.testing.assert_allclose(latents, 0.5 * cells, atol=1e-6)
  coarse = video[:, :, ::2, ::2].repeat(2, 2).repeat(2, 3)
  np.testing.assert_array_equal(codec.decode(codec.encode(coarse), (9, 6, 8)), coarse)
  for changes, words in (
    (dict(path="nowhere"), "is no folder of an AutoencoderKL"),
    (dict(path="weights", factor=(1, 8, 8)), "has factor (1, 2, 2) and 3 channels"),
  ):
    with pytest.raises(ConfigError, match=re.escape(words)):
      ImageVae(CodecConfig(**settings | changes))


def test_the_autoencoder_says_what_it_needs(monkeypatch):
  real = builtins.__import__

  def without_torch(name, *args, **kwargs):
    if name == "torch":
      raise ModuleNotFoundError("No module named 'torch'", name="torch")
    return real(name, *args, **kwargs)

  monkeypatch.delitem(sys.modules, "torch", raising=False)
  monkeypatch.setattr(builtins, "__import__", without_torch)
  with pytest.raises(ConfigError, match="needs torch: pip install torch diffusers"):
    ImageVae(CodecConfig(name="freqformer.data.vae:ImageVae", factor=(1, 8, 8), channels=4))
