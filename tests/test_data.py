"""The data path from files to batches: lists, views, decoding, cache, iterator. Each trap of the formats has its test."""

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

from freqformer.codec import CodecConfig, psnr
from freqformer.config import ConfigError, build
from freqformer.data import encode, video
from freqformer.data.cache import CacheError, LatentCache, cache_path, prepare
from freqformer.data.clips import list_clips
from freqformer.data.loader import train_iterator, val_batches
from freqformer.data.protocol import DataConfig, TooShort, draw_view
from freqformer.data.video import BrokenClip, VideoFile, crop_resize
from tests.data_helpers import UCF_CLASSES, config, moving_square, write_clip, write_folder, write_ucf101


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
  return prepare(config(folder, tmp_path_factory.mktemp("cache"), views=2), "train", progress=False)


@pytest.fixture
def ucf(tmp_path):
  return write_ucf101(tmp_path / "ucf")


def ucf_config(root, **changes):
  return config(root, root / "cache", source="ucf101", **changes)


# ---- protocol and views -----------------------------------------------------------------------------------------------


def test_hash_covers_what_changes_latents_and_nothing_else():
  base = config("data", "cache")
  for same in (dict(cache="elsewhere"), dict(workers=7), dict(root="data/"), dict(split=2)):
    assert dataclasses.replace(base, **same).protocol_hash == base.protocol_hash, same
  for other in (
    dict(root="data2"),
    dict(resolution=(24, 16)),
    dict(frames=5),
    dict(stride=1),
    dict(crop="random"),
    dict(flip=True),
    dict(views=2),
    dict(short="pad"),
    dict(seed=1),
    dict(val_fraction=0.2),
    dict(max_clips=3),
    dict(codec=CodecConfig(factor=(2, 4, 4), channels=23)),
  ):
    assert dataclasses.replace(base, **other).protocol_hash != base.protocol_hash, other


def test_config_comes_from_a_dict_and_refuses_in_one_sentence():
  values = dict(source="folder", root="x", resolution=[16, 24], frames=4, codec=dict(factor=[1, 4, 4], channels=8))
  assert build(DataConfig, values, "data").video_shape == (4, 16, 24)
  for wrong, words in (
    (dict(source="folders"), "did you mean 'folder'"),
    (dict(crop="middle"), "known: center, random"),
    (dict(frames=0), "at least 1, got 0"),
    (dict(split=4), "1, 2 or 3"),
    (dict(val_fraction=1.0), "between 0 and 1"),
    (dict(resolution=[0, 4]), "rows, cols"),
    (dict(stryde=1), "did you mean 'stride'"),
  ):
    with pytest.raises(ConfigError, match=words):
      build(DataConfig, values | wrong, "data")


def test_views_depend_on_seed_clip_and_number_only():
  c = config("x", "y", crop="random", flip=True, views=4)
  views = [draw_view(c, "train", "a/b.avi", i, 100, (48, 100)) for i in range(40)]
  assert views == [draw_view(c, "train", "a/b.avi", i, 100, (48, 100)) for i in range(40)]
  assert len({v.start for v in views}) > 20 and len({v.box for v in views}) > 20
  assert all(0 <= v.start <= 93 and max(v.indices(4, 100)) <= 99 for v in views)
  assert all(a.flip != b.flip for a, b in itertools.pairwise(views))
  assert len({draw_view(c, "train", str(k), 0, 100, (48, 100)).flip for k in range(20)}) == 2
  other = dataclasses.replace(c, seed=1)
  assert draw_view(other, "train", "a/b.avi", 0, 100, (48, 100)) != views[0]
  val = draw_view(c, "val", "a/b.avi", 0, 100, (48, 100))
  assert val.start == 47 and not val.flip and val.box == (0, 0.14, 1, 0.86)


