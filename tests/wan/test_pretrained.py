"""A downloaded folder becomes videos and a page; what is no such folder is refused."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import freqformer
from freqformer.config import ConfigError
from freqformer.cost import BlockShape
from freqformer.evaluate import memory
from freqformer.evaluate.predicted import card_of
from freqformer.evaluate.pretrained import Pretrained, RandomWeights
from freqformer.simulation.descriptions import load_model
from tests.command.process import ROOT, call
from tests.wan.helpers import WEIGHTS, write_model

# One worker: what the file prepares is then made once.
pytestmark = pytest.mark.xdist_group("wan_pretrained")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp("model") / "Wan-tiny")


@pytest.fixture(scope="module")
def pipe(folder):
  return Pretrained(folder, block=4, cache=folder.parent / "prompts")


SMALL = dict(frames=5, size=(32, 48), steps=3, progress=False)


def test_the_command_writes_videos_and_a_page(folder, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
  printed = call(
    tmp_path,
    "eval.py",
    f"--pretrained={folder}",
    "--prompts=prompts.txt",
    "--size=32x48",
    "--frames=5",
    "--steps=4",
    "--block=4",
    "--compare=dense,block_topk(density=0.5)",
    "--out=out",
  )
  assert "comparison.html" in printed.stdout
  videos = sorted(path.relative_to(tmp_path / "out") for path in tmp_path.glob("out/*/*.mp4"))
  assert [str(path) for path in videos] == [
    "block_topk_density_0.5/000_a_cat.mp4",
    "block_topk_density_0.5/001_a_dog.mp4",
    "dense/000_a_cat.mp4",
    "dense/001_a_dog.mp4",
    "dense_in_tiles_of_2_the_floor/000_a_cat.mp4",
    "dense_in_tiles_of_2_the_floor/001_a_dog.mp4",
  ]
  result = json.loads((tmp_path / "out" / "comparison.json").read_text())
  dense, sparse, floor = result["rows"]
  assert floor["method"] == "dense in tiles of 2, the floor"
  # Videos that are equal in all pixels are at "inf" dB.
  assert float(floor["quality"]["psnr"]) > float(sparse["quality"]["psnr"])
  assert floor["attention_error"] < 1e-4 < sparse["attention_error"] < 1
  assert sparse["speedup"] == pytest.approx(dense["run_seconds"] / sparse["run_seconds"])
  assert dense["predicted_speedup"] == 1 and sparse["predicted_on"]
  assert "on the same clips" in printed.stdout and "simulated on" in printed.stdout
  assert dense["attention_flops_over_dense"] == 1 and sparse["attention_flops_over_dense"] < 1
  assert result["sampler"] == "unipc" and result["shift"] == 3.0 and result["guidance"] == 5.0
  assert result["prompts"] == {"0": "a cat", "1": "a dog"}
  assert list(result["seconds"]) == ["text", "load", "sample", "decode", "errors"]
  decoding = sum(row["decode_seconds"] for row in result["rows"])
  assert decoding > 0 and result["seconds"]["decode"] == pytest.approx(decoding, abs=1e-3)
  assert "stages: text " in printed.stdout
  page = (tmp_path / "out" / "comparison.html").read_text()
  for told in ("prompt 1", "a dog", "seed", "stage: decode", "LPIPS was not measured"):
    assert told in page
  assert len(list((tmp_path / "cache").rglob("*.npz"))) == 3  # with the negative one


def test_two_prompts_are_each_alone(pipe):
  videos = pipe(["a cat", "a dog"], **SMALL)
  assert videos.shape == (2, 5, 32, 48, 3) and videos.dtype == np.uint8 and videos.std() > 0
  alone = pipe("a cat", **SMALL)
  np.testing.assert_array_equal(alone[0], videos[0])
  assert (videos[0] != videos[1]).any()


def test_without_guidance_the_negative_prompt_means_nothing(pipe):
  first, second = (pipe("a cat", guidance=1.0, negative=text, **SMALL) for text in ("", "a dog"))
  np.testing.assert_array_equal(first, second)
  guided = [pipe("a cat", guidance=5.0, negative=text, **SMALL) for text in ("", "a dog")]
  assert (guided[0] != guided[1]).any()


def test_base_weights_are_there_once(pipe):
  runs = [
    pipe.at(method, 5, (32, 48)) for method in ("dense", "adaspa(sparsity=0.3)", "freqformer")
  ]
  first, *others = ({id(x) for x in jax.tree.leaves(run.params)} for run in runs)
  assert all(first <= other for other in others)
  assert len(others[0]) == len(first) < len(others[1])  # a router of its own


def two(folder, copy, boundary, change=lambda tensors: tensors):
  """Returns a model with a second transformer, which is changed."""
  shutil.copytree(folder, copy)
  shutil.copytree(copy / "transformer", copy / "transformer_2")
  path = copy / "transformer_2" / WEIGHTS
  save_file(change(load_file(path)), path)
  (copy / "model_index.json").write_text(json.dumps({"boundary_ratio": boundary}))
  return Pretrained(copy, block=4, cache=folder.parent / "prompts")


def test_two_transformers_share_a_run(pipe, folder, tmp_path):
  """With equal weights they are one; only the second one's guidance acts below the boundary."""
  wanted = pipe("a cat", **SMALL)
  same = two(folder, tmp_path / "same", 0.9)
  np.testing.assert_array_equal(same("a cat", guidance_low=5.0, **SMALL), wanted)
  never = two(folder, tmp_path / "never", 0.0, lambda x: {k: 0 * v for k, v in x.items()})
  np.testing.assert_array_equal(never("a cat", guidance_low=2.0, **SMALL), wanted)
  always = two(folder, tmp_path / "always", 1.1)
  low = always("a cat", guidance=3.0, guidance_low=5.0, **SMALL)
  np.testing.assert_array_equal(low, wanted)
  with pytest.raises(ConfigError, match="both transformers guide or none does"):
    always("a cat", guidance=1.0, guidance_low=5.0, **SMALL)
  with pytest.raises(ConfigError, match="guidance_low=3.0 is for models with two"):
    pipe("a cat", guidance_low=3.0, **SMALL)


