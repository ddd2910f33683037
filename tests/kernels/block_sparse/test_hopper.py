"""The Hopper kernels on a machine without one: numerics by interpretation, races, refusals."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse import hopper as pallas_mgpu
from freqformer.kernels.block_sparse import tuning
from freqformer.kernels.block_sparse.api import attention, choose_backend
from freqformer.kernels.block_sparse.table import dense_mask, from_tiles
from freqformer.kernels.core import lists
from freqformer.kernels.core.target import Target
from freqformer.kernels.hopper import interpret, machine, products, softmax

from tests.compiled.test_resources import GOLDEN
from tests.kernels.block_sparse.suite import (
  AttentionSuite,
  Case,
  draw_inputs,
  draw_mask,
  oracle,
  relative_error,
  value_and_grads,
)

HOPPER = Target("cuda", "NVIDIA H100 80GB HBM3", "9.0")


class TestPallasMgpu(AttentionSuite):
  implementation = "pallas_mgpu"
  any_shape = False
  dtypes = (jnp.bfloat16, jnp.float16)

  @pytest.fixture(autouse=True)
  def _interpreted(self):
    with interpret.interpreted():
      yield


def _check(case, dtype=jnp.bfloat16, seed=0, **kwargs):
  """Output, LSE and gradients of the interpreted kernels against the oracle."""
  mask, data = draw_mask(case, seed), draw_inputs(case, seed, dtype)
  with interpret.interpreted(**kwargs):
    got = value_and_grads(*data[:3], mask, *data[3:], "pallas_mgpu")
  for name, g, w in zip(
    ("out", "lse", "dq", "dk", "dv"), got, oracle(*data[:3], mask, *data[3:]), strict=True
  ):
    assert relative_error(g, w) < (1e-6 if name == "lse" else 4e-3), name


def _check_forward(case, seed=0, **kwargs):
  """The same of the forward alone."""
  mask, (q, k, v, *_) = draw_mask(case, seed), draw_inputs(case, seed, jnp.bfloat16)
  with interpret.interpreted(**kwargs):
    got = jax.jit(lambda *x: attention(*x, implementation="pallas_mgpu"))(q, k, v, mask)
  for name, g, w in zip(("out", "lse"), got, oracle(q, k, v, mask), strict=True):
    assert relative_error(g, w) < (1e-6 if name == "lse" else 4e-3), name


BIG = Case("big_tiles", b=1, d=128, block_q=128, block_kv=128, n_q=256, n_kv=512)


@pytest.mark.parametrize("step", [64, 128])
@pytest.mark.parametrize("block_kv", [64, 128])
@pytest.mark.parametrize("block_q", [64, 128])
def test_every_cut_of_tiles_into_stages(step, block_q, block_kv):
  """Tiles that share a stage, fill one or need two, with biases that differ inside a stage, ragged and odd list lengths."""
  case = dataclasses.replace(
    BIG, d=64, n_kv=384, block_q=block_q, block_kv=block_kv, bias=True, keep=0.7
  )
  keys = [tuning.Key("h100", 64, block_q, block_kv, direction) for direction in tuning.DIRECTIONS]
  with tuning.override({key: tuning.TuningConfig(2, step) for key in keys}):
    _check(case, seed=step)


@pytest.mark.parametrize("take_turns", [True, False])
@pytest.mark.parametrize("scores_ahead", [True, False])
def test_every_form_of_the_forward(scores_ahead, take_turns):
  key = tuning.Key("h100", 128, 128, 128, "forward")
  config = tuning.TuningConfig(3, 64, scores_ahead=scores_ahead, take_turns=take_turns)
  with tuning.override({key: config}):
    _check_forward(BIG)


PAIRED = Case("paired", b=1, d=64, n_q=5 * 64, n_kv=7 * 64, keep=0.8)


@pytest.mark.parametrize("step", [64, 128])
@pytest.mark.parametrize("scores_ahead", [True, False])
def test_two_tiles_in_a_block(scores_ahead, step):
  """Neighbours whose lists differ in length, one of them empty, and a last tile without a neighbour."""
  counts = np.pad(draw_mask(PAIRED, step).kv_counts, ((0, 0), (0, 0), (0, 1))).reshape(-1, 2)
  assert (counts[:, 0] != counts[:, 1]).sum() > 3 and PAIRED.n_q // 64 % 2
  keys = [tuning.Key("h100", 64, 64, 64, direction) for direction in tuning.DIRECTIONS]
  config = tuning.TuningConfig(2, step, scores_ahead=scores_ahead, tiles_per_block=2)
  with tuning.override({key: config for key in keys}):
    _check(PAIRED, seed=step) if scores_ahead else _check_forward(PAIRED, seed=step)


@pytest.mark.parametrize(
  ("block", "config"),
  [
    (128, tuning.TuningConfig(2, 64)),
    (128, tuning.TuningConfig(2, 64, scores_ahead=False)),
    (64, tuning.TuningConfig(2, 64, tiles_per_block=2)),
  ],
  ids=["scores ahead", "stage by stage", "two tiles"],
)
def test_no_races(block, config, capfd):
  """One walk of every kernel through the race detector: two warpgroups, a ring that wraps around."""
  case = dataclasses.replace(BIG, h=1, table_h=1, d=32, keep=0.9, block_q=block, block_kv=block)
  case = dataclasses.replace(case, n_q=2 * block, n_kv=6 * 64)
  assert draw_mask(case, 0).kv_counts.max() * block // 64 > 2
  keys = [tuning.Key("h100", 32, block, block, direction) for direction in tuning.DIRECTIONS]
  with tuning.override({key: config for key in keys}):
    check = _check if config.scores_ahead else _check_forward
    check(case, detect_races=True)
  assert "RACE DETECTED" not in capfd.readouterr().out  # the detector prints and goes on


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_odd_scales(scale):
  """Hidden keys stay hidden under a scale that is not positive."""
  case = Case("scale", b=1, h=1, table_h=1)
  mask, (q, k, v, *_) = draw_mask(case, 1), draw_inputs(case, 1, jnp.bfloat16)
  with interpret.interpreted():
    out, lse = jax.jit(lambda *a: attention(*a, scale=scale, implementation="pallas_mgpu"))(
      q, k, v, mask
    )
  want, want_lse = attention(
    *(x.astype(jnp.float32) for x in (q, k, v)), mask, scale=scale, implementation="reference"
  )
  assert relative_error(out, want) < 4e-3 and relative_error(lse, want_lse) < 1e-6


def _shapes(dtype=jnp.bfloat16, n=256, d=64):
  return [jax.ShapeDtypeStruct((1, n, 2, d), dtype)] * 3


@pytest.mark.parametrize(
  ("inputs", "mask", "target", "words"),
  [
    (_shapes(), (256, 64), Target("cpu", "cpu", None), "use implementation='xla'"),
    (_shapes(), (256, 64), Target("cuda", "NVIDIA A100", "8.0"), "compute capability 9.0.*8.0"),
    (_shapes(jnp.float32), (256, 64), HOPPER, "float32, it takes bfloat16 or float16"),
    (_shapes(d=80), (256, 64), HOPPER, "head_dim is 80"),
    (_shapes(), (256, 32), HOPPER, "block_q is 32"),
    (_shapes(n=200), (200, 64), HOPPER, "200 query rows are no multiple of block_q=64"),
  ],
  ids=["cpu", "ampere", "dtype", "head_dim", "tile", "rows"],
)
def test_refuses(inputs, mask, target, words):
  n, block = mask
  with pytest.raises(NotImplementedError, match=words):
    choose_backend(*inputs, dense_mask(n, n, block, block), "pallas_mgpu", target)


def test_reasons_are_collected():
  mask = dense_mask(200, 200, 32, 32)
  with pytest.raises(
    NotImplementedError, match="float32.*head_dim is 80.*block_q is 32.*block_kv is 32"
  ):
    choose_backend(*_shapes(jnp.float32, 200, 80), mask, "pallas_mgpu", HOPPER)


def test_chosen_on_hopper_and_passed_over_elsewhere():
  mask = dense_mask(256, 256, 64, 64)
  assert choose_backend(*_shapes(), mask, target=HOPPER) == "pallas_mgpu"
  assert choose_backend(*_shapes(), mask, target=Target("cpu", "cpu", None)) == "xla"
  assert choose_backend(*_shapes(jnp.float32), mask, target=HOPPER) == "xla"


def test_interpretation_is_only_on_request():
  q = jnp.zeros((1, 64, 1, 64), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="interpreted"):
    attention(q, q, q, dense_mask(64, 64, 64, 64), implementation="pallas_mgpu")


def test_tuning_refuses_what_does_not_fit():
  key = tuning.Key("h100", 128, 128, 128, "forward")
  with pytest.raises(ValueError, match="bytes of shared memory"):
    tuning.TuningConfig(4, 128).check(key)
  with pytest.raises(ValueError, match="registers"):
    tuning.TuningConfig(2, 128, 240, 32).check(key)
  with pytest.raises(ValueError, match="must be 64 or 128"):
    tuning.TuningConfig(2, 96)
  with pytest.raises(ValueError, match="set both"):
    tuning.TuningConfig(2, 128, 240, 0)
  with pytest.raises(ValueError, match="never end"):
    tuning.TuningConfig(1, 64).check(key)
  with pytest.raises(ValueError, match="next keys wait"):
    tuning.TuningConfig(1, 64, take_turns=False).check(key)
  tuning.TuningConfig(1, 64, take_turns=False, scores_ahead=False).check(key)
  with pytest.raises(ValueError, match="needs tiles of 64 rows"):
    tuning.TuningConfig(2, 64, tiles_per_block=2).check(key)
  with pytest.raises(ValueError, match="must be 1 or 2"):
    tuning.TuningConfig(tiles_per_block=3)
  short = dataclasses.replace(key, block_q=64)
  tuning.TuningConfig(2, 64, 232, 24, tiles_per_block=2).check(short)
  with pytest.raises(ValueError, match="of 4 warpgroups, they start with 512"):
    tuning.TuningConfig(2, 64, 240, 24, tiles_per_block=2).check(short)


def _fused_exponentials(x, unit, top, columns):
  """`softmax.exponentials` as a device may round it: the product of x and unit is not rounded.

  A kernel has no wider type to hold it, so what rounding left out is computed (Dekker's product).
  """

  def halves(number):
    big = number * jnp.float32(4097)
    high = big - (big - number)
    return high, number - high

  (x_high, x_low), (unit_high, unit_low) = halves(x), halves(jnp.float32(unit))
  product = x * unit
  left_out = x_high * unit_high - product + x_high * unit_low + x_low * unit_high
  left_out = left_out + x_low * unit_low
  return jnp.exp2(product - products.over_columns(top, columns) + left_out)


# Scales whose rounding leaves the larger part of a hidden score above the rounded maximum.
@pytest.mark.parametrize(
  ("d", "scale"),
  [(32, 1.1 / math.sqrt(32)), (64, 1 / 8), (128, 1.1 / math.sqrt(128))],
  ids=["32", "64", "128"],
)
def test_hidden_scores_have_no_probability_however_they_are_rounded(d, scale, monkeypatch):
  """Lists that begin with a stage of padding, and one of padding alone, by fused multiply-adds."""
  hidden = jnp.full((machine.ROWS, 1), softmax.HIDDEN, jnp.float32)
  _, unit = softmax.split_scale(scale)
  assert np.isposinf(_fused_exponentials(hidden, unit, hidden[:, 0] * unit, 1)).all()
  monkeypatch.setattr(softmax, "exponentials", _fused_exponentials)
  tiles, kv_len = np.array([[True, True, True], [True, True, False]]), np.array([0, 0, 50])
  mask = from_tiles(tiles, kv_len, 64, 64)
  q, k, v, *_ = draw_inputs(Case("padding_first", b=1, h=1, d=d, n_q=128), 0, jnp.bfloat16)
  run = functools.partial(attention, scale=scale, implementation="pallas_mgpu")
  with interpret.interpreted():
    out, lse = jax.jit(run)(q, k, v, mask)
  wide = [x.astype(jnp.float32) for x in (q, k, v)]
  want, want_lse = attention(*wide, mask, scale=scale, implementation="reference")
  assert relative_error(out, want) < 4e-3
  assert relative_error(lse, want_lse) < 1e-6


def test_every_key_has_a_configuration_that_fits():
  """It is looked up in a table or reasoned; candidates begin with the reasoned one."""
  for size in itertools.product(
    pallas_mgpu.HEAD_DIMS, pallas_mgpu.BLOCKS, pallas_mgpu.BLOCKS, tuning.DIRECTIONS
  ):
    key = tuning.Key("h100", *size)
    tuning.lookup(key).check(key)
    tried = tuning.candidates(key)
    assert tried[0] == tuning.default(key) and len(set(tried)) == len(tried) > 5


def test_a_64_row_tile_is_never_alone_on_a_multiprocessor():
  """Its softmax would leave the tensor cores idle: two blocks fit, or a block has two tiles."""
  golden = json.loads(GOLDEN.read_text())
  for d, other, direction in itertools.product(pallas_mgpu.HEAD_DIMS, (64, 128), tuning.DIRECTIONS):
    sizes = (other, 64) if direction == "dkv" else (64, other)
    config = tuning.lookup(tuning.Key("h100", d, *sizes, direction))
    found = golden[f"d{d} q{sizes[0]} kv{sizes[1]}"][f"attention_{direction}"]
    two_blocks = found["registers"] <= 128 and found["shared_bytes"] <= 113 * 1024
    spills = (d, sizes, direction) == (128, (128, 64), "dkv")  # with two tiles
    assert (two_blocks and config.tiles_per_block == 1) or config.tiles_per_block == 2 or spills


def test_costliest_heads_first():
  counts = np.array([[[1, 1], [5, 5], [0, 9]]], np.int32)
  np.testing.assert_array_equal(lists.order_of_call(counts, None, 2, 3), [1, 4, 2, 5, 0, 3])
