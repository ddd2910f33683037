"""Wan's transformer computes what diffusers' does, from files of both kinds of names."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.config import ConfigError
from freqformer.diffusion import sampling
from freqformer.diffusion.sampling import SampleConfig
from freqformer.methods.registry import parse_method
from freqformer.model.config import AttentionConfig
from freqformer.model.wan import WanConfig, WanDiT, load_params
from freqformer.wan.weights import diffusers_names
from tests.command.process import ROOT
from tools.formula import values, weights

# One worker: what the file prepares is then made once.
pytestmark = pytest.mark.xdist_group("wan_dit")

GOLDEN = np.load(ROOT / "tests/golden/wan.npz")
NAMES = json.loads((ROOT / "tests/golden/wan_names.json").read_text())["transformer"]
SHAPE = (3, 6, 10, 4)
# Every axis of the grid is cut by the edge of the last tiles.
ATTENTION = dict(methods=(), method="dense", block=16, tile=(2, 2, 3))
SIZES = dict(width=48, depth=2, heads=3, mlp=72, text_width=12, text_length=5, frequencies=16)


def config_of(**attention):
  return WanConfig(attention=AttentionConfig(**ATTENTION | attention), **SIZES)


@functools.cache
def loaded(**attention):
  model = nnx.eval_shape(lambda: WanDiT(config_of(**attention), SHAPE, nnx.Rngs(0)))
  params, lacking = load_params(model, weights(NAMES))
  return model, params, lacking


def forward(model, params, x, time, text):
  graphdef = nnx.graphdef(model)

  @jax.jit
  def run(params, tables):
    with jax.default_matmul_precision("highest"):
      return nnx.merge(graphdef, params)(x, time, text, tables)[0]

  return run(params, model.tables(x.shape[1:]))


def last(x):
  """Returns an array of torch's axes with channels last."""
  return np.moveaxis(x, 1, -1)


def assert_near(found, wanted, most=1e-5):
  found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
  assert found.shape == wanted.shape
  assert np.linalg.norm(found - wanted) <= most * np.linalg.norm(wanted)


X = last(values("x", (2, 4, *SHAPE[:3])))
TEXT = values("text", (2, 5, 12))


def test_a_timestep_for_each_sample():
  model, params, lacking = loaded()
  assert not lacking
  assert_near(forward(model, params, X, np.float32([0.737, 0.012]), TEXT), last(GOLDEN["dit"]))


def test_sixteen_bits_are_as_near_as_diffusers_are():
  """In bfloat16 its own model is 6.2e-3 from float32."""
  config = dataclasses.replace(config_of(), dtype="bfloat16")
  model = nnx.eval_shape(lambda: WanDiT(config, SHAPE, nnx.Rngs(0)))
  params, _ = load_params(model, weights(NAMES), jnp.bfloat16)
  found = forward(model, params, X, np.float32([0.737, 0.012]), TEXT)
  assert_near(found, last(GOLDEN["dit"]), 6.2e-3)


def test_a_timestep_for_each_token():
  model, params, _ = loaded()
  time = np.floor(np.abs(values("t", (2, 45))) * 500).astype(np.float32) / 1000
  assert_near(forward(model, params, X, time, TEXT), last(GOLDEN["dit_tokens"]))


def authors_name(name):
  """Returns the authors' name of a parameter, by the table of their conversion."""
  pairs = [
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn1.to_", "self_attn."),
    ("attn2.to_", "cross_attn."),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm3."),
  ]
  if name == "scale_shift_table":
    return "head.modulation"
  name = name.replace("scale_shift_table", "modulation")
  for ours, theirs in pairs:
    name = name.replace(ours, theirs)
  return name


