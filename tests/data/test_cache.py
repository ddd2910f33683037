"""The latent cache is whole or absent, and batches come again exactly."""

import concurrent.futures
import dataclasses
import errno
import itertools
import json
import pickle
import shutil

import numpy as np
import pytest
from absl import logging as absl_logging

from freqformer.config import ConfigError
from freqformer.data import encode
from freqformer.data.cache import CacheError, LatentCache, cache_path, prepare
from freqformer.data.codec import psnr
from freqformer.data.decode import VideoFile, crop_resize
from freqformer.data.loader import train_iterator, val_batches
from tests.data.helpers import config, moving_square, write_clip, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
  return prepare(config(folder, tmp_path_factory.mktemp("cache"), views=2), "train", progress=False)


# ---- cache ------------------------------------------------------------------------------------------------------------


def test_cache_holds_what_the_codec_gives(folder, cache):
  assert len(cache) == 2 * len(cache.manifest["clips"]) and cache.latent_shape == (2, 4, 6, 24)
  item = cache[3]
  assert (
    item["latent"].dtype == np.float32 and item["label"].dtype == np.int32 and item["index"] == 3
  )
  entry = cache.clip(3)
  view = entry["views"][1]
  with VideoFile(folder / entry["key"]) as file:
    frames = file.read([view["start"] + 2 * i for i in range(4)])
  pixels = np.stack([crop_resize(f, view["box"], (16, 24)) for f in frames])[None]
  stored = cache.denormalise(item["latent"])
  # Latents are stored in 16 bits; the decoded video below says what that amounts to.
  np.testing.assert_allclose(stored, cache.codec.encode(pixels)[0], atol=2e-2)
  assert (
    psnr(cache.decode(item["latent"][None]), cache.codec.decode(stored[None], cache.video_shape))
    > 50
  )
  everything = np.stack([x["latent"] for x in cache])
  np.testing.assert_allclose(everything.mean((0, 1, 2, 3)), 0, atol=1e-3)
  np.testing.assert_allclose(everything.std((0, 1, 2, 3)), 1, atol=1e-3)
  assert cache.manifest["psnr"]["mean"] > 25 and cache.manifest["class_names"] == ["cat", "dog"]


def test_flips_are_encoded_from_mirrored_pixels(folder, tmp_path):
  plain, flipped = (
    config(folder, tmp_path, resolution=(24, 32), short="pad", frames=20, views=2, flip=f)
    for f in (False, True)
  )
  plain, flipped = (prepare(c, "train", progress=False) for c in (plain, flipped))
  sides = [v["flip"] for c in flipped.manifest["clips"] for v in c["views"]]
  assert sides.count(True) == sides.count(False) and not any(
    v["flip"] for v in plain.manifest["clips"][0]["views"]
  )
  for i, mirrored in enumerate(sides):
    a, b = (x.decode(x[i]["latent"][None])[0] for x in (plain, flipped))
    assert psnr(a, b[:, :, ::-1] if mirrored else b) > 30
    assert psnr(a, b if mirrored else b[:, :, ::-1]) < 20  # The ramp tells left from right.


def test_a_cache_is_used_again_and_other_protocols_get_their_own(folder, cache, monkeypatch):
  c = config(folder, cache.path.parent, views=2)
  monkeypatch.setattr(encode, "encode_clip", None)
  again = prepare(c, "train")
  np.testing.assert_array_equal(again[0]["latent"], cache[0]["latent"])
  assert cache_path(dataclasses.replace(c, stride=1), "train") != cache.path
  with pytest.raises(CacheError, match="was made with protocol"):
    LatentCache.open(cache.path, expect="0" * 64)