def test_short_clips_are_padded_clamped_or_skipped():
  c = config("x", "y", frames=16, stride=3)
  assert draw_view(dataclasses.replace(c, short="pad"), "train", "k", 0, 29, (8, 8)).indices(16, 29)[-7:] == [27] + [28] * 6
  clamped = draw_view(dataclasses.replace(c, short="clamp"), "train", "k", 0, 31, (8, 8))
  assert clamped.stride == 2 and clamped.indices(16, 31) == list(range(0, 31, 2))
  with pytest.raises(TooShort, match="29 frames, 46 are needed"):
    draw_view(dataclasses.replace(c, short="skip"), "train", "k", 0, 29, (8, 8))
  with pytest.raises(TooShort, match="even at stride 1"):
    draw_view(c, "train", "k", 0, 15, (8, 8))


# ---- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, fps", [(".avi", 25), (".mp4", 30), (".mkv", 8)])
def test_chosen_frames_of_any_container(tmp_path, suffix, fps):
  original = moving_square()
  with VideoFile(write_clip(tmp_path / f"clip{suffix}", original, fps)) as file:
    assert file.length == 20 and file.size == (24, 32)
    frames = file.read([3, 7, 7, 19])
  assert psnr(np.stack(frames), original[[3, 7, 7, 19]]) > 28


def test_seeking_gives_the_very_frames_of_decoding_through(tmp_path, monkeypatch):
  path = write_clip(tmp_path / "long.mp4", moving_square(60))
  with VideoFile(path) as file:
    through = file.read([40, 45, 50])
    monkeypatch.setattr(video, "SEEK_AFTER", 5)
    sought = file._read_from([40, 45, 50], seek=True)
  np.testing.assert_array_equal(sought, through)


