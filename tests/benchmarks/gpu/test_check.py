"""The checks at real sizes find what is wrong, and check what they say they check."""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import check, config
from benchmarks.gpu.check import CASES, LARGE, tiny
from tests.benchmarks.gpu.helpers import tiny_bench

CASE = tiny(next(case for case in CASES if case.name == "64x128 tiles"))


@pytest.fixture
def fresh():
  """No trace of another attention is reused, before or after."""
  check.run.clear_cache()
  yield
  check.run.clear_cache()


def test_a_kernel_that_ignores_the_lists_is_found_out(monkeypatch, tmp_path, fresh):
  attention = check.attention

  def wrong(q, k, v, mask, implementation):
    longer = dataclasses.replace(mask, kv_counts=jnp.maximum(mask.kv_counts, 1))
    return attention(q, k, v, longer, implementation=implementation)

  monkeypatch.setattr(check, "attention", wrong)
  assert not check.check(tiny_bench(tmp_path, "reference"), CASE)["correct"]


def test_runs_that_differ_are_found_out(monkeypatch, tmp_path):
  """By a unit in the last place, as an addition in another order would."""
  run = check.run
  calls = []

  def unsteady(*operands):
    (out, lse), grads = run(*operands)
    calls.append(None)
    return (out, lse * (1 + 2.0**-23 * (len(calls) == 2))), grads

  monkeypatch.setattr(check, "run", unsteady)
  found = check.check(tiny_bench(tmp_path, "reference"), CASE)
  assert len(calls) == 2 and not found["two_runs_bit_equal"] and not found["correct"]


@pytest.mark.parametrize(
  "text, message",
  [
    ("colour=2", "'colour=2' is no field=value; the fields are stages, step"),
    ("stages", "'stages' is no field=value"),
    ("take_turns=0", "take_turns must be True or False, got '0'"),
    ("stages=True", "stages must be a whole number, got 'True'"),
    ("step=96", "must be 64 or 128"),
  ],
)
def test_configurations_that_do_not_exist_are_refused(text, message):
  with pytest.raises(ValueError, match=message):
    config.everywhere(config.parse(text))


def test_tables_that_are_no_multiple_of_the_alignment():
  """The two cases about it would check nothing with arrays that end at a multiple of 256 bytes."""
  mask = check.draw_mask(check.UNALIGNED, 6)
  assert all(x.nbytes % 256 for x in (mask.kv_indices, mask.kv_counts, mask.kv_len, mask.kv_bias))


def test_the_cases_are_what_their_names_say():
  for case in CASES:
    mask = check.draw_mask(tiny(case), 0).check()
    assert (mask.kv_indices is None) == (case.keep == 0)
    assert (np.asarray(mask.kv_counts) == 0).any() == (case.empty > 0), case.name
    assert (np.asarray(mask.kv_len) < mask.block_kv).any() == case.ragged
    assert (mask.kv_bias is not None) == case.bias
    # Seeds share a compilation.
    assert check.draw_mask(tiny(case), 1).max_kv == mask.max_kv
  assert LARGE[0].n * LARGE[0].h * LARGE[0].d > 2**31
  covered = {(case.block_q, case.block_kv) for case in CASES if case.d == 128}
  assert covered == {(64, 64), (64, 128), (128, 64), (128, 128)}
  assert {case.d for case in CASES} == {64, 128}
  assert {case.dtype for case in CASES} == {"bfloat16", "float16"}


@pytest.mark.parametrize("option", ["--implementation=no_such_backend", "--minutes=0"])
def test_what_is_wrong_or_unreached_shows_in_the_exit_code(monkeypatch, tmp_path, option):
  arguments = ["check", "--rehearse", "--only=^plain$", option, f"--out={tmp_path}"]
  monkeypatch.setattr(sys, "argv", arguments)
  assert check.main() == 1


def test_checks_of_another_configuration_have_a_file_of_their_own(monkeypatch, tmp_path):
  arguments = ["check", "--rehearse", "--only=^plain$", "--minutes=0", "--config=stages=2"]
  monkeypatch.setattr(sys, "argv", [*arguments, f"--out={tmp_path}"])
  check.main()
  assert not (tmp_path / "attention_gpu_rehearsal.json").exists()
