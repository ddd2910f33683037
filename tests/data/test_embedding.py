"""Captions and embeddings of clips: where they come from, what is named, what is refused."""

import contextlib
import re
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from freqformer.config import ConfigError
from freqformer.data.cache import prepare
from freqformer.data.embedder import Embedder
from freqformer.data.text import ClipText
from tests.data.helpers import config, moving_square, write_clip
from tests.data.test_latents import SHAPE, settings, write_latents

SIZE = 4


class Letters(Embedder):
  """A plug-in for tests: counts of three letters and of all, times what its path says."""

  def __init__(self, path):
    self.scale = float(path or 1)

  def __call__(self, texts):
    rows = [[text.count("a"), text.count("o"), text.count("t"), len(text)] for text in texts]
    return self.scale * np.float64(rows)


class Tokens(Embedder):
  """A plug-in that gives a vector per letter."""

  def __call__(self, texts):
    return np.ones((len(texts), 7, SIZE))


def embedded(root, **changes):
  return settings(root, **dict(condition="embedding", embedding_size=SIZE) | changes)


def captioned(root, **changes):
  return embedded(root, embedder=f"{__name__}:Letters", **changes)


def labels(cache):
  """The embedding of each clip by its key."""
  return {
    clip["key"]: item["label"] for clip, item in zip(cache.manifest["clips"], cache, strict=True)
  }


def test_captions_of_a_table_are_those_beside_the_clips(tmp_path):
  keys = sorted(write_latents(tmp_path / "beside", 3))
  write_latents(tmp_path / "table", 3)
  texts = {key: f'a {key[:3]}, "{i}" too' for i, key in enumerate(keys)}
  for key, text in texts.items():
    (tmp_path / "beside" / key).with_suffix(".txt").write_text(f"{text}\n")
  rows = [f'{key},"{text.replace(chr(34), 2 * chr(34))}"' for key, text in texts.items()]
  lines = "\r\n".join(["file,caption", *rows])
  (tmp_path / "table" / "captions.csv").write_text(lines, encoding="utf-8-sig")
  for split in ("train", "val"):
    found = [prepare(captioned(tmp_path / name), split) for name in ("beside", "table")]
    # Subfolders are no classes here.
    assert found[0].class_names == ["clips"] and found[0].class_counts == [len(found[0])]
    for cache in found:
      captions = {clip["key"]: clip["caption"] for clip in cache.manifest["clips"]}
      assert captions == {key: texts[key] for key in captions}
      for key, label in labels(cache).items():
        assert label.dtype == np.float32
        np.testing.assert_array_equal(label, Letters("")([texts[key]])[0])
    assert len(found[0]) and found[0].manifest["clips"] == [
      {**clip, "mtime_ns": own["mtime_ns"]}
      for clip, own in zip(found[1].manifest["clips"], found[0].manifest["clips"], strict=True)
    ]
  # Another text is another clip, as another file is.
  (tmp_path / "beside" / keys[0]).with_suffix(".txt").write_text("a dog")
  with pytest.raises(ConfigError, match=rf"0 clips are new and 1 changed .*\(e.g. {keys[0]}\)"):
    for split in ("train", "val"):
      prepare(captioned(tmp_path / "beside"), split)
  assert captioned(tmp_path, embedder_path="2").protocol_hash != captioned(tmp_path).protocol_hash


@pytest.mark.parametrize("form", ["npy", "npz", "safetensors", "video"])
def test_ready_embeddings_are_stored_as_they_are(tmp_path, form):
  array = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
  own = np.float32([0.1, -2, 3e-5, 7])
  root = tmp_path / "clips"
  root.mkdir()
  changes = {}
  if form in ("npy", "video"):
    np.save(root / "a.embedding.npy", own)
    np.save(root / "a.npy", array)
    if form == "video":
      write_clip(root / "a.avi", moving_square())
  else:
    changes = dict(array="x", embedding_array="e")
    arrays = {"x": array, "e": own}
    np.savez(root / "a.npz", **arrays) if form == "npz" else save_file(
      arrays, root / "a.safetensors"
    )
  c = embedded(root, **changes)
  if form == "video":
    c = config(root, tmp_path / "cache", condition="embedding", embedding_size=SIZE, views=2)
  cache = prepare(c, "train")
  assert len(cache) == c.views and len(cache.manifest["clips"]) == 1
  for item in cache:
    np.testing.assert_array_equal(item["label"], own)
  if changes:
    return
  np.save(root / "a.embedding.npy", 2 * own)
  with pytest.raises(ConfigError, match="0 clips are new and 1 changed"):
    prepare(c, "train")


