"""From files to views: lists of clips, decoding, drawing."""

import dataclasses
import itertools
import shutil

import av
import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.data import decode as video
from freqformer.data.cache import prepare
from freqformer.data.clips import list_clips
from freqformer.data.codec import CodecConfig
from freqformer.data.decode import VideoFile, crop_resize
from freqformer.data.protocol import BrokenClip, Footage, draw_view
from tests.data import helpers
from tests.data.helpers import UCF_CLASSES, config, moving_square, psnr, write_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return helpers.write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def ucf(tmp_path):
  return helpers.write_ucf101(tmp_path / "ucf")


def steady(frames: int, size=(8, 8), fps: float = 25) -> Footage:
  """Footage of a constant rate."""
  return Footage(size, tuple(i / fps for i in range(frames)))


def ucf_config(root, **changes):
  return config(root, root / "cache", source="ucf101", **changes)


def test_hash_covers_what_changes_latents_and_nothing_else():
  c = config("data", "cache")
  unread = {"cache", "workers", "root", "split", "array", "axes"}
  # Caches from before these keys are still those of classes.
  unread |= {"condition", "embedding_size", "embedding_array", "embedder", "embedder_path"}
  read = {field.name for field in dataclasses.fields(c)} - unread
  assert c.protocol().keys() == read | {"version", "codec_version"}
  for changes, same in (
    (dict(root="data/"), True),
    (dict(split=2), True),  # which only UCF-101 has
    (dict(root="data2"), True),  # data may move
    (dict(fps=8.0, stride=1), False),
    (dict(codec=CodecConfig(factor=(2, 4, 4), channels=23)), False),
    (dict(source="ucf101"), False),
    (dict(condition="none"), False),
    (dict(condition="embedding", embedding_size=4), False),
  ):
    other = dataclasses.replace(c, **changes)
    assert (other.protocol_hash == c.protocol_hash) == same, changes
  ucf = dataclasses.replace(c, source="ucf101")
  assert dataclasses.replace(ucf, val_fraction=0.2).protocol_hash == ucf.protocol_hash
  assert dataclasses.replace(ucf, split=2).protocol_hash != ucf.protocol_hash


def test_views_depend_on_seed_clip_and_number_only():
  c = config("x", "y", crop="random", flip=True, views=4)
  footage = steady(100, (48, 100))
  views = [draw_view(c, "train", "a/b.avi", i, footage) for i in range(40)]
  assert len({v.frames[0] for v in views}) > 20 and len({v.box for v in views}) > 20
  assert all(0 <= v.frames[0] <= 93 and max(v.frames) <= 99 for v in views)
  assert all(a.flip != b.flip for a, b in itertools.pairwise(views))
  assert len({draw_view(c, "train", str(k), 0, footage).flip for k in range(20)}) == 2
  other = dataclasses.replace(c, seed=1)
  assert draw_view(other, "train", "a/b.avi", 0, footage) != views[0]
  val = draw_view(c, "val", "a/b.avi", 0, footage)
  assert val.frames[0] == 47 and not val.flip and val.box == (0, 0.14, 1, 0.86)


def test_short_clips_are_padded_clamped_or_skipped():
  def draw(short, length):
    c = config("x", "y", frames=16, stride=3, short=short)
    return draw_view(c, "train", "k", 0, steady(length))

  assert draw("pad", 29).frames[-7:] == (27, *[28] * 6)
  assert draw("clamp", 31).fps == 12.5
  assert draw("clamp", 31).frames == tuple(range(0, 31, 2))
  with pytest.raises(BrokenClip, match="k: it has 29 frames, 46 are needed"):
    draw("skip", 29)
  with pytest.raises(BrokenClip, match="even at stride 1"):
    draw("clamp", 15)


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv"])
def test_chosen_frames_of_any_container(tmp_path, suffix):
  original = moving_square()
  with VideoFile(write_clip(tmp_path / f"clip{suffix}", original)) as file:
    assert file.length == 20 and file.size == (24, 32)
    frames = file.read([3, 7, 7, 19])
    assert psnr(np.stack(frames), original[[3, 7, 7, 19]]) > 28
    file.length = 30
    assert file.read([0, 25]) is None and file.length == 20


def test_seeking_gives_the_very_frames_of_decoding_through(tmp_path, monkeypatch):
  path = write_clip(tmp_path / "long.mp4", moving_square(60))
  with VideoFile(path) as file:
    through = file.read([40, 45, 50])
    monkeypatch.setattr(video, "SEEK_AFTER", 5)
    opened = []
    monkeypatch.setattr(file, "_open", lambda: opened.append(1) or av.open(str(path)))
    decoded = []
    monkeypatch.setattr(file, "_counts", lambda frame: decoded.append(1) or True)
    sought = file.read([40, 45, 50])
  np.testing.assert_array_equal(sought, through)
  assert len(opened) == 1 and len(decoded) < 30


