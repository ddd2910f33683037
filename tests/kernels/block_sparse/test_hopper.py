"""The Hopper kernels of attention on a machine without one: numerics, races, refusals, tuning."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse import hopper, tuning
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import dense_mask, from_tiles
from freqformer.kernels.block_sparse.tuning_table import DIRECTIONS
from freqformer.kernels.core import log2
from freqformer.kernels.core.target import Target
from freqformer.kernels.hopper import products, softmax
from freqformer.kernels.hopper.interpret import interpreted
from freqformer.kernels.hopper.machine import ROWS

from tests.compiled.test_resources import known_resources
from tests.kernels.block_sparse.suite import (
  CASES,
  CROSS,
  GROUPED,
  NAMES,
  AttentionSuite,
  Case,
  draw_inputs,
  draw_mask,
  oracle,
  relative_error,
  value_and_grads,
)


class TestPallasMgpu(AttentionSuite):
  implementation = "pallas_mgpu"
  cases = (
    *CASES[:5],
    GROUPED,
    CROSS,
  )  # biases and rectangular tiles: test_every_cut_of_tiles_into_stages
  dtypes = (jnp.bfloat16, jnp.float16)

  @pytest.fixture(autouse=True)
  def _interpreted(self):
    with interpreted():
      yield


def _run(q, k, v, mask, scale=None):
  """Returns output and LSE of the forward kernel."""
  call = jax.jit(lambda *x: attention(*x, scale=scale, implementation="pallas_mgpu"))
  return call(q, k, v, mask)


def _close(found, wanted):
  """Holds output, LSE and gradients, as many as there are, to the suite's errors."""
  for name, got, want in zip(NAMES, found, wanted, strict=False):
    assert relative_error(got, want) < (1e-6 if name == "lse" else 4e-3), name


def _check(case, config, seed=0, backward=True, **kwargs):
  """Compares the interpreted kernels, run with `config`, with the oracle."""
  mask = draw_mask(case, seed)
  q, k, v, *cotangents = draw_inputs(case, seed, jnp.bfloat16)
  sizes = (case.d, case.block_q, case.block_kv)
  configs = {tuning.Key("h100", *sizes, x): config for x in DIRECTIONS}
  with interpreted(**kwargs), tuning.override(configs):
    if backward:
      found = value_and_grads("pallas_mgpu")(q, k, v, mask, *cotangents)
    else:
      found = _run(q, k, v, mask)
  _close(found, oracle(q, k, v, mask, *cotangents))


ONE_HEAD = Case("one head", h=1, table_h=1, block_q=128, block_kv=128, n_q=256, n_kv=384)


@pytest.mark.parametrize(
  "block_q, block_kv, step", [(64, 64, 128), (64, 128, 64), (128, 64, 64), (128, 128, 128)]
)
def test_every_cut_of_tiles_into_stages(block_q, block_kv, step):
  """Tiles share a stage, fill one or need two; biases differ inside one, lists end in one.

  Query tiles, which dK and dV walk, and key tiles meet each step in each of their sizes.
  """
  case = dataclasses.replace(ONE_HEAD, block_q=block_q, block_kv=block_kv, bias=True, keep=0.7)
  _check(case, tuning.TuningConfig(2, step), seed=step)


# With both: every other test.
@pytest.mark.parametrize("scores_ahead, take_turns", [(True, False), (False, True), (False, False)])
def test_every_form_of_the_forward(scores_ahead, take_turns):
  config = tuning.TuningConfig(3, 64, scores_ahead=scores_ahead, take_turns=take_turns)
  _check(dataclasses.replace(ONE_HEAD, d=128), config, backward=False)


PAIRED = Case("paired", h=1, table_h=1, n_q=5 * 64, n_kv=7 * 64, keep=0.8)


@pytest.mark.parametrize("scores_ahead, step", [(True, 64), (True, 128), (False, 64)])
def test_two_tiles_in_a_block(scores_ahead, step):
  """Neighbours' lists differ in length, one is empty, and a last tile has no neighbour."""
  counts = np.pad(draw_mask(PAIRED, step).kv_counts, ((0, 0), (0, 0), (0, 1))).reshape(-1, 2)
  assert (counts[:, 0] != counts[:, 1]).sum() > 1
  config = tuning.TuningConfig(2, step, scores_ahead=scores_ahead, tiles_per_block=2)
  _check(PAIRED, config, seed=step, backward=scores_ahead)


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
  """One walk of every kernel through the detector: two warpgroups, a ring that wraps around."""
  sizes = {"block_q": block, "block_kv": block, "n_q": 2 * block}
  case = dataclasses.replace(ONE_HEAD, keep=0.9, **sizes)
  assert draw_mask(case, 0).kv_counts.max() * block // 64 > 2
  _check(case, config, backward=config.scores_ahead, detect_races=True)
  assert "RACE DETECTED" not in capfd.readouterr().out  # the detector prints and goes on


def _against_reference(q, k, v, mask, scale):
  """Compares the interpreted forward kernel with the reference in float32."""
  with interpreted():
    found = _run(q, k, v, mask, scale)
  wide = [x.astype(jnp.float32) for x in (q, k, v)]
  _close(found, attention(*wide, mask, scale=scale, implementation="reference"))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_odd_scales(scale):
  """Hidden keys stay hidden under a scale that is not positive."""
  case = Case("scale", h=1, table_h=1)
  q, k, v, *_ = draw_inputs(case, 1, jnp.bfloat16)
  _against_reference(q, k, v, draw_mask(case, 1), scale)


