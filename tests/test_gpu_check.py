"""The correctness sweep finds what is wrong, and checks what it says it checks."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import CASES, LARGE, tiny

pytestmark = pytest.mark.usefixtures("quick_compiles")

CASE = next(c for c in CASES if c.name == "64x128 tiles")


def _sweep(monkeypatch, folder, **kwargs):
  monkeypatch.setattr(gpu_check, "CASES", (CASE,))
  monkeypatch.setattr(gpu_check, "LARGE", LARGE[:1])
  monkeypatch.setattr(gpu_check, "LINEAR", gpu_check.LINEAR[:1])
  monkeypatch.setattr(gpu_check, "AROUND", gpu_check.AROUND[-1:])
  monkeypatch.setattr(gpu_check, "SEEDS", (0,))
  options = {"implementation": "reference", "rehearse": True, "minutes": 5} | kwargs
  right = gpu_check.run(str(folder), **options)
  return right, json.loads((folder / "gpu_check_rehearsal.json").read_text())


def test_a_right_kernel_passes(monkeypatch, tmp_path, capsys):
  right, found = _sweep(monkeypatch, tmp_path)
  assert right and len(found) == 7 and "7 of 7 right" in capsys.readouterr().out
  assert all(row["correct"] and row["rehearsal"] for row in found)
  assert set(found[1]) >= {"error_out", "error_lse", "error_dq", "error_dk", "error_dv", "code", "commit"}


def test_a_kernel_that_ignores_the_lists_is_found_out(monkeypatch, tmp_path, capsys):
  attention = gpu_check.attention

  def wrong(q, k, v, mask, implementation):
    return attention(
      q, k, v, dataclasses.replace(mask, kv_counts=jnp.maximum(mask.kv_counts, 1)), implementation=implementation
    )

  monkeypatch.setattr(gpu_check, "attention", wrong)
  gpu_check.forward_backward.clear_cache()
  right, found = _sweep(monkeypatch, tmp_path)
  gpu_check.forward_backward.clear_cache()
  assert not right and not found[1]["correct"] and "wrong: check: 64x128 tiles, seed 0" in capsys.readouterr().out


def test_padding_that_leaks_is_found_out(monkeypatch):
  attention = gpu_check.attention

  def leaky(q, k, v, mask, implementation):
    full = dataclasses.replace(mask, kv_len=jnp.full_like(mask.kv_len, mask.block_kv))
    return attention(q, k, v, full, implementation=implementation)

  monkeypatch.setattr(gpu_check, "attention", leaky)
  gpu_check.forward_backward.clear_cache()
  found = gpu_check.check_padding_and_repeat("reference", small=True)
  gpu_check.forward_backward.clear_cache()
  assert not found["padding_changes_nothing"] and found["two_runs_bit_equal"] and not found["correct"]


def test_what_was_not_checked_is_not_right(monkeypatch, tmp_path):
  right, found = _sweep(monkeypatch, tmp_path, minutes=0)
  assert not right and not any(row["correct"] for row in found) and found[0]["error"] == "no time left"
  right, found = _sweep(monkeypatch, tmp_path, implementation="no_such_backend")
  assert not right and "no_such_backend" in found[0]["error"]


def test_the_cases_are_what_their_names_say():
  assert len({case.name for case in CASES + LARGE}) == len(CASES + LARGE)
  for case in CASES:
    mask = gpu_check.draw_mask(tiny(case), 0)
    mask.check() if case.ordered else mask.check_shapes()
    assert (mask.kv_indices is None) == (case.keep == 0)
    assert ((np.asarray(mask.kv_counts) == 0).any()) == (case.empty > 0), case.name
    assert (np.asarray(mask.kv_len) < mask.block_kv).any() == case.ragged
    assert (mask.kv_bias is not None) == case.bias
    assert gpu_check.draw_mask(tiny(case), 1).max_kv == mask.max_kv  # seeds share a compilation
  unordered = gpu_check.draw_mask(tiny(next(c for c in CASES if not c.ordered)), 0)
  assert (np.diff(unordered.kv_indices, axis=-1) < 0).any()
  assert max(case.n * case.h * case.d for case in LARGE) > 2**31
  covered = {(c.block_q, c.block_kv, c.d) for c in CASES if c.backward}
  assert {(64, 64, 128), (64, 128, 128), (128, 64, 128), (128, 128, 128), (128, 128, 64), (64, 64, 64)} <= covered
  assert {c.dtype for c in CASES} == {"bfloat16", "float16"} and {c.b for c in CASES} == {1, 2}


def test_a_rehearsal_stays_apart():
  with pytest.raises(ValueError, match="checks no kernel"):
    gpu_check.run(str(gpu_check.rows.RESULTS), None, True, 1)