BAD = {
  "long": (np.ones(5, np.float32), "its embedding has 5 numbers, data.embedding_size is 4"),
  "tokens": (np.ones((7, 4), np.float32), "has 7x4 numbers, .* sequences of them are not supp"),
  "whole": (np.ones(4, np.int64), "its embedding is int64, not a floating-point array"),
  "nan": (np.float32([1, np.nan, 0, 0]), "its embedding has numbers that are not finite"),
  "zero": (np.zeros(4, np.float32), "its embedding is zero, which means no condition"),
  "none": (None, "it has no embedding, a file beside it that ends in .embedding.npy"),
  "cut": (b"12", r"its embedding is not a readable array \("),
}


def test_embeddings_that_cannot_be_used_are_named(tmp_path):
  root = tmp_path / "latents"
  root.mkdir()
  for name, (vector, _) in {**BAD, "good": (np.ones(4), "")}.items():
    np.save(root / f"{name}.npy", np.ones(SHAPE, np.float32))
    if isinstance(vector, bytes):
      (root / f"{name}.embedding.npy").write_bytes(vector)
    elif vector is not None:
      np.save(root / f"{name}.embedding.npy", vector)
  cache = prepare(embedded(root), "all")
  reasons = {entry["key"][:-4]: entry["reason"] for entry in cache.manifest["skipped"]}
  assert list(labels(cache)) == ["good.npy"] and reasons.keys() == BAD.keys()
  for name, (_, words) in BAD.items():
    assert re.search(words, reasons[name]), (name, reasons[name])


@pytest.mark.parametrize(
  "changes, reason",
  [
    ({}, "it has no embedding, a file beside it"),
    (dict(embedding_array="e", array="x"), "no array 'e'; set data.embedding_array to one of x"),
    (dict(embedder=f"{__name__}:Letters"), "it has no caption, a .txt beside it or a row of capt"),
    (dict(embedder=f"{__name__}:Tokens"), "its embedding has 7x4 numbers, .* not supported"),
  ],
)
def test_clips_that_all_lack_their_condition_are_one_sentence(tmp_path, changes, reason):
  root = tmp_path / "latents"
  root.mkdir()
  for i in range(3):
    np.savez(root / f"{i}.npz", x=np.ones(SHAPE, np.float32))
    if "Tokens" in changes.get("embedder", ""):
      (root / f"{i}.txt").write_text("a cat")
  with pytest.raises(ConfigError, match=rf"None of the 2 train clips .*npz: .*{reason}"):
    prepare(embedded(root, **changes), "train")


def test_captions_that_are_no_text_are_named(tmp_path):
  keys = write_latents(tmp_path / "latents", 3)
  for key in keys:
    (tmp_path / "latents" / key).with_suffix(".txt").write_text("a cat")
  (tmp_path / "latents" / "cat" / "0.txt").write_bytes(b"caf\xe9")
  left_out = [
    entry
    for split in ("train", "val")
    for entry in prepare(captioned(tmp_path / "latents"), split).manifest["skipped"]
  ]
  assert [(entry["key"], entry["reason"]) for entry in left_out] == [
    ("cat/0.npy", "its caption is not in UTF-8")
  ]