def test_frame_counts_of_the_container_are_not_trusted(tmp_path):
  path = write_clip(tmp_path / "clip.avi", moving_square(20))
  data = path.read_bytes()
  place = data.index(b"avih") + 8 + 16  # dwTotalFrames
  for claimed in (0, 7, 500):
    path.write_bytes(data[:place] + claimed.to_bytes(4, "little") + data[place + 4 :])
    with VideoFile(path) as file:
      assert file.length == 20 and len(file.read([0, 19])) == 2
  movie, index = data.index(b"movi"), data.index(b"idx1")
  # An interrupted download: the index is gone too.
  path.write_bytes(data[: (movie + 2 * index) // 3])
  with VideoFile(path) as file:
    assert file.length == 13 and not file.damaged
    # The last one is cut.
    assert file.read(list(range(13))) is None and (file.length, file.damaged) == (12, 1)
    assert len(file.read(list(range(12)))) == 12


def test_a_phone_s_turn_is_applied(tmp_path):
  path = write_clip(tmp_path / "clip.mp4", moving_square(4))
  data = path.read_bytes()
  upright = b"".join(v.to_bytes(4, "big") for v in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
  quarter = b"".join(
    (v % 2**32).to_bytes(4, "big") for v in (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
  )
  place = data.index(upright, data.index(b"tkhd"))
  path.write_bytes(data[:place] + quarter + data[place + len(quarter) :])
  with VideoFile(path) as file:
    frame = file.read([0])[0]
  assert file.size == frame.shape[:2] == (32, 24)
  # Shown a quarter turn clockwise, the bright right is below.
  assert frame[-4:].mean() > frame[:4].mean() + 50


def test_crop_then_resize():
  image = moving_square(1, 24, 32)[0]
  np.testing.assert_array_equal(crop_resize(image, (0, 0, 1, 1), (24, 32)), image)
  cut = crop_resize(image, (0.25, 0.5, 0.75, 1), (12, 16))
  np.testing.assert_array_equal(cut, image[6:18, 16:])
  assert crop_resize(image, (0, 0, 1, 1), (7, 13)).shape == (7, 13, 3)


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
  key = "JumpRope/v_JumpRope_g02_c01.avi"
  assert listing.missing == {key: "it is listed in trainlist01.txt but not on disk"}
  skipped = prepare(ucf_config(ucf), "train").manifest["skipped"]
  assert [entry["key"] for entry in skipped] == [key]


@pytest.mark.parametrize(
  "old, new, words",
  [
    ("JumpRope/", "JumpRopes/", "'JumpRopes' is not in classInd.txt; did you mean 'JumpRope'"),
    (" 5", " 4", "has class id 4, but classInd.txt gives JumpRope 5"),
    (None, "", "lists no clip"),
  ],
)
def test_ucf101_refuses_wrong_lists(ucf, old, new, words):
  train = ucf / "ucfTrainTestlist/trainlist01.txt"
  train.write_text(train.read_text().replace(old, new) if old else new)
  with pytest.raises(ConfigError, match=words):
    list_clips(ucf_config(ucf), "train")
  with pytest.raises(ConfigError, match="trainlist03.txt' is missing"):
    list_clips(ucf_config(ucf, split=3), "train")


def test_ucf101_that_is_not_there_says_where_to_get_it(tmp_path):
  (tmp_path / "empty").mkdir()
  for root in (tmp_path / "nowhere", tmp_path / "empty"):
    with pytest.raises(ConfigError, match="RecognitionTask.zip.*crcv.ucf.edu.*make demo"):
      list_clips(ucf_config(root), "train")


def test_folder_classes_and_split(folder, tmp_path):
  c = config(folder, tmp_path, val_fraction=0.5)
  train, val = list_clips(c, "train"), list_clips(c, "val")
  assert train.class_names == ["cat", "dog"] and train.clips and val.clips
  keys = {x.key for x in train.clips} | {x.key for x in val.clips}
  assert keys == {f"{name}/{i}.avi" for name in ("cat", "dog") for i in range(3)}
  assert len(train.clips) + len(val.clips) == 6
  assert {x.key: x.label for x in train.clips + val.clips} == {k: int(k[0] == "d") for k in keys}


def test_a_folder_of_train_and_val_has_its_own_splits(tmp_path):
  for split, name in (("train", "cat"), ("train", "dog"), ("val", "dog")):
    write_clip(tmp_path / split / name / "a.mp4", moving_square())
  c = config(tmp_path, tmp_path / "cache", val_fraction=0.9)
  train, val = (list_clips(c, split) for split in ("train", "val"))
  assert {x.key: x.label for x in train.clips} == {"train/cat/a.mp4": 0, "train/dog/a.mp4": 1}
  assert {x.key: x.label for x in val.clips} == {"val/dog/a.mp4": 1}
  assert train.class_names == val.class_names == ["cat", "dog"]
  write_clip(tmp_path / "bus" / "a.mp4", moving_square())  # so train is a class, too
  assert list_clips(c, "train").class_names == ["bus", "train", "val"]


def test_flat_single_and_empty_folders(tmp_path):
  root = tmp_path / "mine"
  root.mkdir()
  c = config(root, tmp_path / "cache", crop="random", val_fraction=0.01)
  with pytest.raises(ConfigError, match="holds no video file"):
    list_clips(c, "train")
  with pytest.raises(ConfigError, match="is not a folder"):
    list_clips(config(tmp_path / "nowhere", tmp_path), "train")
  write_clip(root / "a.mp4", moving_square())
  train = prepare(c, "train")
  val = prepare(c, "val")
  assert len(train) == len(val) == 1 and train.class_names == ["mine"]
  assert train.manifest["clips"][0]["views"] != val.manifest["clips"][0]["views"]
  write_clip(root / "b.mp4", moving_square())
  assert [len(list_clips(c, split).clips) for split in ("train", "val")] == [1, 1]


def test_max_clips_spreads_over_classes(ucf):
  clips = list_clips(ucf_config(ucf, max_clips=5), "train").clips
  assert sorted(clip.label for clip in clips) == [0, 1, 2, 3, 4]


def test_a_broken_file_is_named(tmp_path):
  (tmp_path / "clip.avi").write_bytes(b"no video" * 1000)
  with pytest.raises(BrokenClip, match="a/clip.avi: it cannot be opened"):
    VideoFile(tmp_path / "clip.avi", "a/clip.avi")
