"""Weights are read lazily and as they are; what is cut, mixed, pickled or a LoRA is named."""

import json
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from freqformer.config import ConfigError
from freqformer.wan.files import open_tensors, part, read_config

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def arrays():
  x = np.arange(6, dtype=np.float32).reshape(2, 3) / 3
  return {"a": x, "b": x.astype(np.float16), "c.d": x.astype(ml_dtypes.bfloat16)}


@pytest.fixture
def single(tmp_path):
  save_file(arrays(), tmp_path / "model.safetensors")
  return tmp_path


@pytest.fixture
def sharded(tmp_path):
  """Two shards and their index."""
  found = arrays()
  save_file({name: found[name] for name in ("a", "b")}, tmp_path / SHARDS[0])
  save_file({"c.d": found["c.d"]}, tmp_path / SHARDS[1])
  write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[0], "c.d": SHARDS[1]})
  return tmp_path


def write_index(folder, places):
  (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def check(tensors):
  expected = arrays()
  assert set(tensors) == set(expected) and len(tensors) == 3
  for name, array in expected.items():
    assert tensors.shapes[name] == (2, 3) and tensors.dtypes[name] == array.dtype
    assert tensors[name].dtype == array.dtype
    np.testing.assert_array_equal(tensors[name], array)
  with pytest.raises(KeyError):
    tensors["z"]


def refused(folder):
  """Returns what is said of a folder, on one line that names it."""
  with pytest.raises(ConfigError) as error:
    open_tensors(folder)
  message = str(error.value)
  assert str(folder) in message and "\n" not in message
  assert not re.search(r"[.] [A-Z]", message), message  # one sentence
  return message


def test_a_file_and_its_folder(single):
  check(open_tensors(single))
  check(open_tensors(str(single / "model.safetensors")))
  (single / "._model.safetensors").write_text("left by another system")
  (single / "old.bin").write_text("never read where there are safetensors")
  check(open_tensors(single))


def test_shards(sharded):
  tensors = open_tensors(sharded)
  check(tensors)
  assert tensors.file_of("c.d").name == SHARDS[1]


def test_tensors_are_read_when_asked_for(single, monkeypatch):
  """Opening reads headers alone, and nothing that was read is kept."""
  tensors = open_tensors(single)
  (path,) = tensors._opened
  asked = []

  class Watched:
    def __init__(self, file):
      self.file = file

    def get_tensor(self, name):
      asked.append(name)
      return self.file.get_tensor(name)

  tensors._opened[path] = Watched(tensors._opened[path])
  assert tensors.shapes["a"] == (2, 3) and "b" in tensors and list(tensors) and not asked
  assert tensors["a"] is not tensors["a"] and asked == ["a", "a"]


@pytest.mark.parametrize("ending", [".pth", ".bin", ".pt", ".ckpt"])
def test_pickles_are_refused_and_never_loaded(tmp_path, ending):
  class Trap:
    def __reduce__(self):
      return pytest.fail, ("a pickle was loaded",)

  file = tmp_path / f"Wan2.1_VAE{ending}"
  file.write_bytes(pickle.dumps(Trap()))
  for place in (tmp_path, file):
    message = refused(place)
    assert file.name in message and "Wan2.1-T2V-1.3B-Diffusers" in message
  with pytest.raises(ConfigError, match="is a pickle"):
    read_config(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_cut_files_are_named(single, kept):
  file = single / "model.safetensors"
  file.write_bytes(file.read_bytes()[:kept])
  assert f"{file} is cut or no safetensors file" in refused(single)


def test_a_longer_or_other_file_is_named(single):
  file = single / "model.safetensors"
  file.write_bytes(file.read_bytes() + b"more")
  assert f"{file} is cut or no safetensors file" in refused(single)
  file.write_text("version https://git-lfs.github.com/spec/v1")
  assert f"{file} is cut or no safetensors file" in refused(single)


def test_nothing_there(tmp_path):
  assert "there is no folder" in refused(tmp_path / "absent")
  assert "holds no .safetensors file" in refused(tmp_path)


def test_a_cut_or_missing_shard(sharded):
  data = (sharded / SHARDS[1]).read_bytes()
  (sharded / SHARDS[1]).write_bytes(data[:-1])
  assert f"{SHARDS[1]} is cut" in refused(sharded)
  (sharded / SHARDS[1]).unlink()
  assert f"names {SHARDS[1]}, which is not there" in refused(sharded)


def test_a_tensor_in_two_shards(sharded):
  save_file({name: arrays()[name] for name in ("a", "c.d")}, sharded / SHARDS[1])
  message = refused(sharded)
  assert message.startswith("a is in two files") and all(name in message for name in SHARDS)


def test_an_index_and_shards_that_disagree(sharded):
  write_index(sharded, {"a": SHARDS[0], "b": SHARDS[1], "c.d": SHARDS[1]})
  assert re.search(rf"{SHARDS[1]} lacks b, which {INDEX} says is in it", refused(sharded))
  write_index(sharded, {"a": SHARDS[0], "b": SHARDS[0], "c.d": SHARDS[1], "e": SHARDS[1]})
  assert f"{SHARDS[1]} lacks e" in refused(sharded)
  write_index(sharded, {"a": SHARDS[0], "c.d": SHARDS[1]})
  assert f"{SHARDS[0]} holds b, which {INDEX} does not name" in refused(sharded)


def test_two_sets_of_weights(sharded):
  save_file(arrays(), sharded / "whole.safetensors")
  assert "whole.safetensors is not named by" in refused(sharded)
  (sharded / INDEX).unlink()
  assert "more than one set of weights" in refused(sharded)
  for name in ("a", "b"):
    (sharded / f"{name}.safetensors.index.json").write_text("{}")
  assert "more than one set of weights (a.safetensors.index.json, b." in refused(sharded)


@pytest.mark.parametrize(
  "content",
  [
    "no JSON",
    "[]",
    "{}",
    '{"weight_map": []}',
    '{"weight_map": {}}',
    '{"weight_map": {"a": 1}}',
    '{"weight_map": {"a": "../model.safetensors"}}',
    '{"weight_map": {"a": "/etc/model.safetensors"}}',
    '{"weight_map": {"a": "model.bin"}}',
  ],
)
def test_an_index_that_is_none(sharded, content):
  (sharded / INDEX).write_text(content)
  assert str(sharded / INDEX) in refused(sharded)


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_q.lora_A.weight", "lora_unet_q.alpha"])
def test_loras_are_not_supported_yet(tmp_path, name):
  save_file({name: np.zeros(2, np.float32)}, tmp_path / "lora.safetensors")
  assert re.search(rf"LoRA \({re.escape(name)}\), which is not supported yet", refused(tmp_path))


def test_quantised_weights_are_refused(tmp_path):
  save_file({"a": np.zeros(2, np.int8)}, tmp_path / "model.safetensors")
  assert "has a as I8; weights may be F32, F16, BF16" in refused(tmp_path)


def test_configs(tmp_path):
  (tmp_path / "config.json").write_text('{"z_dim": 16}')
  assert read_config(tmp_path) == {"z_dim": 16}
  for content, message in (("{", "is not JSON"), ("[1]", "holds no JSON object")):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
      read_config(str(tmp_path))
  with pytest.raises(ConfigError, match="config.json is missing"):
    read_config(tmp_path / "absent")


def test_a_part_of_a_model_or_the_part_itself(tmp_path):
  (tmp_path / "vae").mkdir()
  assert part(tmp_path, "vae") == tmp_path / "vae" == part(str(tmp_path / "vae"), "vae")
