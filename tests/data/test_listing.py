"""A log line says what is taken for a data set, and sentences name what is probably not meant."""

import os
import pathlib
import shutil

import pytest
from PIL import Image

from freqformer.config import ConfigError
from freqformer.data import encode
from freqformer.data.cache import prepare
from freqformer.data.clips import EXTENSIONS, describe, doubts, list_clips, survey
from freqformer.data.sources import open_splits
from tests.data.helpers import (
  UCF_CLASSES,
  config,
  moving_square,
  write_clip,
  write_folder,
  write_ucf101,
)


def listed(root: pathlib.Path, **changes) -> tuple[str, list[str]]:
  """Returns the line about a folder and the doubts about it."""
  c = config(root, root.parent / "cache", **changes)
  train, val = (list_clips(c, split) for split in ("train", "val"))
  return describe(train, val), doubts(c, train, val)


def touch(*paths: pathlib.Path):
  """Writes files of different contents."""
  for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(str(path).encode())


def test_a_line_says_what_was_taken(tmp_path, caplog):
  root = tmp_path / "videos"
  touch(*(root / f"{name}/{i}.mp4" for name, n in (("cat", 7), ("dog", 3)) for i in range(n)))
  touch(root / "cat" / "a.srt", root / "b.srt", root / "README", root / ".hidden.mp4")
  line, sentences = listed(root, val_fraction=0.3, seed=1)
  assert line == (
    "train: 6 clips of 2 classes (cat 5, dog 1); val: 4 clips of 2 classes (cat 2, dog 2); "
    "passed over: .srt 2, without an ending 1"
  )
  assert sentences == []
  caplog.set_level("INFO")
  survey(config(root, tmp_path, val_fraction=0.3, seed=1))
  assert line in caplog.text


def test_every_usual_ending_is_taken_in_any_case(tmp_path):
  names = [f"{i}{ending}" for i, ending in enumerate(EXTENSIONS)] + ["a.MTS", "b.Mp4"]
  touch(*(tmp_path / "videos" / name for name in names))
  found = list_clips(config(tmp_path / "videos", tmp_path, val_fraction=0.01), "train")
  assert len(found.clips) == len(names) - 1 and not found.others


def test_pictures_are_videos_of_one_frame(tmp_path):
  root = tmp_path / "pictures"
  for i, ending in enumerate(("png", "jpg", "webp", "bmp")):
    path = root / "cat" / f"{i}.{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(moving_square(1, seed=i)[0]).save(path)
  assert len(prepare(config(root, tmp_path / "cache", frames=1), "all")) == 4
  with pytest.raises(ConfigError, match=r"no video file, only others \(.*.png 1.*\); known"):
    list_clips(config(root, tmp_path / "cache"), "train")


@pytest.mark.parametrize(
  "folders, train, val",
  [
    (("train", "val"), "train", "val"),
    (("train", "test"), "train", "test"),
    (("Training", "validation"), "Training", "validation"),
    (("train", "val", "test"), "train", "val"),
    (("train",), None, None),
    (("val", "test"), None, None),
    (("train", "val", "bus"), None, None),
  ],
)
def test_folders_named_after_splits_are_the_splits(tmp_path, folders, train, val):
  root = tmp_path / "videos"
  touch(*(root / folder / name / "a.mp4" for folder in folders for name in ("cat", "dog")))
  c = config(root, tmp_path)
  found = {split: list_clips(c, split) for split in ("train", "val")}
  if train is None:
    assert found["train"].class_names == sorted(folders)
    return
  for split, folder in (("train", train), ("val", val)):
    assert [clip.key for clip in found[split].clips] == [
      f"{folder}/{n}/a.mp4" for n in ("cat", "dog")
    ]
    assert found[split].class_names == ["cat", "dog"]
  left = {"below test/": 2} if len(folders) == 3 else {}
  assert found["train"].others == left


def test_classes_without_training_clips_are_named_and_kept(tmp_path):
  root = tmp_path / "videos"
  touch(*(root / f"{name}/a.mp4" for name in ("cat", "dog", "jump", "run", "sit")))
  c = config(root, tmp_path, val_fraction=0.25)
  (clip,) = list_clips(c, "val").clips
  _, (sentence,) = listed(root, val_fraction=0.25)
  assert sentence == (
    f"no training clip of {clip.key.split('/')[0]}: eval.py leaves such classes out unless they "
    "are named"
  )
  assert len(list_clips(c, "train").class_names) == 5


def test_a_root_one_level_too_high_is_doubted(tmp_path):
  root = tmp_path / "nest"
  touch(*(root / f"videos/{name}/{i}.mp4" for name in ("cat", "dog") for i in range(4)))
  _, (sentence,) = listed(root)
  assert "all clips are of one class, videos, in subfolders cat, dog" in sentence
  assert f"set data.root to {str(root / 'videos')!r}" in sentence
  assert listed(root / "videos")[1] == []


def test_the_same_file_in_both_splits_is_named(tmp_path):
  root = tmp_path / "videos"
  touch(*(root / f"cat/{i}.mp4" for i in range(12)))
  assert listed(root, val_fraction=0.3)[1] == []
  for i in range(12):
    shutil.copy(root / "cat" / f"{i}.mp4", root / "cat" / f"{i} (copy).mp4")
  _, (sentence,) = listed(root, val_fraction=0.3)
  assert "clips of val are in train, too (cat/" in sentence and " = cat/" in sentence


