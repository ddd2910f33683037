"""The latent cache is whole or absent, and batches come again exactly."""

import concurrent.futures
import dataclasses
import errno
import itertools
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.data import cache_writer, encode
from freqformer.data.cache import cache_path, prepare
from freqformer.data.clips import list_clips
from freqformer.data.codec import CodecConfig, LatentStatistics
from freqformer.data.decode import VideoFile, crop_resize
from freqformer.data.loader import train_iterator, val_batches
from tests.data.helpers import config, moving_square, psnr, write_clip, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
  return prepare(config(folder, tmp_path_factory.mktemp("cache"), views=2), "train")


# ---- cache ------------------------------------------------------------------------------------


def test_cache_holds_what_the_codec_gives(folder, cache):
  assert len(cache) == 2 * len(cache.manifest["clips"]) and cache.latent_shape == (2, 4, 6, 24)
  item = cache[3]
  assert item["latent"].dtype == np.float32 and item["label"].dtype == np.int32
  assert item["index"] == 3
  entry = cache.manifest["clips"][1]
  view = entry["views"][1]
  with VideoFile(folder / entry["key"]) as file:
    frames = file.read(view["frames"])
  pixels = np.stack([crop_resize(frame, view["box"], (16, 24)) for frame in frames])[None]
  stored = cache.statistics.denormalise(item["latent"])
  # Latents are stored in 16 bits; the decoded video below shows how little that is.
  np.testing.assert_allclose(stored, cache.codec.encode(pixels)[0], atol=2e-2)
  decoded = cache.codec.decode(stored[None], cache.video_shape)
  assert psnr(cache.decode(item["latent"][None]), decoded) > 50
  everything = np.stack([x["latent"] for x in cache])
  np.testing.assert_allclose(everything.mean((0, 1, 2, 3)), 0, atol=1e-3)
  np.testing.assert_allclose(everything.std((0, 1, 2, 3)), 1, atol=1e-3)
  assert cache.class_names == ["cat", "dog"]


def test_lowpass_latents_keep_the_proportions_of_their_channels(folder, tmp_path):
  codec = CodecConfig(name="lowpass", factor=(2, 4, 4), channels=3)
  cache = prepare(dataclasses.replace(config(folder, tmp_path), codec=codec), "train")
  everything = np.stack([x["latent"] for x in cache])
  assert len(set(cache.statistics.std.tolist())) == 1
  spread = everything.std((0, 1, 2, 3))
  assert np.mean(spread**2) == pytest.approx(1, rel=1e-3) and spread.max() > 1.5 * spread.min()


def test_flips_are_encoded_from_mirrored_pixels(folder, tmp_path):
  whole = dict(resolution=(24, 32), short="pad", frames=20, views=2)
  plain, flipped = (
    prepare(config(folder, tmp_path, flip=flip, **whole), "train") for flip in (False, True)
  )
  sides = [view["flip"] for clip in flipped.manifest["clips"] for view in clip["views"]]
  assert sides.count(True) == sides.count(False)
  for i, mirrored in enumerate(sides):
    a, b = (x.decode(x[i]["latent"][None])[0] for x in (plain, flipped))
    turned = b[:, :, ::-1]
    # The ramp tells left from right.
    assert psnr(a, turned if mirrored else b) > 30
    assert psnr(a, b if mirrored else turned) < 20


def test_a_cache_is_used_again_and_other_protocols_get_their_own(folder, cache, monkeypatch):
  same = config(folder, cache.path.parent, views=2)
  monkeypatch.setattr(encode, "encode_clip", None)
  again = prepare(same, "train")
  np.testing.assert_array_equal(again[0]["latent"], cache[0]["latent"])
  other = dataclasses.replace(same, stride=1)
  assert cache_path(other, "train") != cache.path
  shutil.copytree(cache.path, cache_path(other, "train"))
  with pytest.raises(ConfigError, match="was made with protocol"):
    prepare(other, "train")
  shutil.rmtree(cache_path(other, "train"))


