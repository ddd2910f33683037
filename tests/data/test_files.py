"""A .tar file counts as the files that it unpacks to, bit for bit; damaged ones are named."""

import io
import tarfile

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.data.cache import prepare
from freqformer.data.clips import list_clips
from freqformer.data.files import members, read
from tests.data.helpers import config, write_folder
from tests.data.test_embedding import captioned, embedded
from tests.data.test_latents import SHAPE, settings, write_latents


def pack(folder, tar, keep=lambda name: True):
  """Writes the files below a folder, those that `keep` wants, into a .tar file."""
  tar.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(tar, "w") as packed:
    for path in sorted(folder.rglob("*.*")):
      name = path.relative_to(folder).as_posix()
      if keep(name):
        packed.add(path, arcname=f"./{name}")


def videos(tmp_path):
  return write_folder(tmp_path / "plain"), config


def latents(tmp_path):
  write_latents(tmp_path / "plain")
  return tmp_path / "plain", lambda root, cache: settings(root, cache=str(cache))


def captions(tmp_path):
  for i, key in enumerate(write_latents(tmp_path / "plain")):
    (tmp_path / "plain" / key).with_suffix(".txt").write_text(f"a cat {i * 'o'}")
  return tmp_path / "plain", lambda root, cache: captioned(root, cache=str(cache))


def embeddings(tmp_path):
  for i, key in enumerate(write_latents(tmp_path / "plain")):
    np.save((tmp_path / "plain" / key).with_suffix(".embedding.npy"), np.float32([i, 1, 2, 3]))
  return tmp_path / "plain", lambda root, cache: embedded(root, cache=str(cache))


@pytest.mark.parametrize("make", [videos, latents, captions, embeddings])
def test_shards_are_what_they_unpack_to(tmp_path, make):
  plain, settings_of = make(tmp_path)
  for place, name in enumerate(("cat", "dog")):
    pack(plain, tmp_path / "packed" / f"{place}.tar", lambda key, name=name: key.startswith(name))
  for split in ("train", "val"):
    want, got = (
      prepare(settings_of(tmp_path / root, tmp_path / f"cache-{root}"), split)
      for root in ("plain", "packed")
    )
    assert len(want) and want.class_names == got.class_names and want.hash == got.hash
    for ours, theirs in zip(got, want, strict=True):
      for name in ("latent", "label", "index"):
        np.testing.assert_array_equal(ours[name], theirs[name])
  # The cache of a folder is that of its shards.
  moved = settings_of(tmp_path / "packed", tmp_path / "cache-plain")
  assert prepare(moved, "train").path.parent.name == "cache-plain"
  assert len(list((tmp_path / "cache-plain").glob("*-train-*"))) == 1


def test_folders_of_shards_named_after_splits_are_the_splits(tmp_path):
  write_latents(tmp_path / "plain", 2)
  for split, name in (("train", "cat"), ("val", "dog")):
    tar = tmp_path / "packed" / split / "0.tar"
    pack(tmp_path / "plain", tar, lambda key, name=name: key.startswith(name))
  found = {s: list_clips(settings(tmp_path / "packed"), s) for s in ("train", "val")}
  assert [clip.key for clip in found["train"].clips] == ["train/cat/0.npy", "train/cat/1.npy"]
  assert [clip.key for clip in found["val"].clips] == ["val/dog/0.npy", "val/dog/1.npy"]


def test_labels_beside_the_clips_are_their_classes(tmp_path):
  """As WebDataset has them: members of one stem are a sample."""
  with tarfile.open(tmp_path / "0.tar", "w") as packed:
    for i, name in enumerate(("7", "cat\n", "7")):
      array = io.BytesIO()
      np.save(array, np.full(SHAPE, i, np.float32))
      parts = {"npy": array.getvalue(), "cls": name.encode(), "json": b"{}"}
      for ending, contents in parts.items():
        info = tarfile.TarInfo(f"000{i}.{ending}")
        info.size = len(contents)
        packed.addfile(info, io.BytesIO(contents))
  listing = list_clips(settings(tmp_path), "all")
  assert listing.class_names == ["7", "cat"] and listing.others == {".json": 3}
  assert [clip.label for clip in listing.clips] == [0, 1, 0]
  (tmp_path / "9.cls").write_text("a/b")
  np.save(tmp_path / "9.npy", np.zeros(SHAPE, np.float32))
  with pytest.raises(ConfigError, match="9.cls must hold the name or number of a class, got 'a/b'"):
    list_clips(settings(tmp_path), "all")


def damage(path, kind):
  """Damages a .tar file of two members of 512 bytes each."""
  contents = bytearray(path.read_bytes())
  if kind == "header":
    contents[1024 + 20] ^= 1  # of the second member
  elif kind == "data":
    contents = contents[: 1024 + 512 + 100]
  elif kind == "end":
    contents = contents[:2048]
  elif kind == "garbage":
    contents[:512] = b"x" * 512
  elif kind == "empty":
    contents.clear()
  path.write_bytes(contents)


@pytest.mark.parametrize("kind", ["header", "data", "end", "garbage", "empty"])
def test_damaged_shards_are_named(tmp_path, kind):
  for i in range(2):
    (tmp_path / f"{i}.npy").write_bytes(b"%d" % i * 512)
  tar = tmp_path / "0.tar"
  pack(tmp_path, tar, lambda name: name.endswith(".npy"))
  assert [read(member) for member in members(str(tar)).values()] == [b"0" * 512, b"1" * 512]
  again = tmp_path / "again.tar"
  again.write_bytes(tar.read_bytes())
  damage(again, kind)
  with pytest.raises(ConfigError, match=r"again.tar cannot be read as a .tar file \(.+\): it must"):
    members(str(again))


def test_a_file_that_is_there_twice_is_refused(tmp_path):
  write_latents(tmp_path / "latents", 2)
  pack(tmp_path / "latents", tmp_path / "latents" / "0.tar", lambda name: name == "cat/0.npy")
  with pytest.raises(
    ConfigError, match=r"'cat/0.npy' below data.root .* is there twice, .*cat/0.npy: a .tar"
  ):
    list_clips(settings(tmp_path / "latents"), "train")