@pytest.mark.parametrize(
  ("n", "target", "words"),
  [
    (256, Target("cpu", "cpu"), "use implementation='xla' there, .*interpreted"),
    (256, Target("cuda", "NVIDIA A100", "8.0"), "9.0.*8.0.*use implementation='triton'"),
    (200, Target("cuda", "NVIDIA H100", "9.0"), "^200 query rows are no multiple of block_q=64"),
  ],
  ids=["cpu", "ampere", "rows"],
)
def test_refusals_name_a_remedy(n, target, words):
  """The dispatcher's own refusals are tested in tests/kernels/core/test_op.py."""
  x = jax.ShapeDtypeStruct((1, n, 2, 64), jnp.bfloat16)
  assert re.search(words, hopper.unsupported(x, x, x, dense_mask(n, n, 64, 64), target))


LONG_TILES = tuning.Key("h100", 128, 128, 128, "forward")
SHORT_TILES = dataclasses.replace(LONG_TILES, block_q=64)
ONE_STAGE = {"stages": 1, "step": 64}
MORE = dataclasses.asdict(tuning.PAIR) | {"compute_registers": 240}


@pytest.mark.parametrize(
  ("key", "settings", "words"),
  [
    (LONG_TILES, {"stages": 4, "step": 128}, "bytes of shared memory"),
    (LONG_TILES, {"compute_registers": 240, "memory_registers": 32}, "registers"),
    (LONG_TILES, {"step": 96}, "must be 64 or 128"),
    (LONG_TILES, {"compute_registers": 240}, "set both"),
    (LONG_TILES, ONE_STAGE, "never end"),
    (LONG_TILES, ONE_STAGE | {"take_turns": False}, "next keys wait"),
    (LONG_TILES, {"step": 64, "tiles_per_block": 2}, "needs tiles of 64 rows"),
    (LONG_TILES, {"tiles_per_block": 3}, "must be 1 or 2"),
    (SHORT_TILES, MORE, "of 4 warpgroups, they start with 512"),
  ],
)
def test_tuning_refuses_what_does_not_fit(key, settings, words):
  with pytest.raises(ValueError, match=words):
    tuning.TuningConfig(**settings).check(key)


def test_tuning_takes_what_fits():
  single = tuning.TuningConfig(**ONE_STAGE, take_turns=False, scores_ahead=False)
  assert single.check(LONG_TILES) and tuning.PAIR.check(SHORT_TILES)


def _fused_exponentials(x, unit, top, columns):
  """Computes `softmax.exponentials` as a device may round it, with an exact product of x and unit.

  A kernel has no wider type to hold it, so what rounding left out is computed (Dekker's product).
  """

  def halves(number):
    big = number * jnp.float32(4097)
    high = big - (big - number)
    return high, number - high

  x_high, x_low = halves(x)
  unit_high, unit_low = halves(jnp.float32(unit))
  product = x * unit
  left_out = x_high * unit_high - product + x_high * unit_low + x_low * unit_high
  left_out = left_out + x_low * unit_low
  return jnp.exp2(product - products.over_columns(top, columns) + left_out)


def test_hidden_scores_have_no_probability_however_they_are_rounded(monkeypatch):
  """Lists that begin with a stage of padding, and one of padding alone, by fused multiply-adds."""
  # Its rounding leaves the larger part of a hidden score above the rounded maximum.
  scale = 1 / 8
  hidden = jnp.full((ROWS, 1), log2.HIDDEN, jnp.float32)
  _, unit = log2.split_scale(scale)
  assert np.isposinf(_fused_exponentials(hidden, unit, hidden[:, 0] * unit, 1)).all()
  monkeypatch.setattr(softmax, "exponentials", _fused_exponentials)
  tiles = np.array([[True, True, True], [True, True, False]])
  mask = from_tiles(tiles, np.array([0, 0, 50]), 64, 64)
  q, k, v, *_ = draw_inputs(Case("padding_first", h=1, n_q=128), 0, jnp.bfloat16)
  _against_reference(q, k, v, mask, scale)


def test_every_key_has_a_configuration_that_fits():
  """It is looked up in a table or reasoned; candidates begin with the reasoned one."""
  sizes = (hopper.HEAD_DIMS, hopper.BLOCKS, hopper.BLOCKS, DIRECTIONS)
  for size in itertools.product(*sizes):
    key = tuning.Key("h100", *size)
    tuning.lookup(key).check(key)
    tried = tuning.candidates(key)
    assert tried[0] == tuning.default(key)
    assert len(set(tried)) == len(tried) > 5


def test_a_64_row_tile_is_never_alone_on_a_multiprocessor():
  """Its softmax would leave the tensor cores idle: two blocks fit, or a block has two tiles."""
  known = known_resources()
  for d, other, direction in itertools.product(hopper.HEAD_DIMS, (64, 128), DIRECTIONS):
    sizes = (other, 64) if direction == "dkv" else (64, other)
    if (d, sizes, direction) == (128, (128, 64), "dkv"):
      continue  # spills with two tiles
    config = tuning.lookup(tuning.Key("h100", d, *sizes, direction))
    found = known[f"d{d} q{sizes[0]} kv{sizes[1]}"][f"attention_{direction}"]
    two_blocks = found["registers"] <= 128 and found["shared_bytes"] <= 113 * 1024
    assert two_blocks if config.tiles_per_block == 1 else config.tiles_per_block == 2