def test_val_has_the_statistics_of_train(folder, tmp_path):
  c = config(folder, tmp_path, val_fraction=0.4)
  val = prepare(c, "val")
  train = prepare(c, "train")
  np.testing.assert_array_equal(val.statistics.mean, train.statistics.mean)
  assert not {x["key"] for x in val.manifest["clips"]} & {x["key"] for x in train.manifest["clips"]}
  manifest = json.loads((train.path / "manifest.json").read_text())
  manifest["statistics"]["power"] = [[[1.0]]]  # a key that earlier versions wrote
  (train.path / "manifest.json").write_text(json.dumps(manifest))
  assert len(prepare(c, "val")) == len(val)
  manifest["statistics"]["mean"][0] += 1
  (train.path / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(ConfigError, match="other statistics"):
    prepare(c, "val")


def test_other_clips_have_the_statistics_of_the_model(folder, tmp_path):
  """All are encoded, once per model, and none to make statistics of their own."""
  c = config(folder, tmp_path)
  first = LatentStatistics(np.zeros(24, np.float32), np.ones(24, np.float32))
  raw = prepare(c, "all", first)
  assert len(raw) == 6 and [path.name for path in tmp_path.iterdir()] == [raw.path.name]
  mean = np.arange(24, dtype=np.float32)
  second = prepare(c, "all", LatentStatistics(mean, mean + 1))
  np.testing.assert_allclose(
    second[3]["latent"], (raw[3]["latent"] - mean) / (mean + 1), rtol=1e-5, atol=1e-6
  )
  assert second.path != raw.path and prepare(c, "all", first).path == raw.path
  # A run's own validation clips are there already.
  val = prepare(c, "val")
  assert prepare(c, "val", val.statistics).path == val.path
  assert prepare(c, "val", first).path not in (val.path, raw.path)


def encoding(monkeypatch, fails_at: int | None = None, error=KeyboardInterrupt) -> list[str]:
  """Lists the clips that are encoded from now on; raises an error at one of them."""
  real = encode.encode_clip
  encoded = []

  def counted(config, codec, split, clip):
    if len(encoded) == fails_at:
      raise error
    encoded.append(clip.key)
    return real(config, codec, split, clip)

  monkeypatch.setattr(encode, "encode_clip", counted)
  return encoded


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_encoding_goes_on_where_it_was_interrupted(folder, tmp_path, monkeypatch, error):
  whole = prepare(config(folder, tmp_path / "whole", views=2), "train")
  monkeypatch.setattr(cache_writer, "SHARD_SECONDS", 0)  # a shard a clip
  c = config(folder, tmp_path / "cut", views=2, workers=1)
  encoding(monkeypatch, 3, error)
  with pytest.raises(error):
    prepare(c, "train")
  (partial,) = (tmp_path / "cut").iterdir()
  assert partial.name == f".{cache_path(c, 'train').name}.partial"
  # What a kill leaves of a shard is no part of it.
  (partial / "latents-00099.array_record").write_bytes(b"half")
  monkeypatch.undo()
  encoded = encoding(monkeypatch)
  resumed = prepare(c, "train")
  assert 2 <= len(encoded) < 5 and list((tmp_path / "cut").iterdir()) == [resumed.path]
  assert {file.name for file in resumed.path.iterdir()} == {
    "manifest.json",
    *(shard["file"] for shard in resumed.manifest["shards"]),
  }
  assert len(resumed.manifest["shards"]) > 1 and resumed.hash == whole.hash
  for key in ("clips", "skipped", "statistics", "records"):
    assert resumed.manifest[key] == whole.manifest[key], key
  for i in range(len(whole)):
    np.testing.assert_array_equal(resumed[i]["latent"], whole[i]["latent"])
    assert resumed[i]["label"] == whole[i]["label"]


def test_a_clip_that_is_half_written_does_not_count(folder, tmp_path, monkeypatch):
  whole = prepare(config(folder, tmp_path / "whole", views=2), "train")
  writes = itertools.count()

  class Stopped(cache_writer.ArrayRecordWriter):
    def write(self, record):
      if next(writes) == 3:  # the second view of the second clip
        raise KeyboardInterrupt
      super().write(record)

  monkeypatch.setattr(cache_writer, "ArrayRecordWriter", Stopped)
  c = config(folder, tmp_path / "cut", views=2)
  with pytest.raises(KeyboardInterrupt):
    prepare(c, "train")
  monkeypatch.undo()
  resumed = prepare(c, "train")
  assert resumed.manifest["records"] == len(whole)
  for i in range(len(whole)):
    np.testing.assert_array_equal(resumed[i]["latent"], whole[i]["latent"])


@pytest.mark.parametrize("change", ["clip", "settings", "shard"])
def test_what_was_interrupted_and_changed_begins_anew(tmp_path, monkeypatch, change):
  root = write_folder(tmp_path / "videos")
  c = config(root, tmp_path / "cache", workers=1)
  monkeypatch.setattr(cache_writer, "SHARD_SECONDS", 0)
  first = encoding(monkeypatch, 3)
  with pytest.raises(KeyboardInterrupt):
    prepare(c, "train")
  (partial,) = (tmp_path / "cache").iterdir()
  if change == "clip":
    write_clip(root / first[0], moving_square(20, seed=99))
  if change == "settings":
    progress = json.loads((partial / "progress.json").read_text())
    (partial / "progress.json").write_text(json.dumps(progress | {"hash": "other"}))
  if change == "shard":
    (partial / "latents-00000.array_record").write_bytes(b"")
  monkeypatch.undo()
  encoded = encoding(monkeypatch)
  assert len(prepare(c, "train")) == len(encoded) == 5


def test_processes_that_need_the_same_cache_encode_it_once(folder, tmp_path, monkeypatch):
  c = config(folder, tmp_path)
  encoded = encoding(monkeypatch)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    caches = list(pool.map(lambda _: prepare(c, "train"), range(4)))
  assert len(encoded) == 5 and {cache.path for cache in caches} == {cache_path(c, "train")}
  assert list(tmp_path.iterdir()) == [caches[0].path]


def test_data_may_move_and_other_data_have_their_own_cache(tmp_path, monkeypatch):
  root = write_folder(tmp_path / "videos")
  c = config(root, tmp_path / "cache")
  cache = prepare(c, "train")
  monkeypatch.chdir(tmp_path)
  encoded = encoding(monkeypatch)
  assert prepare(dataclasses.replace(c, root="videos"), "train").path == cache.path
  root.rename(tmp_path / "moved")
  moved = dataclasses.replace(c, root="moved")
  assert prepare(moved, "train").path == cache.path and not encoded
  other = dataclasses.replace(c, root=str(write_folder(tmp_path / "other", clips=4)))
  assert prepare(other, "train").path == cache_path(c, "train", number=2)
  assert len(encoded) == 7 and prepare(moved, "train").path == cache.path
  assert prepare(other, "train").hash != prepare(moved, "train").hash == cache.hash
  # Neither is there any more: each folder still has its own.
  for name in ("moved", "other"):
    shutil.rmtree(tmp_path / name)
  assert len(prepare(c, "train")) == 5 and len(prepare(other, "train")) == 7
  with pytest.raises(ConfigError, match="'elsewhere' is not a folder"):
    prepare(dataclasses.replace(c, root="elsewhere"), "train")


def test_damaged_caches_are_refused(folder, tmp_path):
  c = config(folder, tmp_path)
  path = prepare(c, "train").path
  shard = next(path.glob("*.array_record"))
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(ConfigError, match="damaged: latents-00000"):
    prepare(c, "train")
  manifest = json.loads((path / "manifest.json").read_text())
  (path / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
  with pytest.raises(ConfigError, match="has schema 99"):
    prepare(c, "train")
  for text in ("{", "{}"):
    (path / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match="not a complete cache"):
      prepare(c, "train")


def test_a_flipped_byte_is_one_sentence(folder, tmp_path):
  cache = prepare(config(folder, tmp_path), "train")
  shard = next(cache.path.glob("*.array_record"))
  data = bytearray(shard.read_bytes())
  place = data.index(cache.manifest["clips"][0]["key"].encode()) + 40
  data[place] ^= 0xFF
  shard.write_bytes(data)
  with pytest.raises(ConfigError, match=r"cache .* is damaged: record 0 cannot be read; delete"):
    prepare(config(folder, tmp_path), "train")[0]


def test_latents_beyond_float16_are_refused(folder, tmp_path):
  class Loud:
    def encode(self, pixels):
      return np.full((1, 2, 2, 3, 4), 7e4, np.float32)

  c = config(folder, tmp_path)
  with pytest.raises(ValueError, match="beyond float16"):
    encode.encode_clip(c, Loud(), "train", list_clips(c, "train").clips[0])


def test_changed_clips_are_noticed_and_copied_ones_accepted(tmp_path):
  root = write_folder(tmp_path / "videos")
  c = config(root, tmp_path / "cache")
  prepare(c, "train")
  for path in root.glob("*/*.avi"):
    os.utime(path, (1, 1))
  used = prepare(c, "train").manifest["clips"][0]["key"]
  write_clip(root / used, moving_square(20, seed=99))
  with pytest.raises(ConfigError, match=f"0 clips are new and 1 changed.*{used}"):
    prepare(c, "train")
  shutil.rmtree(root)
  assert len(prepare(c, "train")) == 5


def test_new_clips_are_noticed(tmp_path):
  root = write_folder(tmp_path / "videos")
  c = config(root, tmp_path / "cache")
  prepare(c, "train")
  write_clip(root / "cat" / "more.avi", moving_square())
  with pytest.raises(ConfigError, match="1 clips are new and 0 changed.*cat/more.avi"):
    prepare(c, "train")


def test_broken_and_short_clips_are_reported(tmp_path, caplog):
  root = write_folder(tmp_path / "videos", clips=2)
  for i in range(3):
    (root / f"cat/broken{i}.avi").write_bytes(i * b"nothing")
    write_clip(root / f"dog/short{i}.avi", moving_square(3))
  train = prepare(config(root, tmp_path / "cache"), "train")
  skipped = {entry["key"]: entry["reason"] for entry in train.manifest["skipped"]}
  total = len(skipped) + len(train)
  assert len(skipped) >= 4 and f"{len(skipped)} of {total} train clips" in caplog.text
  for key, reason in skipped.items():
    expected = "3 frames, 4 are needed even at stride 1"
    assert ("cannot be opened" if "broken" in key else expected) in reason
    assert f"{key}: {reason}" in caplog.text


def test_no_usable_clip_is_one_sentence(tmp_path):
  (tmp_path / "a.avi").write_bytes(b"nothing")
  message = "None of the 1 train clips under .* can be used, e.g. a.avi: it cannot be opened"
  with pytest.raises(ConfigError, match=message):
    prepare(config(tmp_path, tmp_path / "cache"), "train")
  assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("how", ["write", "close", "before"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder, tmp_path, monkeypatch, how):
  class Full:
    def __init__(self, path, options):
      pass

    def write(self, record):
      if how == "write":
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):  # the library's own words, on closing
      raise RuntimeError("write() failed: No space left on device; writing x; at byte 204800")

  if how == "before":
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
  else:
    monkeypatch.setattr(cache_writer, "ArrayRecordWriter", Full)
  with pytest.raises(
    ConfigError, match="no space left in .*cache folder-train.* needs 1.1 MB, .* are free"
  ):
    prepare(config(folder, tmp_path), "train")
  assert not list(tmp_path.iterdir())


def test_cache_can_be_pickled_and_read_from_threads(cache):
  copy = pickle.loads(pickle.dumps(cache))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for i, item in enumerate(pool.map(lambda i: copy[i % len(copy)], range(200))):
      np.testing.assert_array_equal(item["latent"], cache[i % len(cache)]["latent"])


# ---- batches ----------------------------------------------------------------------------------


def test_iterator_resumes_with_the_very_batches(cache):
  iterator, fresh = (train_iterator(cache, 3, seed=1) for _ in range(2))
  for _ in range(5):
    next(iterator)
  fresh.set_state(json.loads(json.dumps(iterator.get_state())))
  for _ in range(5):
    expected, got = next(iterator), next(fresh)
    for name in ("latent", "label", "index"):
      np.testing.assert_array_equal(got[name], expected[name])


def test_each_epoch_is_a_new_permutation(cache):
  n = len(cache)

  def epochs(seed):
    iterator = train_iterator(cache, n, seed)
    return [tuple(next(iterator)["index"].tolist()) for _ in range(4)]

  assert all(sorted(epoch) == list(range(n)) for epoch in epochs(0)) and len(set(epochs(0))) > 1
  assert epochs(0) == epochs(0) != epochs(7)


def test_validation_is_in_order_and_pads_with_weight_zero(cache):
  batches = list(val_batches(cache, 4))
  index = np.concatenate([batch["index"] for batch in batches])
  weight = np.concatenate([batch["weight"] for batch in batches])
  assert all(batch["latent"].shape == (4, *cache.latent_shape) for batch in batches)
  assert index[weight == 1].tolist() == list(range(len(cache)))
  assert weight.sum() == len(cache) < len(weight)
  (limited,) = val_batches(cache, 4, limit=3)
  assert limited["weight"].tolist() == [1, 1, 1, 0] and limited["index"][2] > 4
