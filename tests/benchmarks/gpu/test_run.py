"""The GPU benchmark, rehearsed on a CPU with a stand-in: whole rows, resumed runs, honest gates."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from freqformer.kernels.block_sparse import tuning

from benchmarks import rows
from benchmarks.cpu import attention as cpu_attention
from benchmarks.gpu import cases, gates
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import slot_steps as plans
from benchmarks.gpu.attempt import Job, attempts
from benchmarks.gpu.cases import Case
from benchmarks.gpu.device import Deadline
from benchmarks.gpu.sizes import FULL, TINY
from benchmarks.rows import Store
from freqformer.config import ConfigError
from freqformer.simulation import calibrate
from freqformer.simulation.descriptions import load_gpu
from tests.benchmarks.gpu.helpers import tiny_bench

# One worker: what the file prepares or compiles is then made once.
pytestmark = pytest.mark.xdist_group("gpu_benchmark")

# A row of every kind of measurement.
_REHEARSED = (
  "64x128 tiles",
  "long selections",
  "1M tokens, 4K keys, 18 heads",
  "ceiling/copy",
  "dense/a_64k",
  "lists_d10/a_64k",
  "fused_over_separate/a_64k",
  "backward_lists_d10/a_64k",
  "window/b_115k",
  "fixed4k/a_1m",
  "around/a_128k",
  "linear/a_128k",
  "search/a_128k",
  "form_stage_by_stage_d05/a_64k",
)
_PARTS = tuple(dict.fromkeys(case.part for case in cases.cases(TINY)))


def _main(folder, *, parts=_PARTS, **options):
  fixed = {"minutes": 60, "out": str(folder), "implementation": "reference", "rehearse": True}
  return gpu_run.main(**fixed, parts=parts, **options)


def _run(folder, **options):
  """An empty run, to be given cases."""
  return gpu_run.Run(tiny_bench(folder, **options))


def _cases(*names):
  return [case for case in cases.cases(TINY) if case.name in names]


def _measured(run):
  return [row for row in run.store.all() if not row["name"].startswith("gate")]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
  """A rehearsal of a row of every kind: the run, its folder and what it printed."""
  folder = tmp_path_factory.mktemp("rehearsal")
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    run = _main(folder, only=plans.only(_REHEARSED))
  return run, folder, printed.getvalue()


# ---- the whole program ---------------------------------------------------------------------------


def test_every_kind_of_row_is_whole_and_correct(rehearsed):
  run, folder, printed = rehearsed
  found = {row["name"]: row for row in _measured(run)}
  assert (
    json.loads((folder / "attention_gpu_reference_rehearsal.json").read_text()) == run.store.all()
  )
  assert not run.skipped and not run.troubles
  assert {*_REHEARSED, "cudnn/a_64k", "cudnn_backward/a_64k"} <= set(found)
  for name, row in found.items():
    assert "error" not in row and row["rehearsal"] and row["code"] and row["device"] == "cpu"
    if name.startswith(("ceiling", "cudnn_backward", "fused_over")):
      continue
    assert row["correct"], name
    if "flops" in row:
      assert row["clock"] == "wall" and row["timing_note"].endswith("wall clock only")
      assert row["implementation"] == ("cudnn" if name.startswith("cudnn") else "reference")
  checked = found["64x128 tiles"]
  assert checked["two_runs_bit_equal"]
  assert {f"error_{name}" for name in ("out", "lse", "dq", "dk", "dv")} <= set(checked)
  # A run that is killed must have named all that it wanted, and what it was doing.
  lines = printed.splitlines()
  assert {f"wanted {name}" for name in _REHEARSED} == set(lines[: len(_REHEARSED)])
  place = lines.index("begin 64x128 tiles")
  assert lines[place + 1].startswith("ok    64x128 tiles  ")


def test_ratios_come_from_the_rows_they_name(rehearsed):
  run, *_ = rehearsed
  by_name = {row["name"]: row for row in run.store.all()}
  row = by_name["lists_d10/a_64k"]
  dense = by_name["cudnn/a_64k"]
  np.testing.assert_allclose(row["speedup"], dense["all_heads_seconds"] / row["seconds"])
  np.testing.assert_allclose(row["retained"], row["speedup"] * row["density"])
  spec = TINY.specs["a_64k"]
  pairs = row["density"] * spec.n**2 * spec.heads
  np.testing.assert_allclose(row["flops"], 4 * pairs * spec.head_dim)
  million = by_name["cudnn/a_1m"]
  assert million["heads"] == 1 and "one head" in million["note"]
  np.testing.assert_allclose(million["all_heads_seconds"], 4 * million["seconds"])
  launches = by_name["fused_over_separate/a_64k"]
  best = min(launches["separate_wall_s"].values())
  assert set(launches["separate_wall_s"]) == {"sequential", "concurrent"}
  np.testing.assert_allclose(launches["ratio"], best / launches["fused_wall_s"])
  form = by_name["form_stage_by_stage_d05/a_64k"]
  assert form["changes"] == "scores_ahead=False"
  assert form["ratio"] == form["otherwise"]["seconds"] / form["configured"]["seconds"]


def test_the_simulator_is_calibrated_by_the_file_as_it_is(rehearsed, tmp_path):
  """Every forward pass of attention is taken with its lists; all else is counted."""
  run, folder, _ = rehearsed
  gpu = load_gpu("h100")
  message = r"no row of h100 to fit to \((\d+) of \1 rows left out: \1 of a rehearsal\)"
  with pytest.raises(ConfigError, match=message):
    calibrate.fit_file(gpu, folder / "attention_gpu_reference_rehearsal.json")
  # The same file as a GPU would have written it, with a row that failed and a wrong one.
  device = {"device": "NVIDIA H100 80GB HBM3"}
  found = [row | device for row in run.store.all()]
  for row in found:
    del row["rehearsal"]
  dense = next(row for row in found if row["name"] == "dense/a_64k")
  found += [{"name": "x", "error": "E"} | device, dense | {"correct": False}]
  path = tmp_path / "rows.json"
  path.write_text(json.dumps(found))
  with pytest.raises(ConfigError, match="no row of a100 .* of h100"):
    calibrate.fit_file(load_gpu("a100"), path)
  fit = calibrate.fit_file(gpu, path)
  by_name = {row["name"]: row for row in found}
  fitted = {row["name"] for row in fit.rows}
  assert {"cudnn/a_64k", "window/b_115k", "fixed4k/a_1m", "lists_d10/a_64k"} <= fitted
  for row in fit.rows:
    measured = by_name[row["name"]]
    assert row["attention_flops"] == pytest.approx(measured["flops"]), row["name"]
    assert row["measured_seconds"] == measured["seconds"]
    assert row["implementation"] == measured["implementation"]
  left_out, chosen = fit.notes
  assert left_out.startswith(f"{len(found) - len(fit.rows)} of {len(found)} rows left out: ")
  for reason in ("no timed attention call", "not of a forward pass alone", "1 failed", "1 wrong"):
    assert reason in left_out
  assert "of reference" in chosen
  assert not any(row["fitted"] for row in fit.rows if row["implementation"] == "cudnn")
  assert any("missed" in warning for warning in fit.gpu.fit_warnings)  # a CPU's times are no H100's


def test_the_committed_cpu_rows_calibrate_the_cpu():
  path = rows.RESULTS / "attention_cpu.json"
  found = rows.read_rows(path)
  assert cpu_attention.described(found, cpu_attention.FULL) == found
  fit = calibrate.fit_file(load_gpu("cpu"), path)
  assert len(fit.rows) == 6 and fit.notes[0].endswith("10 no timed attention call")
  assert max(abs(r["error"]) for r in fit.rows if not r["fitted"]) < 0.15
  with pytest.raises(ConfigError, match="no row of h100 .*5 of cpu"):
    calibrate.fit_file(load_gpu("h100"), path)


def test_a_second_run_measures_nothing_that_is_there(rehearsed):
  run, folder, _ = rehearsed
  before = _measured(run)
  again = _run(folder, minutes=0)
  again.rows(_cases(*_REHEARSED))
  assert _measured(run) == before and not again.skipped


def test_the_plot_is_drawn_of_what_is_there(rehearsed, tmp_path):
  from benchmarks.gpu.plot import draw

  run, *_ = rehearsed
  assert draw(run.store.all(), tmp_path / "plot.png").stat().st_size > 10_000
  with pytest.raises(ValueError, match="run the benchmark first"):
    draw([], tmp_path / "none.png")


def test_rows_of_other_code_are_measured_anew(tmp_path):
  context = {"device": "cpu", "code": "one"}
  store = Store(tmp_path / "rows.json", context, ("device", "code"))
  store.add({"name": "a", "value": 1})
  assert store.get("a")["value"] == 1
  store.add({"name": "b", "error": "out of memory"})
  assert store.get("b") is None
  newer = Store(store.path, context | {"code": "other"}, ("device", "code"))
  assert newer.get("a") is None and newer.all() == []
  with pytest.raises(ValueError, match="where it was measured, \\['code'\\]"):
    store.add({"name": "c", "code": "mine"})


def test_the_deadline_stops_it(tmp_path, capsys):
  """A case that was not reached has no row, lest "not correct" blame a kernel that never ran."""
  run = _run(tmp_path, minutes=0)
  run.rows(_cases("dense/a_64k", "torch_rows"))
  assert run.skipped == ["dense/a_64k", "torch_rows"] and not _measured(run)
  printed = capsys.readouterr().out
  assert printed.endswith("\nunreached dense/a_64k\nunreached torch_rows\n")
  assert all(row["measured"] is None for row in run.store.all())
  assert "no time for: dense/a_64k" in run.report()


def test_parts_and_rows_by_name(tmp_path):
  """A step of a slot gets the rows that it asks for, in the order of its parts."""
  names = [case.name for case in cases.chosen(TINY, ("forms", "ceilings"))]
  assert names[0].startswith("form_") and names[-1] == "ceiling/copy"
  assert not {case.part for case in cases.chosen(TINY)} & set(cases.ON_REQUEST)
  with pytest.raises(ValueError, match="--parts has no nothing; parts are checks, ceilings, "):
    _main(tmp_path, parts=("nothing",))
  with pytest.raises(ValueError, match="finds no case; cases are plain; dense mode, ragged; "):
    _main(tmp_path, only="no such case")
  with pytest.raises(ValueError, match="a rehearsal measures nothing"):
    _main(rows.RESULTS, only="^one tile$")


def test_a_run_in_another_configuration(tmp_path, monkeypatch):
  """The kernels see it, the rows say it, and a run without it takes none of them for its own."""
  seen = []

  def look(bench):
    seen.append(tuning.lookup(tuning.Key("h100", 128, 128, 128, "forward")).take_turns)
    return {"correct": True}

  monkeypatch.setattr(cases, "chosen", lambda sizes, parts: [Case("looked", "rest", look)])
  (row,) = _measured(_main(tmp_path, configuration="take_turns=False"))
  assert row["config"] == "take_turns=False" and "--config='take_turns=False'" in row["command"]
  (row,) = _measured(_main(tmp_path))
  assert seen == [False, True] and "config" not in row


def test_each_form_is_traced_under_its_own_configuration(tmp_path, monkeypatch):
  key = tuning.Key("h100", 128, 128, 128, "forward")
  seen = []

  def look(q, k, v, mask, implementation):
    seen.append(tuning.lookup(key).take_turns)
    return q

  monkeypatch.setattr("benchmarks.gpu.bench.attend", look)
  bench = _run(tmp_path).bench
  problem = cases.masks.dense(TINY.specs["a_16k"])
  for value in (True, False):
    changed = dataclasses.replace(tuning.lookup(key), take_turns=value)
    bench.call(problem, {key: changed})()
  assert seen == [True, False]


def test_a_failing_kernel_is_a_row_that_says_so_and_is_tried_again(tmp_path):
  run = _run(tmp_path, implementation="no_such_backend")
  run.rows(_cases("plain"))
  (row,) = _measured(run)
  assert "no_such_backend" in row["error"] and run.troubles == ["plain"]
  for correct in (False, True):
    again = _run(tmp_path)
    again.rows([Case("plain", "checks", lambda _, correct=correct: {"correct": correct})])
    assert again.troubles == ([] if correct else ["plain"])
  # A rival that fails is no trouble of ours.
  again.rows([Case("torch_rows", "torch", lambda _: 1 / 0)])
  assert again.troubles == []


def test_both_sizes_have_the_same_rows_and_every_gate_its_own():
  """A gate that reads a row which the plan never makes could never be met."""
  names = [case.name for case in cases.cases(FULL)]
  assert names == [case.name for case in cases.cases(TINY)] and len(set(names)) == len(names)
  assert {row for gate in gates.GATES for row in gate.rows} <= set(names)


# ---- gates ---------------------------------------------------------------------------------------


def test_gates_take_the_worst_row_and_wait_for_all():
  gate = gates.Gate("g", ("a", "b"), "retained", 0.85, 0.94)

  def judged(*values, **more):
    return gate.row({n: {"retained": x, **more} for n, x in zip("ab", values, strict=False)})

  whole = judged(0.95, 0.9)
  assert (whole["measured"], whole["passed"], whole["record_met"]) == (0.9, True, False)
  part = judged(0.99)
  assert part["passed"] is None and part["missing"] == ["b"]
  assert "incomplete" in gates.table([part])
  wrong = judged(0.99, 0.99, correct=False)
  assert wrong["passed"] is None and wrong["measured"] is None
  missed = judged(0.99, 0.5)
  assert missed["passed"] is False and "MISSED" in gates.table([missed])
  # Of seconds, less is better.
  time = gates.Gate("t", ("a", "b"), "seconds", 28.0, 25.4, "ms")
  late = time.row({"a": {"seconds": 0.027}, "b": {"seconds": 0.029}})
  assert late["measured"] == 29 and not late["passed"]


def test_what_cannot_end_in_time_is_not_begun(tmp_path):
  store = tiny_bench(tmp_path, "reference").store
  assert list(attempts(store, [Job("a", dict, 60)], Deadline(30))) == [("a", None)]
