"""The correctness sweep finds what is wrong, and checks what it says it checks."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse import tuning

from benchmarks.gpu import check
from benchmarks.gpu.check import CASES, LARGE, tiny

CASE = next(case for case in CASES if case.name == "64x128 tiles")
ONLY = "--only=^64x128 tiles, seed 0$"


def _sweep(folder, *arguments, implementation="reference"):
  """Runs the command's main function as a rehearsal; returns its verdict and its rows by name."""
  fixed = (f"--implementation={implementation}", "--rehearse", "--minutes=5", f"--out={folder}")
  right = check.main([*fixed, *arguments])
  path = folder / "gpu_check_rehearsal.json"
  return right, {row["name"]: row for row in json.loads(path.read_text())} if path.exists() else {}


@pytest.fixture
def fresh():
  """No trace of another attention is reused, before or after."""
  check.run.clear_cache()
  yield
  check.run.clear_cache()


def test_a_right_kernel_passes(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(check, "CASES", (CASE,))
  monkeypatch.setattr(check, "LARGE", LARGE[:1])
  monkeypatch.setattr(check, "SEEDS", (0,))
  right, found = _sweep(tmp_path)
  printed = capsys.readouterr().out
  assert right and len(found) == 5 and "5 of 5 right" in printed
  assert all(row["correct"] and row["rehearsal"] and row["code"] for row in found.values())
  row = found["64x128 tiles, seed 0"]
  assert row["two_runs_bit_equal"]
  assert {f"error_{name}" for name in ("out", "lse", "dq", "dk", "dv")} <= set(row)
  assert {"constant table", "sliced in a scan"} <= set(found)
  # A run that is killed must have named all that it wanted, and what it was doing.
  lines = printed.splitlines()
  assert lines[:5] == [f"wanted {name}" for name in found]
  assert lines[5] == "begin 64x128 tiles, seed 0"
  assert lines[6].startswith("ok    64x128 tiles, seed 0  ")
  # Nothing that is right is checked again: this kernel would fail.
  monkeypatch.setattr(check, "run", None)
  assert _sweep(tmp_path) == (True, found)


def test_a_kernel_that_ignores_the_lists_is_found_out(monkeypatch, tmp_path, capsys, fresh):
  attention = check.attention

  def wrong(q, k, v, mask, implementation):
    longer = dataclasses.replace(mask, kv_counts=jnp.maximum(mask.kv_counts, 1))
    return attention(q, k, v, longer, implementation=implementation)

  monkeypatch.setattr(check, "attention", wrong)
  right, found = _sweep(tmp_path, ONLY)
  assert not right and not found["64x128 tiles, seed 0"]["correct"]
  assert "wrong: 64x128 tiles, seed 0" in capsys.readouterr().out


def test_runs_that_differ_are_found_out(monkeypatch):
  """By a unit in the last place, as an addition in another order would."""
  run = check.run
  calls = []

  def unsteady(*operands):
    (out, lse), grads = run(*operands)
    calls.append(None)
    return (out, lse * (1 + 2.0**-23 * (len(calls) == 2))), grads

  monkeypatch.setattr(check, "run", unsteady)
  found = check.check(tiny(CASE), 0, "reference", check.FEW_ROWS)
  assert len(calls) == 2 and not found["two_runs_bit_equal"] and not found["correct"]


def test_what_was_not_reached_is_neither_right_nor_wrong(tmp_path, capsys):
  """It has no row: "not correct" would be an alarm about a kernel that nobody ran."""
  assert _sweep(tmp_path, ONLY, "--minutes=0") == (False, {})
  printed = capsys.readouterr().out
  assert "unreached 64x128 tiles, seed 0" in printed and "wrong" not in printed
  assert "no time for: 64x128 tiles, seed 0" in printed


def test_a_case_that_fails_is_wrong_and_is_tried_again(monkeypatch, tmp_path):
  right, found = _sweep(tmp_path, ONLY, implementation="no_such_backend")
  (row,) = found.values()
  assert not right and not row["correct"] and "no_such_backend" in row["error"]
  for correct in (False, True):
    monkeypatch.setattr(check, "check", lambda *_, correct=correct, **__: {"correct": correct})
    assert _sweep(tmp_path, ONLY)[0] == correct


def test_a_case_under_another_configuration(monkeypatch, tmp_path):
  """The kernels of the case, and no others, see the changed fields; the row's name says so."""
  seen = {}

  def look(case, seed, implementation, count):
    for block_q in (64, 128):
      for way in tuning.DIRECTIONS:
        key = tuning.Key("h100", 128, block_q, 128, way)
        seen[key] = tuning.lookup(key)
    return {"correct": True}

  monkeypatch.setattr(check, "check", look)
  config = "stages=2,take_turns=False"
  right, found = _sweep(tmp_path, ONLY, f"--config={config}")
  for key, looked_up in seen.items():
    changed = dataclasses.replace(tuning.lookup(key), stages=2, take_turns=False)
    assert looked_up == (changed if key.block_q == 64 else tuning.lookup(key))
  (row,) = found.values()
  assert right and row["name"] == f"64x128 tiles, seed 0 [{config}]"
  assert row["config"] == config


@pytest.mark.parametrize(
  "only, config, message",
  [
    ("no such case", "", "finds no case; cases are plain, seed 0; dense mode, ragged, seed 0;"),
    ("^long sel", "stages=2", "changes attention's kernels only; leave out long selections"),
    ("^plain, seed 0$", "colour=2", "'colour=2' is no field=value; the fields are stages, step"),
    ("^plain, seed 0$", "stages", "'stages' is no field=value"),
    ("^plain, seed 0$", "take_turns=0", "take_turns must be True or False, got '0'"),
    ("^plain, seed 0$", "stages=True", "stages must be a whole number, got 'True'"),
    ("^plain, seed 0$", "step=96", "must be 64 or 128"),
    ("^plain, seed 0$", "stages=8", "bytes of shared memory"),
  ],
)
def test_what_cannot_be_checked_is_refused(only, config, message):
  with pytest.raises(ValueError, match=message):
    check.selected(True, only, config)


def test_tables_that_are_no_multiple_of_the_alignment():
  """The two cases about it would check nothing with arrays that end at a multiple of 256 bytes."""
  mask = check.draw_mask(check.UNALIGNED, 6)
  assert all(x.nbytes % 256 for x in (mask.kv_indices, mask.kv_counts, mask.kv_len, mask.kv_bias))


def test_the_cases_are_what_their_names_say():
  assert len({case.name for case in CASES + LARGE}) == len(CASES + LARGE)
  for case in CASES:
    mask = check.draw_mask(tiny(case), 0)
    mask.check() if case.ordered else mask.check_shapes()
    assert (mask.kv_indices is None) == (case.keep == 0)
    assert (np.asarray(mask.kv_counts) == 0).any() == (case.empty > 0), case.name
    assert (np.asarray(mask.kv_len) < mask.block_kv).any() == case.ragged
    assert (mask.kv_bias is not None) == case.bias
    # Seeds share a compilation.
    assert check.draw_mask(tiny(case), 1).max_kv == mask.max_kv
  unordered = check.draw_mask(tiny(next(case for case in CASES if not case.ordered)), 0)
  assert (np.diff(unordered.kv_indices, axis=-1) < 0).any()
  assert all(case.n * case.h * case.d > 2**31 for case in LARGE[:1])
  covered = {(case.block_q, case.block_kv) for case in CASES if case.d == 128}
  assert covered == {(64, 64), (64, 128), (128, 64), (128, 128)}
  assert {case.d for case in CASES} == {64, 128}
  assert {case.dtype for case in CASES} == {"bfloat16", "float16"}