def test_the_authors_names_are_the_same_weights():
  tensors = weights(NAMES)
  renamed = {authors_name(name): array for name, array in tensors.items()}
  assert len(renamed) == len(tensors) and "blocks.1.cross_attn.norm_k.weight" in renamed
  assert diffusers_names(renamed).keys() == tensors.keys()
  model, params, _ = loaded()
  again, _ = load_params(model, renamed)
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_what_does_not_fit_is_listed():
  tensors = weights(NAMES)
  tensors["blocks.0.attn1.to_q.weight"] = np.zeros((7, 48), np.float32)
  tensors["more.weight"] = np.zeros(3)
  del tensors["blocks.1.ffn.net.2.bias"]
  model, *_ = loaded()
  with pytest.raises(ConfigError) as error:
    load_params(model, tensors)
  for line in (
    r"layer 0, attention/qkv/kernel: \(48, 103\) in the files, the model wants \(48, 144\)",
    r"blocks\.1\.ffn\.net\.2\.bias: missing",
    "more.weight: unknown",
  ):
    assert re.search(line, str(error.value)), error.value
  with pytest.raises(ConfigError, match="image-to-video"):
    load_params(model, {**tensors, "blocks.0.attn2.add_k_proj.weight": np.zeros(3)})


def test_a_batch_of_two_texts_is_each_alone():
  model, params, _ = loaded()
  time = np.float32([0.5, 0.5])
  both = forward(model, params, X, time, TEXT)
  for i in range(2):
    alone = forward(model, params, X[i : i + 1], time[:1], TEXT[i : i + 1])
    assert_near(alone, both[i : i + 1], 1e-6)


@pytest.mark.parametrize("method", ["block_topk(density=1.0)", "adaspa", "octaves", "freqformer"])
def test_methods_run_on_it(method):
  """Those without parameters load complete; others name the leaves that files lack."""
  name, _ = parse_method(method)
  base = config_of().with_method(method)
  model = nnx.eval_shape(lambda: WanDiT(base, SHAPE, nnx.Rngs(0)))
  _, lacking = load_params(nnx.jit(lambda: WanDiT(base, SHAPE, nnx.Rngs(0)))(), weights(NAMES))
  assert all("attention/method/" in leaf for leaf in lacking)
  assert bool(lacking) == bool(
    model.config.runs()[0][1].has_parameters(model.config.layout(SHAPE), 3, 16)
  ), name


@pytest.mark.parametrize("name", ["1.3B", "14B", "5B"])
def test_names_and_shapes_of_real_checkpoints_fit(name):
  """One layer of each; a number stands for each array."""
  real = json.loads((ROOT / "tests/golden/wan_real.json").read_text())
  width, heads, mlp, channels = {
    "1.3B": (1536, 12, 8960, 16),
    "14B": (5120, 40, 13824, 16),
    "5B": (3072, 24, 14336, 48),
  }[name]
  attention = AttentionConfig(methods=(), method="dense", block=128)
  config = WanConfig(attention=attention, width=width, depth=1, heads=heads, mlp=mlp)
  model = nnx.eval_shape(lambda: WanDiT(config, (5, 8, 8, channels), nnx.Rngs(0)))
  tensors = {key: np.broadcast_to(np.int8(0), shape) for key, shape in real[name].items()}
  params, lacking = load_params(model, tensors, jnp.bfloat16)
  assert not lacking
  for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(nnx.state(model)), strict=True):
    assert found.shape == wanted.shape


def test_a_guided_run_is_that_of_the_pipeline():
  """Eight steps of UniPC at Wan's levels, with a negative text."""
  shape = (3, 4, 6, 4)
  model, params, _ = loaded()
  config = SampleConfig(
    steps=8, guidance=5.0, batch_size=1, shift=3.0, sampler="unipc", levels="wan"
  )
  noise = jnp.asarray(last(values("noise", (1, 4, *shape[:3]))))
  texts = values("text", (1, 5, 12))
  negative = values("negative", (1, 5, 12))[0]
  tables = model.tables(shape)
  with pytest.MonkeyPatch.context() as patched, jax.default_matmul_precision("highest"):
    patched.setattr(sampling, "sample_noise", lambda *_: noise)
    step = sampling.make_step(nnx.graphdef(model), config)
    args = (step, params, model, texts, np.arange(1), 0, tables, shape, config)
    found, _ = sampling.sample(*args, progress=False, null=negative)
  assert_near(found, last(GOLDEN["pipe"]))