def test_one_clip_and_dangling_links_are_no_shared_files(tmp_path):
  alone = tmp_path / "alone"
  touch(alone / "a.mp4")
  assert listed(alone)[1] == []
  root = tmp_path / "links"
  root.mkdir()
  for i in range(12):
    (root / f"{i}.mp4").symlink_to(tmp_path / "nowhere.mp4")
  assert listed(root, val_fraction=0.3)[1] == []


def test_ucf101_by_folders_mixes_scenes(tmp_path):
  root = write_ucf101(tmp_path / "ucf") / "UCF-101"
  _, (sentence, *_) = listed(root)
  assert "several of each scene" in sentence and "data.source='ucf101'" in sentence


def test_ucf101_that_was_converted_is_found(tmp_path):
  root = write_ucf101(tmp_path / "ucf")
  expected = [clip.key for clip in list_clips(config(root, root, source="ucf101"), "train").clips]
  for i, path in enumerate(sorted(root.glob("UCF-101/*/*.avi"))):
    path.rename(path.with_suffix((".AVI", ".mp4")[i % 2]))
  found = list_clips(config(root, root, source="ucf101"), "train")
  assert [clip.key for clip in found.clips] == expected and not found.missing
  assert all(os.path.exists(clip.path) for clip in found.clips)


def test_ucf101_clips_of_both_lists_are_named(tmp_path):
  root = write_ucf101(tmp_path / "ucf")
  lists = root / "ucfTrainTestlist"
  both = (lists / "trainlist01.txt").read_text().splitlines()[0]
  (lists / "testlist01.txt").write_text(both + "\n")
  _, sentences = listed(root, source="ucf101")
  assert any("1 clips of val are in train, too" in sentence for sentence in sentences)


def test_both_splits_are_listed_before_one_is_encoded(tmp_path, monkeypatch):
  root = write_ucf101(tmp_path / "ucf")
  (root / "ucfTrainTestlist" / "testlist01.txt").unlink()
  monkeypatch.setattr(encode, "encode_clip", None)
  with pytest.raises(ConfigError, match="testlist01.txt' is missing"):
    open_splits(config(root, tmp_path / "cache", source="ucf101"))
  assert not (tmp_path / "cache").exists()


def test_caches_do_without_their_videos(tmp_path):
  root = write_folder(tmp_path / "videos")
  c = config(root, tmp_path / "cache")
  sizes = [len(split) for split in open_splits(c)]
  shutil.rmtree(root)
  assert [len(split) for split in open_splits(c)] == sizes


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
  root = tmp_path / "videos"
  touch(root / "cat" / "a.mp4", root / "dog" / "a.mp4")
  real = os.scandir

  def scandir(path):
    if os.fspath(path).endswith("dog"):
      raise PermissionError(13, "Permission denied", os.fspath(path))
    return real(path)

  monkeypatch.setattr(os, "scandir", scandir)
  with pytest.raises(ConfigError, match=r"videos/dog below data.root .* cannot be read \(Perm"):
    list_clips(config(root, tmp_path), "train")


@pytest.mark.parametrize("kind", ["dangling", "vanished", "unreadable"])
def test_what_is_wrong_with_a_file_costs_that_clip_alone(tmp_path, monkeypatch, kind):
  root = write_folder(tmp_path / "videos")
  clip = root / "cat" / "odd.avi"
  if kind == "dangling":
    clip.symlink_to(tmp_path / "nowhere.avi")
  else:
    write_clip(clip, moving_square())
  real = encode.fingerprint

  def fails(path):
    if path != str(clip) or kind == "dangling":
      return real(path)
    raise (
      PermissionError(13, "Permission denied")
      if kind == "unreadable"
      else FileNotFoundError(2, "No such file or directory")
    )

  monkeypatch.setattr(encode, "fingerprint", fails)
  cache = prepare(config(root, tmp_path / "cache"), "all")
  (entry,) = cache.manifest["skipped"]
  assert entry["key"] == "cat/odd.avi" and entry["reason"].startswith("it cannot be read (")
  assert len(cache) == 6
  if kind == "dangling":  # and is no news the next time
    assert prepare(config(root, tmp_path / "cache"), "all").path == cache.path


def test_names_that_are_no_utf8_are_encoded_and_printed(tmp_path, caplog):
  root = tmp_path / "videos"
  write_clip(root / "good.avi", moving_square())
  for name in (b"caf\xe9.avi", b"bad\xe9.avi"):
    path = os.path.join(os.fsencode(root), name)
    shutil.copy(root / "good.avi", path)
    if name.startswith(b"bad"):
      with open(path, "wb") as file:
        file.write(b"nothing")
  c = config(root, tmp_path / "cache")
  cache = prepare(c, "all")
  keys = [os.fsencode(clip["key"]) for clip in cache.manifest["clips"]]
  assert keys == [b"caf\xe9.avi", b"good.avi"] and len(cache) == 2
  assert r"bad\udce9.avi" in caplog.text
  assert prepare(c, "all").hash == cache.hash
  survey(c)


def test_max_clips_says_which_classes_it_drops(tmp_path):
  root = write_ucf101(tmp_path / "ucf")
  c = config(root, tmp_path, source="ucf101", max_clips=2)
  kept = {clip.label for clip in list_clips(c, "train").clips}
  dropped = [name for label, name in enumerate(UCF_CLASSES) if label not in kept]
  _, (sentence, *_) = listed(root, source="ucf101", max_clips=2)
  assert len(dropped) == 3 and sentence.startswith(f"no training clip of {', '.join(dropped)}:")
