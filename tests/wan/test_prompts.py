"""Prompts: cleaning, tokens, nothing cut, and a second run that opens no text encoder."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.wan import prompts, text_encoder
from freqformer.wan.prompts import EmbeddingCache, TextEncoder, clean, embed_prompts
from freqformer.wan.text_encoder import TextEncoderConfig, stacked
from tests.wan.helpers import write_tokenizer
from tools.formula import weights

CONFIG = TextEncoderConfig(vocab_size=12, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
ROOT = pathlib.Path(__file__).parents[2]
END = 1
A, CAT, DOG, S = range(4, 8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def load():
  return stacked(CONFIG, weights(text_encoder.parameter_shapes(CONFIG)))


def unopened(*_):
  raise AssertionError("the text encoder is opened")


@pytest.fixture
def encoder(tokenizer):
  return TextEncoder(CONFIG, tokenizer, load)


@pytest.mark.parametrize(
  "given, wanted",
  [
    ("", ""),
    (" a\tcat \n\n on\u00a0a  mat ", "a cat on a mat"),
    ("a &amp;amp; b &lt;c&gt;", "a & b <c>"),
    ("&amp;quot;a&amp;quot; <b>", '"a" <b>'),
    ("schÃ¶n", "sch\u00f6n"),  # UTF-8 that was read as Latin-1
    ("\u201ca\u201d", '"a"'),
    ("\u732b", "\u732b"),
  ],
)
def test_cleaning(given, wanted):
  assert clean(given) == wanted


@pytest.mark.parametrize("rule", [True, False])
def test_tokens_end_and_are_padded(tmp_path, rule):
  """The file's own limits do not hold, and the end mark is there without the file's rule."""
  tokenizer = prompts.Tokenizer(write_tokenizer(tmp_path / "tokenizer.json", rule))
  ids, mask = tokenizer(["a cat cats a dog a dog", "", "a</s>"])
  assert ids.dtype == mask.dtype == np.int32 and ids.shape == mask.shape == (3, 512)
  wanted = ([A, CAT, CAT, S, A, DOG, A, DOG, END], [END], [A, END, END])
  for row, kept, tokens in zip(ids, mask, wanted, strict=True):
    assert row[: len(tokens)].tolist() == tokens and not row[len(tokens) :].any()
    assert kept[: len(tokens)].all() and not kept[len(tokens) :].any()


def test_512_tokens_fit_and_one_more_is_refused(tokenizer):
  read = prompts.Tokenizer(tokenizer)
  ids, mask = read(["cat " * 510 + "cat"])
  assert mask.all() and ids[0, -1] == END
  with pytest.raises(ConfigError) as error:
    read(["cat " * 511 + "cat", "a cat", "a" + " dog" * 599])
  told = str(error.value)
  assert "may have 512 tokens, the end mark included" in told and "a cat'" not in told
  assert re.search(r"'cat cat [ cat]*\.\.\.' has 513 tokens and needs 1 fewer; 'a dog", told)
  assert "has 601 tokens and needs 89 fewer" in told


@pytest.mark.parametrize(
  "spoil, sentence",
  [
    (lambda path: path.unlink(), "tokenizer.json is missing; name the folder"),
    (lambda path: path.write_text("{}"), "tokenizer.json is not a tokenizer"),
    (lambda path: write_tokenizer(path, end="<eos>"), "it is not UMT5's tokenizer"),
  ],
)
def test_files_of_no_tokenizer(tmp_path, spoil, sentence):
  path = write_tokenizer(tmp_path / "tokenizer.json")
  spoil(path)
  with pytest.raises(ConfigError, match=sentence):
    prompts.Tokenizer(path)


def test_rows_behind_a_prompt_are_zero(encoder, tokenizer):
  texts = ["a  cat", "", "cat " * 511, "a cat"]
  found = embed_prompts(texts, "dogs", encoder)
  assert found.texts == tuple(texts)
  assert found.embeddings.shape == (4, 512, 8) and found.embeddings.dtype == np.float32
  assert found.negative.shape == (512, 8) and found.negative.dtype == np.float32
  for rows, count in zip((*found.embeddings, found.negative), (3, 1, 512, 3, 3), strict=True):
    assert rows[:count].any(-1).all() and not rows[count:].any()
  np.testing.assert_array_equal(found.embeddings[0], found.embeddings[3])
  ids, mask = prompts.Tokenizer(tokenizer)(["a cat"])
  wanted = jax.jit(lambda params: text_encoder.encode(CONFIG, params, ids, mask))(load())
  np.testing.assert_allclose(found.embeddings[0], wanted[0], rtol=0, atol=1e-5)
  assert embed_prompts(["a"], None, encoder).negative is None


def test_a_second_run_needs_no_text_encoder(encoder, tmp_path):
  cache = EmbeddingCache(tmp_path / "cache", "weights", 8)
  first = embed_prompts(["a cat", "two dogs"], "", encoder, cache)
  assert len(list(cache.folder.iterdir())) == 3
  closed = TextEncoder(CONFIG, tmp_path / "nowhere.json", unopened)
  again = embed_prompts(["two   dogs", "a cat"], "", closed, cache)
  np.testing.assert_array_equal(again.embeddings, first.embeddings[::-1])
  np.testing.assert_array_equal(again.negative, first.negative)

  # Only what is new is encoded; other weights have embeddings of their own.
  counts = []
  counted = TextEncoder(CONFIG, encoder.tokenizer, lambda: counts.append(1) or load())
  embed_prompts(["a cat"], None, counted, cache)
  assert not counts
  embed_prompts(["a dog", "a cat"], "", counted, cache)
  assert len(counts) == 1 and len(list(cache.folder.iterdir())) == 4
  other = EmbeddingCache(cache.folder, "other weights", 8)
  embed_prompts(["a cat"], None, counted, other)
  assert len(counts) == 2


@pytest.mark.parametrize("spoil", ["cut", "empty", "text", "narrow"])
def test_a_damaged_file_of_the_cache_is_written_again(encoder, tmp_path, spoil):
  cache = EmbeddingCache(tmp_path, "weights", 8)
  wanted = embed_prompts(["a cat"], None, encoder, cache).embeddings
  path = cache.path("a cat")
  whole = path.read_bytes()
  if spoil == "narrow":
    np.savez(path, rows=np.ones((3, 7), np.float32))
  else:
    path.write_bytes({"cut": whole[:-30], "empty": b"", "text": b"rows"}[spoil])
  np.testing.assert_array_equal(embed_prompts(["a cat"], None, encoder, cache).embeddings, wanted)
  assert cache.get("a cat") is not None


def test_a_file_of_the_cache_is_whole_or_not_there(encoder, tmp_path, monkeypatch):
  def fill(self, contents):
    with open(self, "wb") as file:
      file.write(contents[:20])
    raise OSError(28, os.strerror(28))

  cache = EmbeddingCache(tmp_path / "cache", "weights", 8)
  monkeypatch.setattr(pathlib.Path, "write_bytes", fill)
  with pytest.raises(ConfigError, match="no space left in .*the embedding of a prompt"):
    embed_prompts(["a cat"], None, encoder, cache)
  assert not list(cache.folder.iterdir())


def test_what_tells_weights_apart(tmp_path):
  config = tmp_path / "config.json"
  config.write_text("{}")
  shards = [tmp_path / f"model-{i}.safetensors" for i in (1, 2)]
  for path in shards:
    path.write_bytes(b"1234")
    os.utime(path, ns=(0, 7))

  def identity(dtype=np.float32):
    return prompts.weights_identity([config], shards, dtype)

  seen = [identity()]
  assert prompts.weights_identity([config], shards[::-1], np.float32) == seen[0]
  seen.append(identity(np.float16))
  config.write_text("{} ")
  seen.append(identity())
  os.utime(shards[1], ns=(0, 8))
  seen.append(identity())
  shards[1].write_bytes(b"12345")
  os.utime(shards[1], ns=(0, 8))
  seen.append(identity())
  shards[0] = shards[0].rename(tmp_path / "model.safetensors")
  seen.append(identity())
  assert len(set(seen)) == len(seen) == 6


def test_mistakes_are_told_before_weights_are_loaded(tokenizer):
  closed = TextEncoder(CONFIG, tokenizer, unopened)
  with pytest.raises(ConfigError, match="has 601 tokens"):
    embed_prompts(["cat " * 600], None, closed)
  small = TextEncoder(TextEncoderConfig(7, 8, 4, 12, 1, 2), tokenizer, unopened)
  with pytest.raises(ConfigError, match="gives token 7, the text encoder knows 7 tokens"):
    embed_prompts(["a dogs"], None, small)


@pytest.mark.parametrize("package", ["ftfy", "tokenizers"])
def test_a_package_that_lacks_is_named(tokenizer, monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ConfigError, match=rf"need the package {package}, .*freqformer\[pretrained\]"):
    embed_prompts(["a"], None, TextEncoder(CONFIG, tokenizer, unopened))


OFFLINE = """
import socket, sys