def test_the_public_name():
  assert freqformer.load_pretrained.__module__ == "freqformer.evaluate.pretrained"


@pytest.mark.parametrize(
  "given, words",
  [
    (dict(frames=6), "5 and 9 are the nearest"),
    (dict(size=(32, 40)), "multiples of 16 x 16; the nearest are 32 x 32"),
    (dict(steps=0), "steps"),
    (dict(method="sparse"), "method"),
    (dict(method="freqformer(filter=qkv)"), "would mix the heads' bands in a norm over all heads"),
  ],
)
def test_what_cannot_be_sampled_is_refused(pipe, given, words):
  with pytest.raises((ConfigError, ValueError), match=words):
    pipe("a cat", **SMALL | given)


def test_weights_that_cannot_fit_are_refused_before_they_are_loaded(pipe, folder, monkeypatch):
  needed = pipe.weight_bytes
  assert needed == 4 * sum(x.size for x in jax.tree.leaves(pipe.at("dense").params))
  assert memory.free_bytes() > needed
  fresh = Pretrained(folder, block=4, cache=folder.parent / "fresh")
  monkeypatch.setattr(memory, "free_bytes", lambda: needed - 1)
  words = r"the transformer of .*Wan-tiny takes 0.00 GB, .*GB too much. What fits: dtype=\"bfloat16"
  for run in (fresh.check_memory, lambda: fresh.at("dense")):
    with pytest.raises(ConfigError, match=words):
      run()
  pipe.check_memory()  # its weights are there
  monkeypatch.setattr(memory, "free_bytes", lambda: 100)
  words = "the text encoder .*What fits: ready embeddings, --prompts=FILE.npz or a GPU like rtx"
  with pytest.raises(ConfigError, match=words):
    fresh.embed(["a cat"])
  fourteen = RandomWeights("wan2.1-14b", dtype="bfloat16")
  monkeypatch.setattr(memory, "free_bytes", lambda: int(25.6e9))
  with pytest.raises(ConfigError, match="takes 28.96 GB, .* has 25.60 GB free: 3.36 GB too much"):
    fourteen.check_memory()


def test_the_free_memory_of_a_gpu_is_what_it_has_left(monkeypatch):
  stats = {"bytes_limit": 70, "bytes_in_use": 30}
  device = types.SimpleNamespace(platform="gpu", device_kind="H100", memory_stats=lambda: stats)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  assert memory.free_bytes() == 40
  monkeypatch.setattr(device, "memory_stats", lambda: None)
  assert memory.free_bytes() is None