def test_val_has_the_statistics_of_train(folder, tmp_path):
  c = config(folder, tmp_path, val_fraction=0.4)
  val = prepare(c, "val", progress=False)
  train = prepare(c, "train")
  np.testing.assert_array_equal(val.statistics.mean, train.statistics.mean)
  assert not {x["key"] for x in val.manifest["clips"]} & {x["key"] for x in train.manifest["clips"]}
  manifest = json.loads((train.path / "manifest.json").read_text())
  manifest["statistics"]["mean"][0] += 1
  (train.path / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(CacheError, match="other statistics"):
    prepare(c, "val")


def test_an_interrupted_cache_is_never_used(folder, tmp_path, monkeypatch):
  c = config(folder, tmp_path)
  real, calls = encode.encode_clip, itertools.count()

  def fails_later(*args, **kwargs):
    if next(calls) == 2:
      raise KeyboardInterrupt
    return real(*args, **kwargs)

  monkeypatch.setattr(encode, "encode_clip", fails_later)
  with pytest.raises(KeyboardInterrupt):
    prepare(c, "train", progress=False)
  assert not list(tmp_path.iterdir())
  monkeypatch.undo()
  assert len(prepare(c, "train", progress=False)) == 5


def test_what_a_killed_process_left_is_ignored_and_removed(folder, tmp_path):
  c = config(folder, tmp_path)
  path = cache_path(c, "train")
  left = [
    path.with_name(f".{path.name}.{encode.os.uname().nodename}-{pid}.partial")
    for pid in (2**22 + 1, encode.os.getpid())
  ]
  for p in left:
    p.mkdir()
    (p / "latents-00000.array_record").write_bytes(b"half")
  assert len(prepare(c, "train", progress=False)) == 5 and not any(p.exists() for p in left)


def test_damaged_caches_are_refused(folder, tmp_path):
  c = config(folder, tmp_path)
  path = prepare(c, "train", progress=False).path
  shard = next(path.glob("*.array_record"))
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(CacheError, match="damaged: latents-00000"):
    prepare(c, "train")
  (path / "manifest.json").write_text("{")
  with pytest.raises(CacheError, match="not a complete cache"):
    prepare(c, "train")


def test_changed_clips_are_noticed_and_copied_ones_accepted(tmp_path):
  root = write_folder(tmp_path / "videos")
  c = config(root, tmp_path / "cache")
  prepare(c, "train", progress=False)
  for path in root.glob("*/*.avi"):
    encode.os.utime(path, (1, 1))
  used = prepare(c, "train").manifest["clips"][0]["key"]
  write_clip(root / used, moving_square(20, seed=99))
  with pytest.raises(CacheError, match=f"0 clips are new and 1 changed.*{used}"):
    prepare(c, "train")
  shutil.rmtree(root)
  assert len(prepare(c, "train")) == 5


def test_broken_and_short_clips_are_reported(tmp_path, monkeypatch):
  root = write_folder(tmp_path / "videos", clips=2)
  for i in range(3):
    (root / f"cat/broken{i}.avi").write_bytes(b"nothing")
    write_clip(root / f"dog/short{i}.avi", moving_square(3))
  told = []
  monkeypatch.setattr(absl_logging, "warning", lambda text, *args: told.append(text % args))
  train = prepare(config(root, tmp_path / "cache"), "train", progress=False)
  skipped = {entry["key"]: entry["reason"] for entry in train.manifest["skipped"]}
  assert (
    len(skipped) >= 4 and f"{len(skipped)} of {len(skipped) + len(train)} train clips" in told[0]
  )
  for key, reason in skipped.items():
    assert (
      "cannot be opened" if "broken" in key else "3 frames, 4 are needed even at stride 1"
    ) in reason
    assert f"{key}: {reason}" in told[0]


def test_no_usable_clip_is_one_sentence(tmp_path):
  (tmp_path / "videos").mkdir()
  (tmp_path / "videos/a.avi").write_bytes(b"nothing")
  with pytest.raises(
    ConfigError,
    match="None of the 1 train clips under .* can be used, e.g. a.avi: it cannot be opened",
  ):
    prepare(config(tmp_path / "videos", tmp_path / "cache"), "train", progress=False)
  assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("how", ["write", "close", "before"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder, tmp_path, monkeypatch, how):
  class Full:
    def __init__(self, path, options):
      pass

    def write(self, record):
      if how == "write":
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):  # The library's own words, on closing.
      raise RuntimeError("write() failed: No space left on device; writing x; at byte 204800")

  if how == "before":
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
  else:
    monkeypatch.setattr(encode, "ArrayRecordWriter", Full)
  with pytest.raises(CacheError, match="No space left in .*needs about 1.0 MiB and .* were free"):
    prepare(config(folder, tmp_path), "train", progress=False)
  assert not list(tmp_path.iterdir())


def test_cache_can_be_pickled_and_read_from_threads(cache):
  cache[0]
  copy = pickle.loads(pickle.dumps(cache))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for i, item in enumerate(pool.map(lambda i: copy[i % len(copy)], range(200))):
      np.testing.assert_array_equal(item["latent"], cache[i % len(cache)]["latent"])
  with pytest.raises(IndexError, match="number 999"):
    cache[999]


# ---- batches ----------------------------------------------------------------------------------------------------------


def test_iterator_resumes_with_the_very_batches(cache):
  iterator = train_iterator(cache, 3, seed=1)
  for _ in range(5):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(5)]
  fresh = train_iterator(cache, 3, seed=1)
  fresh.set_state(state)
  for batches in (fresh, train_iterator(cache, 3, seed=1, start=5)):
    for batch in expected:
      got = next(batches)
      for name in ("latent", "label", "index"):
        np.testing.assert_array_equal(got[name], batch[name])


def test_each_epoch_is_a_new_permutation_and_shards_part_it(cache):
  n = len(cache)
  iterator = train_iterator(cache, n, seed=0)
  epochs = [next(iterator)["index"].tolist() for _ in range(4)]
  assert all(sorted(e) == list(range(n)) for e in epochs) and len(set(map(tuple, epochs))) > 1
  assert next(train_iterator(cache, n, seed=0))["index"].tolist() == epochs[0]
  assert next(train_iterator(cache, n, seed=7))["index"].tolist() != epochs[0]
  halves = [
    next(train_iterator(cache, n // 2, seed=0, shard=(i, 2)))["index"].tolist() for i in (0, 1)
  ]
  assert halves == [epochs[0][0::2], epochs[0][1::2]]


def test_batch_may_be_larger_than_the_data_set(cache):
  batch = next(train_iterator(cache, 2 * len(cache) + 1, seed=0))
  assert (
    batch["latent"].shape == (2 * len(cache) + 1, *cache.latent_shape)
    and batch["label"].dtype == np.int32
  )
  with pytest.raises(ConfigError, match="at least 1, got 0"):
    train_iterator(cache, 0, seed=0)


def test_validation_is_in_order_and_pads_with_weight_zero(cache):
  batches = list(val_batches(cache, 4))
  index = np.concatenate([b["index"] for b in batches])
  weight = np.concatenate([b["weight"] for b in batches])
  assert all(b["latent"].shape == (4, *cache.latent_shape) for b in batches)
  assert index[weight == 1].tolist() == list(range(len(cache))) and weight.sum() == len(
    cache
  ) < len(weight)
  limited = list(val_batches(cache, 4, limit=3))
  assert (
    len(limited) == 1
    and limited[0]["weight"].tolist() == [1, 1, 1, 0]
    and limited[0]["index"][2] > 4
  )
