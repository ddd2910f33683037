"""The correctness sweep finds what is wrong, and checks what it says it checks."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse import tuning

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu.check import CASES, LARGE, tiny

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
  printed = capsys.readouterr().out
  assert right and len(found) == 9 and "9 of 9 right" in printed
  assert all(row["correct"] and row["rehearsal"] for row in found)
  assert {"check: constant table", "check: sliced in a scan"} <= {row["name"] for row in found}
  # A run that is killed must have named all that it wanted, and what it was doing.
  lines = printed.splitlines()
  assert lines[:9] == [f"wanted {row['name'].removeprefix('check: ')}" for row in found]
  assert lines[9] == "begin padding and repeat" and lines[10].startswith(
    "ok    padding and repeat  "
  )
  assert _second_run(monkeypatch, tmp_path) == (
    True,
    found,
  )  # nothing that is right is checked again
  assert set(found[1]) >= {
    "error_out",
    "error_lse",
    "error_dq",
    "error_dk",
    "error_dv",
    "code",
    "commit",
  }


def _second_run(monkeypatch, folder):
  """Once more with a kernel that always fails."""
  with monkeypatch.context() as broken:
    broken.setattr(gpu_check, "forward_backward", None)
    return _sweep(broken, folder)


def test_a_kernel_that_ignores_the_lists_is_found_out(monkeypatch, tmp_path, capsys):
  attention = gpu_check.attention

  def wrong(q, k, v, mask, implementation):
    return attention(
      q,
      k,
      v,
      dataclasses.replace(mask, kv_counts=jnp.maximum(mask.kv_counts, 1)),
      implementation=implementation,
    )

  monkeypatch.setattr(gpu_check, "attention", wrong)
  gpu_check.forward_backward.clear_cache()
  right, found = _sweep(monkeypatch, tmp_path, only="^64x128 tiles")
  gpu_check.forward_backward.clear_cache()
  assert (
    not right
    and not found[0]["correct"]
    and "wrong: check: 64x128 tiles, seed 0" in capsys.readouterr().out
  )


def test_padding_that_leaks_is_found_out(monkeypatch):
  attention = gpu_check.attention

  def leaky(q, k, v, mask, implementation):
    full = dataclasses.replace(mask, kv_len=jnp.full_like(mask.kv_len, mask.block_kv))
    return attention(q, k, v, full, implementation=implementation)

  monkeypatch.setattr(gpu_check, "attention", leaky)
  gpu_check.forward_backward.clear_cache()
  found = gpu_check.check_padding_and_repeat("reference", small=True)
  gpu_check.forward_backward.clear_cache()
  assert (
    not found["padding_changes_nothing"] and found["two_runs_bit_equal"] and not found["correct"]
  )


def test_what_was_not_reached_is_neither_right_nor_wrong(monkeypatch, tmp_path, capsys):
  """It has no row: a row that says "not correct" would be an alarm about a kernel that nobody ran."""
  monkeypatch.setattr(gpu_check, "CASES", (CASE,))
  assert not gpu_check.run(
    str(tmp_path), "reference", True, minutes=0, only="^64x128 tiles, seed 0$"
  )
  printed = capsys.readouterr().out
  assert (
    "unreached 64x128 tiles, seed 0" in printed and "no time for: 64x128 tiles, seed 0" in printed
  )
  assert "wrong" not in printed and not list(tmp_path.iterdir())


def test_a_case_that_fails_is_wrong_and_is_tried_again(monkeypatch, tmp_path):
  only = "^64x128 tiles, seed 0$"
  assert not gpu_check.run(str(tmp_path), "no_such_backend", True, 5, only)
  (row,) = json.loads((tmp_path / "gpu_check_rehearsal.json").read_text())
  assert not row["correct"] and "no_such_backend" in row["error"]
  for correct in (False, True):
    monkeypatch.setattr(gpu_check, "check", lambda *_, correct=correct, **__: {"correct": correct})
    assert gpu_check.run(str(tmp_path), "reference", True, 5, only) == correct


def test_a_case_under_another_configuration(monkeypatch, tmp_path):
  """The kernels of the case, and no others, see the changed fields; the row's name says so."""
  seen = {}

  def look(case, seed, implementation, count):
    for block_q, block_kv in ((64, 128), (128, 128)):
      for way in tuning.DIRECTIONS:
        key = tuning.Key("h100", 128, block_q, block_kv, way)
        seen[key] = tuning.lookup(key)
    return {"correct": True}

  monkeypatch.setattr(gpu_check, "check", look)
  config = "stages=2,take_turns=False"
  assert gpu_check.run(str(tmp_path), None, True, 5, "^64x128 tiles, seed 0$", config)
  for key, found in seen.items():
    changed = dataclasses.replace(tuning.lookup(key), stages=2, take_turns=False)
    assert found == (changed if key.block_q == 64 else tuning.lookup(key))
  (row,) = json.loads((tmp_path / "gpu_check_rehearsal.json").read_text())
  assert row["name"] == f"check: 64x128 tiles, seed 0 [{config}]" and row["config"] == config


@pytest.mark.parametrize(
  "only, config, message",
  [
    ("no such case", "", "finds no case; cases are padding and repeat; plain, seed 0;"),
    ("^selection$", "stages=2", "changes attention's kernels only; leave out selection"),
    (
      "^plain, seed 0$",
      "colour=2",
      "'colour=2' is no field=value; the fields are stages, step, compute_registers",
    ),
    ("^plain, seed 0$", "stages", "'stages' is no field=value"),
    ("^plain, seed 0$", "take_turns=0", "take_turns must be True or False, got '0'"),
    ("^plain, seed 0$", "stages=True", "stages must be a whole number, got 'True'"),
    ("^plain, seed 0$", "step=96", "must be 64 or 128"),
    ("^plain, seed 0$", "stages=8", "bytes of shared memory"),
  ],
)
def test_what_cannot_be_checked_is_refused(tmp_path, only, config, message):
  with pytest.raises(ValueError, match=message):
    gpu_check.run(str(tmp_path), None, True, 1, only, config)


def test_tables_that_are_no_multiple_of_the_alignment():
  """The two cases about alignment would check nothing with arrays that end at a multiple of 256 bytes."""
  case = gpu_check._odd_sizes("", small=False)
  mask = gpu_check.draw_mask(case, 6)
  assert all(x.nbytes % 256 for x in (mask.kv_indices, mask.kv_counts, mask.kv_len, mask.kv_bias))


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
  assert {
    (64, 64, 128),
    (64, 128, 128),
    (128, 64, 128),
    (128, 128, 128),
    (128, 128, 64),
    (64, 64, 64),
  } <= covered
  assert {c.dtype for c in CASES} == {"bfloat16", "float16"} and {c.b for c in CASES} == {1, 2}


def test_a_rehearsal_stays_apart():
  with pytest.raises(ValueError, match="checks no kernel"):
    gpu_check.run(str(gpu_check.rows.RESULTS), None, True, 1)
