"""The GPU benchmark's driver, rehearsed on a CPU with a stand-in for the kernel: whole rows, resumed runs, honest gates."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from freqformer.kernels.block_sparse import tuning

from benchmarks import rows
from benchmarks.cpu import attention as cpu_attention
from benchmarks.gpu import attention as gpu_attention
from benchmarks.gpu import gates
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu.plan import FULL, REHEARSAL, SHORT
from benchmarks.gpu.rows import Deadline, Store
from freqformer.config import ConfigError
from freqformer.simulation import calibrate
from freqformer.simulation.descriptions import load_gpu

# One worker: what the file prepares or compiles is then made once.
pytestmark = pytest.mark.xdist_group("gpu_benchmark")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
  """A short rehearsal of every part: the session and its folder."""
  folder = tmp_path_factory.mktemp("rehearsal")
  run = gpu_run.main(
    minutes=5, out=str(folder), implementation="reference", rehearse=True, plan=SHORT
  )
  return run, folder


# ---- the whole driver ----------------------------------------------------------------------------------------------------


def test_every_part_writes_correct_rows(rehearsed):
  run, folder = rehearsed
  found = json.loads((folder / "attention_gpu_rehearsal.json").read_text())
  by_name = {row["name"]: row for row in found}
  assert not [row for row in found if "error" in row]
  assert all(
    row["rehearsal"] and row["code"] and row["commit"] and row["device"] == "cpu" for row in found
  )
  for name in (
    "ceiling/matmul",
    "cudnn/a_64k",
    "dense/a_64k",
    "dense_by_lane/a_64k",
    "lists_d10/a_64k",
    "lists_d10_unsorted/a_64k",
    "lists_d10_16x8/a_64k",
    "fused_over_separate/a_64k",
    "backward_lists_d10/a_64k",
    "backward_dense/a_16k",
    "window/b_115k",
    "freqformer/a_64k",
    "fixed4k/a_1m",
    "around/a_64k",
    "linear/a_64k",
    "search/a_64k",
    "backward_freqformer/a_64k",
    "lists_4k/a_1m",
    "lists_d10/d_32k",
  ):
    assert name in by_name, name
  timed = [row for row in found if "tflops" in row and not row["name"].startswith("ceiling")]
  for row in timed:
    assert row["name"].startswith("cudnn_backward") or row["correct"], row
    assert (
      row["flops"] > 0 and row["clock"] == "wall" and row["timing_note"].endswith("wall clock only")
    )
    assert row["implementation"] == ("cudnn" if row["name"].startswith("cudnn") else "reference")
  assert (folder / "attention_gpu_rehearsal.png").stat().st_size > 10_000


def test_ratios_come_from_the_rows_they_name(rehearsed):
  run, _ = rehearsed
  by_name = {row["name"]: row for row in run.store.all()}
  row, dense = by_name["lists_d10/a_64k"], by_name["cudnn/a_64k"]
  assert row["dense_row"] == dense["name"]
  np.testing.assert_allclose(row["speedup"], dense["all_heads_seconds"] / row["seconds"])
  np.testing.assert_allclose(row["retained"], row["speedup"] * row["density"])
  spec = SHORT.spec("a_64k")
  np.testing.assert_allclose(
    row["flops"], 4 * row["density"] * spec.n**2 * spec.heads * spec.head_dim
  )
  million = by_name["cudnn/a_1m"]
  assert million["heads"] == 1 and "one head" in million["note"]
  np.testing.assert_allclose(million["all_heads_seconds"], 4 * million["seconds"])
  launches = by_name["fused_over_separate/a_64k"]
  best = min(launches["separate_wall_s"].values())
  assert set(launches["separate_wall_s"]) == {"sequential", "concurrent"}
  np.testing.assert_allclose(launches["ratio"], best / launches["fused_wall_s"])


def test_the_simulator_is_calibrated_by_the_file_as_it_is(rehearsed, tmp_path):
  """Every forward pass of attention is taken with its lists; all else is counted; rehearsals and other devices refused."""
  run, folder = rehearsed
  path, gpu = folder / "attention_gpu_rehearsal.json", load_gpu("h100")
  with pytest.raises(
    ConfigError, match=r"no row of h100 to fit to \((\d+) of \1 rows left out: \1 of a rehearsal\)"
  ):
    calibrate.fit_file(gpu, path)
  # The same file as a GPU would have written it, with a row that failed, a wrong one, and the model's.
  found = [
    {k: v for k, v in r.items() if k != "rehearsal"} | {"device": "NVIDIA H100 80GB HBM3"}
    for r in run.store.all()
  ]
  dense = next(r for r in found if r["name"] == "dense/a_64k")
  found += [
    {"name": "x", "error": "E", "device": dense["device"]},
    dense | {"correct": False},
    {"name": "y", "expected": True},
  ]
  (tmp_path / "rows.json").write_text(json.dumps(found))
  with pytest.raises(ConfigError, match="no row of a100 .* of h100"):
    calibrate.fit_file(load_gpu("a100"), tmp_path / "rows.json")
  fit = calibrate.fit_file(gpu, tmp_path / "rows.json")
  by_name = {r["name"]: r for r in found}
  assert {"cudnn/a_64k", "window/b_115k", "freqformer/a_64k", "lists_d10/d_32k"} <= {
    r["name"] for r in fit.rows
  }
  for r in fit.rows:
    assert r["attention_flops"] == pytest.approx(by_name[r["name"]]["flops"]), r["name"]
    assert (
      r["measured_seconds"] == by_name[r["name"]]["seconds"]
      and r["implementation"] == by_name[r["name"]]["implementation"]
    )
  left_out, chosen = fit.notes
  assert left_out.startswith(f"{len(found) - len(fit.rows)} of {len(found)} rows left out: ")
  for reason in (
    "no timed attention call",
    "5 not of a forward pass alone",
    "1 failed",
    "1 wrong results",
    "1 not measured",
  ):
    assert reason in left_out
  assert "of reference" in chosen and not any(
    r["fitted"] for r in fit.rows if r["implementation"] == "cudnn"
  )
  assert any("missed" in w for w in fit.warnings)  # a CPU's times are no H100's


def test_the_committed_cpu_rows_calibrate_the_cpu():
  found = rows.read_rows(rows.RESULTS / "attention_cpu.json")
  assert cpu_attention.described(found, cpu_attention.FULL) == found
  fit = calibrate.fit_file(load_gpu("cpu"), rows.RESULTS / "attention_cpu.json")
  assert (
    len(fit.rows) == 6
    and fit.notes[0].endswith("6 no timed attention call")
    and fit.worst(False) < 0.15
  )
  with pytest.raises(ConfigError, match="no row of h100 .*5 of cpu"):
    calibrate.fit_file(load_gpu("h100"), rows.RESULTS / "attention_cpu.json")


def test_a_second_run_measures_nothing_again(rehearsed, monkeypatch):
  run, _ = rehearsed
  again = gpu_attention.Session(SHORT, run.store, Deadline(60), "xla")
  monkeypatch.setattr(again, "describe", None)  # whatever would be measured would fail
  before = [row for row in run.store.all() if not row["name"].startswith("gate")]
  gpu_run.run_parts(again, [p for p in gpu_run.PARTS if p is not gpu_run.torch])
  assert [row for row in run.store.all() if not row["name"].startswith("gate")] == before
  assert not again.skipped


def test_rows_of_other_code_are_measured_anew(rehearsed, tmp_path):
  run, _ = rehearsed
  store = Store(tmp_path / "rows.json", dict(run.store.context), rehearsal=True)
  store.add({"name": "a", "value": 1})
  assert store.get("a")["value"] == 1
  store.add({"name": "b", "error": "out of memory"})
  assert store.get("b") is None
  newer = Store(store.path, store.context | {"code": "other"})
  assert newer.get("a") is None and newer.all() == []


def test_the_deadline_stops_it(tmp_path, capsys):
  store = Store.open(tmp_path, "late", "command", rehearsal=True)
  run = gpu_attention.Session(SHORT, store, Deadline(0), "xla")
  gpu_run.run_parts(run, (gpu_run.dense_mode, gpu_run.lists, gpu_run.torch))
  assert run.skipped == ["dense/a_64k", "lists_d10/a_64k", "torch_*"]
  assert (
    "unreached dense/a_64k\nunreached lists_d10/a_64k\nunreached torch_*" in capsys.readouterr().out
  )
  assert all(row["name"].startswith("gate") and row["measured"] is None for row in store.all())
  assert "no time for: dense/a_64k" in gpu_run.report(run)


def test_parts_and_rows_by_name(tmp_path, capsys):
  """A step of a slot gets what it asks for; parts that are not named are not run."""
  options = dict(
    minutes=5, out=str(tmp_path), implementation="reference", rehearse=True, plan=SHORT
  )
  run = gpu_run.main(**options, parts=("dense_mode", "forms"), only="^form_stage_by_stage_d05/")
  measured = [row["name"] for row in run.store.all() if not row["name"].startswith("gate")]
  assert measured == ["form_stage_by_stage_d05/a_64k"] and not list(tmp_path.glob("*.png"))
  (row,) = [row for row in run.store.all() if row["name"] in measured]
  assert row["correct"] and row["changes"] == "scores_ahead=False"
  assert row["ratio"] == pytest.approx(row["otherwise"]["seconds"] / row["configured"]["seconds"])
  printed = capsys.readouterr().out
  assert "begin form_stage_by_stage_d05/a_64k\nok    form_stage_by_stage_d05/a_64k  " in printed
  with pytest.raises(ValueError, match="--parts has no nothing; parts are ceilings, "):
    gpu_run.main(**options, parts=("nothing",))


def test_a_run_in_another_configuration(tmp_path, monkeypatch):
  """The kernels see it, the rows say it, and a run without it takes none of them for its own."""
  seen = []

  def look(run):
    seen.append(tuning.lookup(tuning.Key("h100", 128, 128, 128, "forward")).take_turns)
    run.row("looked", lambda: {"correct": True})

  monkeypatch.setattr(gpu_run, "parts_named", lambda names: (look,))
  options = dict(
    minutes=5,
    out=str(tmp_path),
    implementation="reference",
    rehearse=True,
    plan=SHORT,
    parts=("look",),
  )
  gpu_run.main(**options, config="take_turns=False")
  (row,) = [
    row
    for row in rows.read_rows(tmp_path / "attention_gpu_rehearsal.json")
    if row["name"] == "looked"
  ]
  assert row["config"] == "take_turns=False" and "--config='take_turns=False'" in row["command"]
  gpu_run.main(**options)
  (row,) = [
    row
    for row in rows.read_rows(tmp_path / "attention_gpu_rehearsal.json")
    if row["name"] == "looked"
  ]
  assert seen == [False, True] and "config" not in row


def test_each_form_is_traced_under_its_own_configuration():
  key, seen = tuning.Key("h100", 128, 128, 128, "forward"), []

  def look(x):
    seen.append(tuning.lookup(key).take_turns)
    return x

  for value in (True, False):
    configs = {key: dataclasses.replace(tuning.lookup(key), take_turns=value)}
    jax.jit(gpu_attention._under(configs, look))(1.0)
  assert seen == [True, False]


def test_a_failing_kernel_is_a_row_that_says_so(tmp_path):
  store = Store.open(tmp_path, "failing", "command", rehearsal=True)
  run = gpu_attention.Session(SHORT, store, Deadline(60), "no_such_backend")
  gpu_run.run_parts(run, (gpu_run.lists,))
  (row,) = [row for row in store.all() if row["name"].startswith("lists")]
  assert "no_such_backend" in row["error"] and store.get(row["name"]) is None


def test_a_rehearsal_never_writes_among_measured_rows():
  with pytest.raises(ValueError, match="measures nothing"):
    gpu_run.main(minutes=1, out=str(gpu_run.rows.RESULTS), implementation=None, rehearse=True)


def test_devices_have_files_of_their_own():
  assert gpu_run.device_slug("NVIDIA H100 80GB HBM3") == "h100"
  assert gpu_run.device_slug("NVIDIA A100-SXM4-40GB") == "a100-sxm4-40gb"
  assert gpu_run.device_slug("cpu") == "cpu"


def test_both_plans_have_the_same_parts_and_every_gate_its_rows():
  """A gate that reads a row which the plan never makes could never be met."""
  names = (
    {f"dense/{n}" for n in FULL.dense}
    | {f"window/{FULL.window}"}
    | {f"around/{n}" for n in FULL.around}
  )
  names |= {f"lists_d{round(100 * d):02d}/{n}" for n, d in FULL.lists}
  names |= {f"backward_lists_d{round(100 * d):02d}/{n}" for n, d in FULL.backward}
  names |= {f"fused_over_separate/{n}" for n in FULL.launches}
  names |= {f"freqformer/{n}" for n in FULL.fused} | {f"fixed4k/{n}" for n in FULL.fixed}
  assert {row for gate in gates.GATES for row in gate.rows} <= names
  assert set(REHEARSAL.specs) <= set(FULL.specs)
  for part in ("dense", "lists", "fused", "fixed", "backward", "rest", "launches"):
    assert getattr(REHEARSAL, part) == getattr(FULL, part)


# ---- gates ---------------------------------------------------------------------------------------------------------------


def test_gates_take_the_worst_row_and_wait_for_all():
  gate = gates.Gate("g", ("a", "b"), "retained", "", ">=", 0.85, 0.94)

  def rows(*values, **more):
    return [{"name": n, "retained": x, **more} for n, x in zip("ab", values, strict=False)]

  (whole,) = gates.gate_rows(rows(0.95, 0.9), gates=(gate,))
  assert (whole["measured"], whole["passed"], whole["record_met"]) == (0.9, True, False)
  (part,) = gates.gate_rows(rows(0.99), gates=(gate,))
  assert part["passed"] is None and part["missing"] == ["b"] and "incomplete" in gates.table([part])
  (wrong,) = gates.gate_rows(rows(0.99, 0.99, correct=False), gates=(gate,))
  assert wrong["passed"] is None and wrong["measured"] is None
  (missed,) = gates.gate_rows(rows(0.99, 0.5), gates=(gate,))
  assert missed["passed"] is False and "MISSED" in gates.table([missed])


def test_values_of_a_model_never_count_as_measured():
  gate = gates.Gate("g", ("a",), "seconds", "ms", "<=", 28.0, 25.4, 1e3)
  modelled = [{"name": "a", "seconds": 0.02, "expected": True}]
  (row,) = gates.gate_rows(modelled, (gate,))
  assert row["measured"] is None and row["passed"] is None
  (row,) = gates.gate_rows([{"name": "a", "seconds": 0.03}], (gate,))
  assert row["measured"] == 30.0
