"""The UMT5 encoder: parity with transformers, strict names, padding that changes nothing."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.wan import text_encoder
from freqformer.wan.text_encoder import TextEncoderConfig, encode, read_config, stacked
from tests import golden
from tools.formula import values, weights

CONFIG = TextEncoderConfig(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
NAMES = json.loads(golden.path("wan_names").read_text())["text_encoder"]
LENGTH = 160
# config.json of google/umt5-xxl, without keys that say nothing about the encoder.
PUBLISHED = {
  "d_ff": 10240,
  "d_kv": 64,
  "d_model": 4096,
  "dense_act_fn": "gelu_new",
  "feed_forward_proj": "gated-gelu",
  "layer_norm_epsilon": 1e-06,
  "model_type": "umt5",
  "num_heads": 64,
  "num_layers": 24,
  "relative_attention_max_distance": 128,
  "relative_attention_num_buckets": 32,
  "scalable_attention": True,
  "vocab_size": 256384,
}


@pytest.fixture(autouse=True)
def exact():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def params():
  return weights(NAMES)


@functools.cache
def program(config):
  return jax.jit(functools.partial(encode, config))


def inputs():
  """Tokens and mask of the golden: one prompt of 90 tokens, one of 160."""
  ids = np.floor(np.abs(values("ids", (2, LENGTH))) * 20).astype(np.int32)
  mask = np.ones((2, LENGTH), np.int32)
  mask[0, 90:] = 0
  return ids, mask


def run(params, ids, mask, config=CONFIG):
  return np.asarray(program(config)(params, ids, mask))


def relative(found, wanted):
  return np.linalg.norm(np.float64(found) - wanted) / np.linalg.norm(wanted)


def test_parity_with_transformers(params):
  wanted = np.load(golden.path("wan").with_suffix(".npz"))["umt5"].astype(np.float64)
  found = run(stacked(CONFIG, params), *inputs())
  assert found.dtype == np.float32 and found.shape == (2, LENGTH, 16)
  assert relative(found[:, ::9], wanted) < 1e-5
  lower = run(stacked(CONFIG, params, jnp.bfloat16), *inputs())
  assert lower.dtype == np.float32 and 1e-4 < relative(lower[:, ::9], wanted) < 3e-2


def test_a_batch_is_each_prompt_alone_and_padding_changes_nothing(params):
  params = stacked(CONFIG, params)
  ids, mask = inputs()
  both = run(params, ids, mask)
  for i in range(2):
    assert relative(run(params, ids[i : i + 1], mask[i : i + 1])[0], both[i]) < 3e-6
  other = np.where(mask == 1, ids, 39)
  np.testing.assert_array_equal(run(params, other, mask), both)
  np.testing.assert_array_equal(both[0, 90:], 0)
  assert both[0, :90].any(-1).all()
  short = run(params, ids[:1, :90], mask[:1, :90])
  assert relative(short[0], both[0, :90]) < 3e-6


def test_prompts_of_no_and_of_512_tokens(params):
  params = stacked(CONFIG, params)
  ids = np.ones((2, 512), np.int32)
  mask = np.stack([np.zeros(512, np.int32), np.ones(512, np.int32)])
  found = run(params, ids, mask)
  np.testing.assert_array_equal(found[0], 0)
  assert np.isfinite(found).all() and found[1].any(-1).all()


def test_either_name_of_the_table_of_tokens(params):
  first, second = text_encoder.EMBEDDINGS
  renamed = dict(params)
  renamed[second] = renamed.pop(first)
  wanted = run(stacked(CONFIG, params), *inputs())
  np.testing.assert_array_equal(run(stacked(CONFIG, renamed), *inputs()), wanted)
  both = {**params, second: params[first].copy()}
  np.testing.assert_array_equal(run(stacked(CONFIG, both), *inputs()), wanted)
  both[second][3, 1] += 1
  with pytest.raises(ConfigError, match=f"two tables of tokens that differ: {first}, {second}"):
    stacked(CONFIG, both)


def test_all_that_does_not_fit_is_in_one_message(params):
  given = dict(params)
  del given["encoder.block.1.layer.1.DenseReluDense.wi_1.weight"]
  given["encoder.final_layer_norm.weight"] = np.ones(15, np.float32)
  given["lm_head.weight"] = np.ones((40, 16), np.float32)
  with pytest.raises(ConfigError) as error:
    stacked(CONFIG, given)
  for words in (
    "missing: encoder.block.1.layer.1.DenseReluDense.wi_1.weight",
    "unknown: lm_head.weight",
    "of another shape: encoder.final_layer_norm.weight (15,) instead of (16,)",
  ):
    assert words in str(error.value)
  # One layer more or less than the config's.
  with pytest.raises(ConfigError, match=r"missing: .*encoder\.block\.2\..* and 2 more"):
    stacked(TextEncoderConfig(40, 16, 4, 24, 3, 4), params)
  with pytest.raises(ConfigError, match=r"unknown: .*encoder\.block\.1\..* and 2 more"):
    stacked(TextEncoderConfig(40, 16, 4, 24, 1, 4), params)


def test_names_of_the_golden_are_those_of_its_config():
  found = text_encoder.parameter_shapes(CONFIG)
  assert found == {name: tuple(shape) for name, shape in NAMES.items()}


def test_the_program_does_not_grow_with_depth():
  def lines(depth):
    config = TextEncoderConfig(40, 16, 4, 24, depth, 4)
    params = stacked(config, weights(text_encoder.parameter_shapes(config)))
    return program(config).lower(params, *inputs()).as_text().count("\n")

  assert lines(2) == lines(7)


def test_classes_of_relative_positions():
  """Where each class of later keys begins; those of `transformers` for 32 up to 128."""
  found = text_encoder.relative_buckets(600, 32, 128)
  later = found[600:]  # positions 1, 2, ...
  begins = 1 + np.flatnonzero(np.diff(later, prepend=-1))
  np.testing.assert_array_equal(begins, [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91])
  np.testing.assert_array_equal(later[begins - 1], np.arange(17, 32))
  np.testing.assert_array_equal(found[:599][::-1], later - 16)  # earlier keys
  assert found[599] == 0


def test_sizes_are_read(tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps(PUBLISHED))
  config = read_config(path)
  assert config == TextEncoderConfig(256384, 4096, 64, 10240, 24, 64, 32, 128, 1e-6)
  count = sum(np.prod(shape) for shape in text_encoder.parameter_shapes(config).values())
  assert count == 5_680_910_336  # of UMT5-XXL's encoder


@pytest.mark.parametrize(
  "changed, sentence",
  [
    ({"model_type": "t5"}, "model_type='t5' is not supported; .* has 'umt5'"),
    ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu' is not supported"),
    ({"d_kv": None, "num_heads": None}, "lacks d_kv, num_heads"),
    ({"num_layers": 0}, "config.json: num_layers=0 must be at least 1"),
    ({"num_layers": "two"}, "config.json: "),
  ],
)
def test_other_models_are_refused(tmp_path, changed, sentence):
  values = PUBLISHED | changed
  path = tmp_path / "config.json"
  path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
  with pytest.raises(ConfigError, match=sentence):
    read_config(path)