def refused(*args, **kwargs):
  raise AssertionError("the network is used")

socket.socket.connect = socket.getaddrinfo = refused
sys.modules["huggingface_hub"] = None
from freqformer.wan import prompts
ids, mask = prompts.Tokenizer(sys.argv[1])([prompts.clean("a &amp; cat")])
assert mask.sum() == 5, ids
"""


def test_nothing_goes_on_the_network(tokenizer):
  done = subprocess.run(
    [sys.executable, "-c", OFFLINE, str(tokenizer)], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_ready_embeddings(tmp_path):
  path = tmp_path / "prompts.npz"
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((2, 5, 8)).astype(np.float16)
  np.savez(path, embeddings=rows)
  found = prompts.read_embeddings(path, 8)
  assert found.texts == ("prompt 1", "prompt 2") and found.negative is None
  assert found.embeddings.shape == (2, 512, 8) and found.embeddings.dtype == np.float32
  np.testing.assert_array_equal(found.embeddings[:, :5], rows)
  assert not found.embeddings[:, 5:].any()

  np.savez(path, embeddings=rows, negative=rows[0], texts=["a", "b"])
  found = prompts.read_embeddings(path, 8)
  assert found.texts == ("a", "b")
  np.testing.assert_array_equal(found.negative, found.embeddings[0])
  prompts.write_embeddings(path, found)
  again = prompts.read_embeddings(path, 8)
  assert again.texts == found.texts
  np.testing.assert_array_equal(again.embeddings, found.embeddings)
  np.testing.assert_array_equal(again.negative, found.negative)


ROWS = np.ones((1, 3, 8), np.float32)


@pytest.mark.parametrize(
  "arrays, sentence",
  [
    ({"rows": ROWS}, "it has no array 'embeddings', but rows"),
    ({"embeddings": ROWS[0]}, r"shape \(3, 8\); 3 axes are needed, the last of 8"),
    ({"embeddings": np.ones((1, 3, 7))}, "the last of 8 numbers"),
    ({"embeddings": np.ones((1, 513, 8))}, "at most 512 rows"),
    ({"embeddings": ROWS[:0]}, "it has no prompt"),
    ({"embeddings": ROWS.astype(int)}, "embeddings are int64; save them as float32"),
    ({"embeddings": ROWS * np.nan}, "numbers that are not finite"),
    ({"embeddings": ROWS, "negative": ROWS}, r"shape \(1, 3, 8\); 2 axes"),
    ({"embeddings": ROWS, "texts": ["a", "b"]}, "1 embeddings and texts of shape"),
  ],
)
def test_ready_embeddings_that_do_not_fit(tmp_path, arrays, sentence):
  path = tmp_path / "prompts.npz"
  np.savez(path, **arrays)
  with pytest.raises(ConfigError, match=f"prompts.npz cannot be used: .*{sentence}"):
    prompts.read_embeddings(path, 8)


@pytest.mark.parametrize("kind", ["absent", "text", "array"])
def test_files_of_no_embeddings(tmp_path, kind):
  path = tmp_path / "prompts.npz"
  if kind == "text":
    path.write_text(json.dumps({}))
  elif kind == "array":
    with open(path, "wb") as file:
      np.save(file, ROWS)
  with pytest.raises(ConfigError, match="prompts.npz cannot be used: "):
    prompts.read_embeddings(path, 8)