@pytest.mark.parametrize(
  "table, message",
  [
    ("", "has the columns of an empty file; its first line must name file and caption"),
    ("file_name,text\n0.npy,a cat\n", "has the columns file_name, text; its first line must name"),
    ("file,caption\n0.npy,a\n0.npy,b\n", "has 2 rows of '0.npy': leave it one"),
    ("file,caption\n0,a\n", "names no clip: .* paths in data.root such as 'cat/0.npy', it has '0'"),
    ("file,caption\n", "names no clip: .* paths in data.root such as 'cat/0.npy'."),
    (b"file,caption\n0.npy,caf\xe9\n", "cannot be read as a table in UTF-8"),
  ],
)
def test_tables_that_are_none(tmp_path, table, message):
  write_latents(tmp_path / "latents", 1)
  contents = table if isinstance(table, bytes) else table.encode()
  (tmp_path / "latents" / "captions.csv").write_bytes(contents)
  with pytest.raises(ConfigError, match=message):
    prepare(captioned(tmp_path / "latents"), "train")


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(condition="text"), "condition='text' must be one of class, embedding, none"),
    (dict(embedding_size=4), "embedding_size=4 needs condition='embedding', not 'class'"),
    (dict(condition="none", embedder="a:B"), "embedder='a:B' needs condition='embedding', not 'n"),
    (dict(condition="embedding"), "embedding_size=0 must be the numbers of an embedding"),
    (dict(embedder_path="clip"), "embedder_path='clip' needs an embedder, 'module:Class'"),
    (dict(embedder="nowhere:B"), "embedder 'nowhere:B': there is no module 'nowhere'"),
    (dict(embedder=f"{__name__}:B"), "has no class 'B'"),
    (dict(embedder="json:loads"), "'json:loads' must be a class that inherits freqformer.data.emb"),
    (dict(source="folder", embedding_array="e"), "names an array in files of source='latents'"),
    (dict(embedding_array="e", embedder=f"{__name__}:Letters"), "goes with no embedder"),
    (dict(source="ucf101"), "source='ucf101' has classes alone"),
  ],
)
def test_settings_that_contradict_each_other(tmp_path, changes, message):
  own = {"condition", "embedding_size"} & changes.keys()
  with pytest.raises(ValueError, match=re.escape(message)):
    (settings if own else embedded)(tmp_path, **changes)


def test_without_a_condition_all_clips_are_of_one_class(tmp_path):
  write_latents(tmp_path / "latents", 2)
  cache = prepare(settings(tmp_path / "latents", condition="none"), "all")
  assert cache.class_names == ["clips"] and cache.class_counts == [4]
  assert [item["label"] for item in cache] == [0] * 4


class Tokenizer:
  """Pads texts to the longest of them."""

  @classmethod
  def from_pretrained(cls, path, local_files_only):
    if path != "weights" or not local_files_only:
      raise OSError("no such folder")
    return cls()

  def __call__(self, texts, padding, truncation, return_tensors):
    assert padding and truncation and return_tensors == "pt"
    return {"input_ids": [len(text) for text in texts]}


class Projected(Tokenizer):
  """The part of CLIPTextModelWithProjection that ClipText touches."""

  def eval(self):
    self.evaluates = True

  def __call__(self, input_ids):
    assert self.evaluates
    array = np.float64(input_ids)[:, None] * np.ones(SIZE)
    tensor = types.SimpleNamespace(cpu=lambda: tensor, numpy=lambda: np.float32(array))
    return types.SimpleNamespace(text_embeds=types.SimpleNamespace(float=lambda: tensor))


def test_clips_text_encoder_gives_a_vector_per_text(monkeypatch):
  """With stand-ins for torch and transformers, which no other part needs."""
  torch = types.SimpleNamespace(inference_mode=contextlib.nullcontext)
  classes = dict(AutoTokenizer=Tokenizer, CLIPTextModelWithProjection=Projected)
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(**classes))
  found = ClipText("weights")(["a cat", "dog"])
  np.testing.assert_array_equal(found, [[5] * SIZE, [3] * SIZE])
  with pytest.raises(ConfigError, match="data.embedder_path='elsewhere' is no folder of a CLIP"):
    ClipText("elsewhere")
  monkeypatch.setitem(sys.modules, "transformers", None)
  with pytest.raises(ConfigError, match="needs transformers: pip install torch transformers"):
    ClipText("weights")