def test_frame_counts_of_the_container_are_not_trusted(tmp_path):
  path = write_clip(tmp_path / "clip.avi", moving_square(20))
  data = path.read_bytes()
  place = data.index(b"avih") + 8 + 16  # dwTotalFrames
  for claimed in (0, 7, 500):
    path.write_bytes(data[:place] + claimed.to_bytes(4, "little") + data[place + 4 :])
    with VideoFile(path) as file:
      assert file.length == 20 and len(file.read([0, 19])) == 2
  movie, index = data.index(b"movi"), data.index(b"idx1")
  path.write_bytes(data[: (movie + 2 * index) // 3])  # An interrupted download: the index is gone too.
  with VideoFile(path) as file:
    assert 5 < file.length < 20 and file.read(list(range(file.length))) is not None


def test_past_the_end_says_how_many_frames_there_are(tmp_path):
  with VideoFile(write_clip(tmp_path / "clip.avi", moving_square(20))) as file:
    file.length = 30
    assert file.read([0, 25]) is None and file.length == 20


@pytest.mark.parametrize("data", [b"", b"no video" * 1000])
def test_a_broken_file_is_named(tmp_path, data):
  path = tmp_path / "clip.avi"
  path.write_bytes(data)
  with pytest.raises(BrokenClip, match="a/clip.avi: it cannot be opened") as error:
    VideoFile(path, "a/clip.avi")
  assert pickle.loads(pickle.dumps(error.value)).name == "a/clip.avi"


def test_crop_then_resize():
  image = moving_square(1, 24, 32)[0]
  np.testing.assert_array_equal(crop_resize(image, (0, 0, 1, 1), (24, 32)), image)
  np.testing.assert_array_equal(crop_resize(image, (0.25, 0.5, 0.75, 1), (12, 16)), image[6:18, 16:])
  assert crop_resize(image, (0, 0, 1, 1), (7, 13)).shape == (7, 13, 3)


# ---- lists ------------------------------------------------------------------------------------------------------------


def test_ucf101_labels_follow_class_ind(ucf):
  train, val = (list_clips(ucf_config(ucf), split) for split in ("train", "val"))
  assert train.class_names == list(UCF_CLASSES) and not train.missing
  assert (len(train.clips), len(val.clips)) == (10, 5)
  for clip in train.clips + val.clips:
    assert UCF_CLASSES[clip.label] == clip.key.split("/")[0]
  assert any("HandstandPushups/v_HandStandPushups_g02_c01.avi" == clip.key for clip in train.clips)
  assert len(list_clips(ucf_config(ucf, split=0), "train").clips) == 15


def test_ucf101_is_found_one_level_up_or_down_and_in_any_case(ucf, tmp_path):
  expected = len(list_clips(ucf_config(ucf), "train").clips)
  assert len(list_clips(ucf_config(ucf / "UCF-101"), "train").clips) == expected
  videos = ucf / "UCF-101"
  (videos / "HandstandPushups").rename(videos / "HandStandPushups")
  (ucf / "inner").mkdir()
  videos.rename(ucf / "inner" / "UCF-101")
  assert len(list_clips(ucf_config(ucf), "train").clips) == expected
  shutil.copytree(ucf / "inner", ucf / "other")
  with pytest.raises(ConfigError, match="several folders UCF-101"):
    list_clips(ucf_config(ucf), "train")


def test_ucf101_missing_clips_are_counted_by_name(ucf):
  (ucf / "UCF-101/JumpRope/v_JumpRope_g02_c01.avi").unlink()
  listing = list_clips(ucf_config(ucf), "train")
  assert len(listing.clips) == 9
  assert listing.missing == {"JumpRope/v_JumpRope_g02_c01.avi": "it is listed in trainlist01.txt but not on disk"}
  assert [s["key"] for s in prepare(ucf_config(ucf), "train", progress=False).manifest["skipped"]] == list(listing.missing)


def test_ucf101_refusals(ucf, tmp_path):
  train = ucf / "ucfTrainTestlist/trainlist01.txt"
  good = train.read_text()
  for text, words in (
    (good.replace("JumpRope/", "JumpRopes/"), "'JumpRopes' is not in classInd.txt; did you mean 'JumpRope'"),
    (good.replace(" 5", " 4"), "has class id 4, but classInd.txt gives JumpRope 5"),
    ("", "lists no clip"),
  ):
    train.write_text(text)
    with pytest.raises(ConfigError, match=words):
      list_clips(ucf_config(ucf), "train")
  for root in (tmp_path / "nowhere", tmp_path / "empty"):
    with pytest.raises(ConfigError, match="RecognitionTask.zip.*crcv.ucf.edu.*make demo"):
      list_clips(ucf_config(root), "train")
    (tmp_path / "empty").mkdir(exist_ok=True)
  with pytest.raises(ConfigError, match="trainlist03.txt' is missing"):
    list_clips(ucf_config(ucf, split=3), "train")


def test_folder_classes_and_split(folder, tmp_path):
  c = config(folder, tmp_path, val_fraction=0.5)
  train, val = list_clips(c, "train"), list_clips(c, "val")
  assert train.class_names == ["cat", "dog"] and train.clips and val.clips
  keys = {x.key for x in train.clips} | {x.key for x in val.clips}
  assert keys == {f"{name}/{i}.avi" for name in ("cat", "dog") for i in range(3)}
  assert len(train.clips) + len(val.clips) == 6
  assert {x.key: x.label for x in train.clips + val.clips} == {k: int(k[0] == "d") for k in keys}


def test_flat_single_and_empty_folders(tmp_path):
  root = tmp_path / "mine"
  root.mkdir()
  c = config(root, tmp_path / "cache", crop="random", val_fraction=0.01)
  with pytest.raises(ConfigError, match="holds no video file"):
    list_clips(c, "train")
  with pytest.raises(ConfigError, match="is not a folder"):
    list_clips(config(tmp_path / "nowhere", tmp_path), "train")
  write_clip(root / "a.mp4", moving_square())
  one = prepare(c, "train", progress=False), prepare(c, "val", progress=False)
  assert [len(x) for x in one] == [1, 1] and one[0].class_names == ["mine"]
  assert one[0].manifest["clips"][0]["views"] != one[1].manifest["clips"][0]["views"]
  write_clip(root / "b.mp4", moving_square())
  assert [len(list_clips(c, split).clips) for split in ("train", "val")] == [1, 1]


def test_max_clips_spreads_over_classes(ucf):
  clips = list_clips(ucf_config(ucf, max_clips=5), "train").clips
  assert sorted(clip.label for clip in clips) == [0, 1, 2, 3, 4]


# ---- cache ------------------------------------------------------------------------------------------------------------


def test_cache_holds_what_the_codec_gives(folder, cache):
  assert len(cache) == 2 * len(cache.manifest["clips"]) and cache.latent_shape == (2, 4, 6, 24)
  item = cache[3]
  assert item["latent"].dtype == np.float32 and item["label"].dtype == np.int32 and item["index"] == 3
  entry = cache.clip(3)
  view = entry["views"][1]
  with VideoFile(folder / entry["key"]) as file:
    frames = file.read([view["start"] + 2 * i for i in range(4)])
  pixels = np.stack([crop_resize(f, view["box"], (16, 24)) for f in frames])[None]
  stored = cache.denormalise(item["latent"])
  np.testing.assert_allclose(stored, cache.codec.encode(pixels)[0], atol=2e-2)
  assert psnr(cache.decode(item["latent"][None]), cache.codec.decode(stored[None], cache.video_shape)) > 50
  everything = np.stack([x["latent"] for x in cache])
  np.testing.assert_allclose(everything.mean((0, 1, 2, 3)), 0, atol=1e-3)
  np.testing.assert_allclose(everything.std((0, 1, 2, 3)), 1, atol=1e-3)
  assert cache.manifest["psnr"]["mean"] > 25 and cache.manifest["class_names"] == ["cat", "dog"]


def test_flips_are_encoded_from_mirrored_pixels(folder, tmp_path):
  plain, flipped = (
    config(folder, tmp_path, resolution=(24, 32), short="pad", frames=20, views=2, flip=f) for f in (False, True)
  )
  plain, flipped = (prepare(c, "train", progress=False) for c in (plain, flipped))
  sides = [v["flip"] for c in flipped.manifest["clips"] for v in c["views"]]
  assert sides.count(True) == sides.count(False) and not any(v["flip"] for v in plain.manifest["clips"][0]["views"])
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
  left = [path.with_name(f".{path.name}.{encode.os.uname().nodename}-{pid}.partial") for pid in (2**22 + 1, encode.os.getpid())]
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
  assert len(skipped) >= 4 and f"{len(skipped)} of {len(skipped) + len(train)} train clips" in told[0]
  for key, reason in skipped.items():
    assert ("cannot be opened" if "broken" in key else "3 frames, 4 are needed even at stride 1") in reason
    assert f"{key}: {reason}" in told[0]


def test_no_usable_clip_is_one_sentence(tmp_path):
  (tmp_path / "videos").mkdir()
  (tmp_path / "videos/a.avi").write_bytes(b"nothing")
  with pytest.raises(ConfigError, match="None of the 1 train clips under .* can be used, e.g. a.avi: it cannot be opened"):
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
  with pytest.raises(CacheError, match="No space left in .*needs about 0.00 GiB and .* were free"):
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
  halves = [next(train_iterator(cache, n // 2, seed=0, shard=(i, 2)))["index"].tolist() for i in (0, 1)]
  assert halves == [epochs[0][0::2], epochs[0][1::2]]


def test_batch_may_be_larger_than_the_data_set(cache):
  batch = next(train_iterator(cache, 2 * len(cache) + 1, seed=0))
  assert batch["latent"].shape == (2 * len(cache) + 1, *cache.latent_shape) and batch["label"].dtype == np.int32
  with pytest.raises(ConfigError, match="at least 1, got 0"):
    train_iterator(cache, 0, seed=0)


def test_validation_is_in_order_and_pads_with_weight_zero(cache):
  batches = list(val_batches(cache, 4))
  index = np.concatenate([b["index"] for b in batches])
  weight = np.concatenate([b["weight"] for b in batches])
  assert all(b["latent"].shape == (4, *cache.latent_shape) for b in batches)
  assert index[weight == 1].tolist() == list(range(len(cache))) and weight.sum() == len(cache) < len(weight)
  limited = list(val_batches(cache, 4, limit=3))
  assert len(limited) == 1 and limited[0]["weight"].tolist() == [1, 1, 1, 0] and limited[0]["index"][2] > 4
