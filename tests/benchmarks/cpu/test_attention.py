"""The benchmark runs on tiny shapes, compares equal things and writes whole rows."""

import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import rows, timing
from benchmarks.arg_specs import SPECS
from benchmarks.cpu import attention as benchmark
from benchmarks.cpu.competitors import dense_loop, gradients
from freqformer.methods.freqformer import FreqFormer
from tests.kernels.block_sparse.suite import relative_error

TINY = dataclasses.replace(
  SPECS["cpu_1k"], name="tiny", grid=(4, 8, 8), head_dim=8, keys=128, block=32
)
RUN = benchmark.Run(
  TINY,
  dataclasses.replace(TINY, name="tiny_large", grid=(4, 16, 8)),
  (dataclasses.replace(TINY, name="tiny_plain"),),
  (64,),
  (64,),
  1,
  (("tiny", 32, FreqFormer(allocation=(0, 1, 1), mid_tiles=2)),),
)


def test_rows_of_a_run(tmp_path):
  found = benchmark.measure(RUN, memory=False)
  assert len({row["name"] for row in found}) == len(found) == 10
  for row in found:
    assert set(row) >= {"name", "value", "unit", "goal", "met", "others_cpu"}
    assert np.isfinite(row["value"]) and row["value"] > 0
    assert (row["met"] is None) == (row["goal"] is None)
    for timed in (v for v in row.values() if isinstance(v, dict)):
      assert 0 < timed["p10_s"] <= timed["median_s"] <= timed["p90_s"] and timed["calls"] >= 1
  for name in (row["name"] for row in found):
    assert name in rows.table(found)
  path = rows.write_rows("tiny", found, "command", tmp_path)
  written = json.loads(path.read_text())
  assert [row["name"] for row in written] == [row["name"] for row in found]
  context = {"command", "device", "cpu", "jax", "python", "commit", "sources", "date"}
  assert all(context <= set(row) and row["command"] == "command" for row in written)


def test_a_row_replaces_its_namesake_and_keeps_its_context(tmp_path):
  rows.write_rows("b", [{"name": "one", "value": 1}, {"name": "two", "value": 2}], "old", tmp_path)
  path = rows.write_rows("b", [{"name": "one", "value": 3, "commit": "abc"}], "new", tmp_path)
  one, two = json.loads(path.read_text())
  assert (one["name"], one["value"], one["command"], one["commit"]) == ("one", 3, "new", "abc")
  assert (two["name"], two["value"], two["command"]) == ("two", 2, "old")


def test_the_first_call_of_a_turn_is_not_counted(monkeypatch):
  seconds = iter([1.0, *3 * (9.0, 1.0)])  # the one that sizes a turn, then three turns
  monkeypatch.setattr(timing, "timed", lambda call: next(seconds))
  found = timing.interleave({"call": lambda: 0}, rounds=3, slice_s=1.0)
  assert found["call"].times == (1.0, 1.0, 1.0) and not list(seconds)


def test_rows_name_the_processor(tmp_path):
  info = tmp_path / "cpuinfo"
  one = "model\t\t: {}\ncpu family\t: 25\nmodel name\t: AMD: EPYC\n\n"
  info.write_text(one.format(17) + one.format(18))
  assert rows.processor(info) == "AMD: EPYC (family 25, model 17)"
  info.write_text("Features\t: fp asimd\n")
  assert rows.processor(info) == rows.processor(tmp_path / "absent") != ""


def test_sources_are_those_of_a_commit(tmp_path, monkeypatch):
  """The hash of files on disk is their commit's; results do not count, one byte of code does."""
  monkeypatch.setattr(rows, "_ROOT", tmp_path)
  files = {
    "train.py": "a",
    "eval.py": "b",
    "kernels/tuning.json": "{}",
    "benchmarks/rows.py": "c",
    "benchmarks/results/x.json": "[]",
  }
  for name in ("kernels", "freqformer", "configs", "benchmarks/results"):
    (tmp_path / name).mkdir(parents=True)
  for name, text in files.items():
    (tmp_path / name).write_text(text)

  def git(*args):
    return subprocess.run(
      ["git", "-c", "user.name=x", "-c", "user.email=x@x", *args], cwd=tmp_path, check=True
    )

  for args in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "one")):
    git(*args)
  found = rows.sources(tmp_path)
  assert len(rows.commits_with(found)) == 1
  (tmp_path / "benchmarks" / "results" / "new.json").write_text("[]")
  assert rows.sources(tmp_path) == found
  (tmp_path / "kernels" / "new.py").write_text("x")
  assert rows.sources(tmp_path) != found and not rows.commits_with(rows.sources(tmp_path))


def test_missed_goals_are_stored_as_missed():
  assert rows.goal_row("a", 13.9, ">= 14")["met"] is False
  assert rows.goal_row("a", 4.4, "<= 4.5")["met"] is True


@pytest.mark.parametrize("late", [False, True])
def test_the_dense_loop_is_dense_attention(late):
  q, k, v, d_out = TINY.inputs(4)

  def loop(q, k, v):
    return dense_loop(q, k, v, 64, late, remat=True)

  want = gradients(jax.nn.dot_product_attention)(d_out, q, k, v)
  found = gradients(loop)(d_out, q, k, v)
  for g, w in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    assert relative_error(g, w) < 3e-6


def test_a_child_reports_its_own_peak():
  """A small child of a process that holds much memory reports little."""
  held = jnp.ones((64, 1024, 1024)).block_until_ready()
  code = "from benchmarks.timing import peak_rss; print(peak_rss())"
  assert 1e6 < int(timing.in_child(["-c", code])) < timing.peak_rss()
  assert held.nbytes < timing.peak_rss()
  with pytest.raises(RuntimeError, match="failed with 3"):
    timing.in_child(["-c", "raise SystemExit(3)"])


def test_specs():
  assert SPECS["cpu_16k"].n == 16384 and SPECS["a_1m"].n == 1048576
  spec = SPECS["cpu_1k"]
  mask = spec.mask().check()
  own = np.arange(spec.layout.tiles)[None, None, :, None]
  assert (mask.kv_indices == own).any(-1).all()
  assert (mask.kv_counts == spec.keys // spec.block).all()
  with pytest.raises(ValueError, match="must be a multiple"):
    dataclasses.replace(TINY, keys=33)