def damaged(folder, tmp_path, damage):
  copy = shutil.copytree(folder, tmp_path / "copy")
  damage(copy)
  return copy


def edit(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  "damage, words",
  [
    (lambda f: edit(f / "transformer/config.json", _class_name="HunyuanVideo"), "known are Wan"),
    (lambda f: edit(f / "transformer/config.json", in_channels=36), "image-to-video"),
    (lambda f: shutil.copytree(f / "transformer", f / "transformer_2"), "model_index.json"),
    (lambda f: edit(f / "scheduler/scheduler_config.json", use_flow_sigmas=False), "scheduler"),
    (lambda f: edit(f / "transformer/config.json", in_channels=8, out_channels=8), "8 channels"),
    (lambda f: shutil.rmtree(f / "vae"), "config.json"),
    (
      lambda f: (f / "transformer" / WEIGHTS).rename(f / "transformer" / "model.pth"),
      "is a pickle.*-Diffusers",
    ),
    (lambda f: (f / "transformer" / WEIGHTS).write_bytes(b"12345678abc"), "cut or no safetensors"),
    (
      lambda f: save_file({"blocks.0.lora_A.weight": np.zeros(2)}, f / "transformer" / WEIGHTS),
      "LoRA",
    ),
  ],
)
def test_other_folders_are_refused(folder, tmp_path, damage, words):
  with pytest.raises(ConfigError, match=f"(?s){words}"):
    Pretrained(damaged(folder, tmp_path, damage))


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--workdir=runs/demo"], "give --workdir"),
    (["--classes=a"], "--classes cannot be given with --pretrained"),
    ([], "--pretrained needs --prompts"),
  ],
)
def test_the_command_refuses_what_belongs_to_runs(folder, tmp_path, flags, words):
  printed = call(tmp_path, "eval.py", f"--pretrained={folder}", *flags, code=2)
  assert words in " ".join(printed.stderr.split())


def test_docs_name_every_flag():
  text = (ROOT / "docs" / "pretrained.md").read_text()
  for flag in ("prompts", "negative", "shift", "compare", "block", "honest", "guidance_low"):
    assert f"{flag}`" in text or f"--{flag}=" in text


def test_random_weights_have_speed_alone(tmp_path, monkeypatch):
  card = json.loads((ROOT / "freqformer/simulation/models/wan2.1-1.3b.json").read_text())
  small = card | dict(width=48, heads=3, layers=2, mlp=72)
  (tmp_path / "small.json").write_text(json.dumps(small))
  flags = (
    "--size=32x48",
    "--frames=5",
    "--steps=3",
    "--block=4",
    "--compare=dense,block_topk(density=0.5)",
  )
  given = f"--pretrained=random:{tmp_path / 'small.json'}"
  printed = call(tmp_path, "eval.py", given, *flags, "--out=out")
  assert "random weights, speed only" in printed.stdout
  page = (tmp_path / "out" / "speed.html").read_text()
  assert "The weights are random: speed and memory only" in page and "LPIPS" not in page
  assert "density of block_topk" in page and "stage: sample" in page
  rows = json.loads((tmp_path / "out" / "speed.json").read_text())["rows"]
  assert [row["quality"] for row in rows] == [None, None] and rows[1]["predicted_speedup"] > 0
  printed = call(tmp_path, "eval.py", given, *flags, "--metrics=psnr", code=2)
  assert "random weights have speed alone" in printed.stderr


@pytest.mark.parametrize("name, depth", [("wan2.1-1.3b", 30), ("wan2.1-14b", 40)])
def test_cards_of_the_simulator_are_the_published_configs(name, depth):
  """By the work of a layer; the transformer's own config gives the same."""
  pipe = RandomWeights(name)
  config = pipe.config()
  card = card_of(config, pipe.latent_shape(81, (480, 832)))
  known = load_model(name)
  assert config.depth == depth == known.layers
  for field in dataclasses.fields(BlockShape):
    assert getattr(card, field.name) == getattr(known, field.name)
  assert card.patch_channels == known.patch_channels and card.grid == (21, 30, 52)
