"""A slot keeps what was found whatever its steps do: real processes, some of which misbehave."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from freqformer.kernels.block_sparse import tuning
from freqformer.kernels.block_sparse.tuning_table import DIRECTIONS

from benchmarks.gpu import cases, config, slot_planted
from benchmarks.gpu import slot as gpu_slot
from benchmarks.gpu import slot_steps as plans
from benchmarks.gpu.code import ROOT
from benchmarks.gpu.sizes import FULL
from benchmarks.gpu.slot_output import Outcome, read_output
from benchmarks.gpu.slot_steps import Step, planted

pytestmark = pytest.mark.xdist_group("gpu_slot")

# Children compile little, and find what an earlier run of the tests compiled.
_QUICK = {
  "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
# One step of every kind, cheap ones.
_STEPS = (
  plans.FACTS,
  plans.checks("first calls", "^(constant table|sliced in a scan)$", alone=True),
  plans.tests("conformance", "selection"),
  plans.timed("timed", "ceilings", "ceiling/copy", 60),
)


def _alive(pid: int) -> bool:
  """Returns True while a process runs; one that waits to be collected by its parent does not."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


def _rows(path: pathlib.Path) -> dict[str, dict]:
  return {row["name"]: row for row in json.loads(path.read_text())}


# ---- a rehearsal ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
  """A slot with one step of every kind, then all that misbehave: what it printed and its folder."""
  out = tmp_path_factory.mktemp("slot")
  printed = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
    for name, value in _QUICK.items():
      patch.setenv(name, value)
    slot = gpu_slot.Slot(out, 15, rehearse=True)
    assert not slot.run((*_STEPS, *plans.MISBEHAVING))
  return printed.getvalue(), out


def _steps(out: pathlib.Path) -> dict[str, dict]:
  return json.loads((out / gpu_slot.STATE).read_text())["steps"]


def test_every_end_of_a_process_has_its_name(rehearsed):
  printed, out = rehearsed
  states = {name: record["state"] for name, record in _steps(out).items()}
  assert {states[step.name] for step in _STEPS} == {"ok"}, states
  assert states["aborting"] == "died: SIGABRT" and states["failing"] == "exit 3"
  assert states["garbage"] == "ok" and states["wrong"] == "wrong"
  assert f"wrong: {slot_planted.CASE}" in printed and "failed: failing" in printed
  log = (out / gpu_slot.LOG).read_text(errors="strict")
  assert "Fatal Python error: Aborted" in log and "==== timed: ok" in log
  found = _rows(out / "attention_gpu_rehearsal.json")
  row = found["constant table"]
  assert row["correct"] and row["rehearsal"] and row["ptxas"] and row["driver"]
  assert found["ceiling/copy"]["seconds"] > 0


def test_a_step_that_overstays_is_killed_with_its_children_and_keeps_its_rows(rehearsed):
  printed, out = rehearsed
  record = _steps(out)["stubborn"]
  assert (record["state"], record["begun"]) == ("killed", "stubborn") and record["seconds"] < 30
  assert "in: begin stubborn" in printed and re.search("did not end: .*stubborn", printed)
  assert not _alive(_rows(out / "planted.json")[slot_planted.ROW]["child"])
  # The cases after the one that hung are run without it.
  assert record["unreached"] == [slot_planted.BEHIND] and "unreached: none" in printed
  assert _steps(out)["stubborn, the rest"]["state"] == "ok"


def test_a_wrong_case_is_bisected_by_itself(rehearsed):
  printed, out = rehearsed
  repair = slot_planted.REPAIRED_BY
  notes = json.loads((out / gpu_slot.STATE).read_text())["notes"]
  assert notes[0] == f"{slot_planted.CASE} is repaired by {repair}"
  assert notes[1] == f"what is timed from here on runs with {repair}"
  assert f"bisect: {notes[0]}" in printed
  assert {f"bisect: {variant or 'as is'}" for variant in plans.VARIANTS} <= set(_steps(out))
  # No variant's row took the place of the case's own.
  assert _rows(out / "planted.json")[slot_planted.CASE]["correct"] is False


def test_what_comes_back_fits(rehearsed):
  """A rented machine returns 8 files, and the last 12,000 characters of output."""
  printed, out = rehearsed
  files = [path for path in out.rglob("*") if path.is_file()]
  # A training row, and a report and table of configurations, would be three more.
  assert len(files) <= 5
  assert all(path.parent == out and re.fullmatch(r"[\w.-]+", path.name) for path in files)
  assert len(printed) < 12_000
  summary = printed[printed.index("---- summary") :]
  for name in ("first calls", "timed", "stubborn", "wrong:", "unreached:", "files in"):
    assert name in summary


def test_a_step_that_ended_well_is_not_run_again(rehearsed, tmp_path):
  """In another folder, from fetched files; of other code, or on another device, it would be."""
  _, out = rehearsed
  slot = gpu_slot.Slot(tmp_path, 1, rehearse=True)
  slot.resume(out)
  assert slot.run(_STEPS)
  assert [outcome.state for outcome in slot.outcomes] == ["ok", *["skipped"] * 3]
  rows = "attention_gpu_rehearsal.json"
  assert set(_rows(tmp_path / rows)) == set(_rows(out / rows))
  again = gpu_slot.Slot(tmp_path, 1, rehearse=True)
  assert again._ended_well(_STEPS[1])
  for key in ("device", "code"):
    other = gpu_slot.Slot(tmp_path, 1, rehearse=True)
    other._before[key] = "other"
    assert not other._ended_well(_STEPS[1])


# ---- single properties, with steps that need no jax ----------------------------------------------


@pytest.fixture
def hurried(monkeypatch):
  """Limits of a slot cut short, so that its end comes within a second or two."""
  monkeypatch.setattr(gpu_slot, "CLOSING", 0.5)
  monkeypatch.setattr(plans, "START", 0.1)
  monkeypatch.setattr(plans, "MARGIN", 0.1)


def _run(folder, *steps, minutes=1.0):
  """Runs steps one after the other; returns the slot."""
  slot = gpu_slot.Slot(folder, minutes, rehearse=True)
  slot.run(tuple(dataclasses.replace(step, alone=True) for step in steps))
  return slot


def _tool(folder, monkeypatch, name, text):
  """Puts a made-up program on PATH."""
  folder.mkdir(exist_ok=True)
  path = folder / name
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_everything_ends_in_time(hurried, tmp_path):
  """A step longer than what is left is cut off; what follows is not begun, which is not wrong."""
  start = time.monotonic()
  slot = _run(tmp_path, planted("stubborn", 60), planted("failing"), minutes=2.5 / 60)
  assert time.monotonic() - start < 2.6
  states = {outcome.step.name: outcome.state for outcome in slot.outcomes}
  assert states["stubborn"] == "killed" and states["failing"] == "not begun"
  summary = slot.summary()
  assert "not begun: stubborn, the rest; failing" in summary and "wrong: none" in summary
  assert f"unreached: {slot_planted.BEHIND}" in summary


def test_a_stopped_parent_kills_its_children_and_keeps_the_rows(tmp_path):
  command = [sys.executable, "-m", "benchmarks.gpu.slot", "--rehearse", f"--out={tmp_path}"]
  command += ["--steps=stubborn;failing", "--minutes=1"]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  for _ in range(400):
    time.sleep(0.05)
    if (tmp_path / "planted.json").exists():
      break
  process.send_signal(signal.SIGTERM)
  printed, _ = process.communicate(timeout=10)
  assert process.returncode == 1 and "---- summary" in printed and "stopped by SIGTERM" in printed
  assert not _alive(_rows(tmp_path / "planted.json")[slot_planted.ROW]["child"])


def test_steps_that_build_on_a_broken_one_are_left_out(tmp_path):
  slot = _run(tmp_path, planted("aborting"), planted("garbage", after=("aborting",)))
  assert [outcome.state for outcome in slot.outcomes] == ["died: SIGABRT", "not begun"]
  assert slot.outcomes[1].note == "aborting did not end"


def test_timed_steps_run_with_the_repair(tmp_path):
  """A hang that a bisect repairs costs no timed row; other steps run as they are."""
  timed = plans.timed("dense", "dense_mode", "a_16k", 60, after=("aborting",))
  slot = gpu_slot.Slot(tmp_path, 1, rehearse=True)
  slot._together([planted("aborting")])
  assert slot._refusal(timed).note == "aborting did not end"
  assert slot._arguments(timed) == list(timed.arguments)
  slot._bisect([Outcome(planted("wrong", bisect=True), "wrong", wrong=[slot_planted.CASE])])
  assert slot._refusal(timed) is None
  assert slot._arguments(timed) == [*timed.arguments, f"--config={slot_planted.REPAIRED_BY}"]
  assert slot._refusal(planted("garbage", after=("aborting",))) is not None
  assert "--config" not in str(slot._arguments(plans.FIRST_CALLS))


def test_an_error_of_the_parent_costs_one_step(tmp_path, monkeypatch):
  popen = subprocess.Popen

  def no_memory(command, **options):
    if "--kind=failing" in command:
      raise OSError("no memory")
    return popen(command, **options)

  monkeypatch.setattr(gpu_slot.subprocess, "Popen", no_memory)
  monkeypatch.setattr(gpu_slot.tempfile, "tempdir", str(tmp_path))
  slot = _run(tmp_path / "out", planted("failing"), planted("garbage"))
  assert not list(tmp_path.glob("slot-*"))  # temporary folders are removed
  assert [outcome.state for outcome in slot.outcomes] == ["error", "ok"]
  assert "failed: failing" in slot.summary() and "OSError: no memory" in slot.summary()


def test_a_hung_kernel_is_looked_at_before_it_is_killed(tmp_path, monkeypatch):
  _tool(tmp_path / "tools", monkeypatch, "cuda-gdb", 'echo "looks at $2: $*"')
  _run(tmp_path / "out", planted("stubborn", 1.0))
  log = (tmp_path / "out" / gpu_slot.LOG).read_text()
  assert "-batch -ex info cuda kernels -ex info cuda warps" in log


def test_a_sanitizer_reports_and_is_not_judged(tmp_path, monkeypatch):
  """It is left out where it is missing; its report makes no case wrong and takes no row's place."""
  memcheck = plans.sanitizer("memcheck")
  (outcome,) = _run(tmp_path / "without", memcheck).outcomes
  assert outcome.state == "absent" and outcome.good
  errors = "echo '========= Invalid read'; echo '========= ERROR SUMMARY: 2 errors'"
  _tool(tmp_path / "tools", monkeypatch, "compute-sanitizer", errors)
  (outcome,) = _run(tmp_path / "with", memcheck).outcomes
  assert outcome.state == "said something" and outcome.good
  assert "Invalid read" in (tmp_path / "with" / gpu_slot.LOG).read_text()
  clean = "echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)'"
  _tool(tmp_path / "tools", monkeypatch, "compute-sanitizer", clean)
  (outcome,) = _run(tmp_path / "clean", plans.sanitizer("racecheck")).outcomes
  assert outcome.state == "ok"


def test_without_pytest_the_conformance_tests_are_absent(tmp_path, monkeypatch):
  monkeypatch.setattr(gpu_slot.importlib.util, "find_spec", lambda name: None)
  (outcome,) = _run(tmp_path, plans.tests("linear", "linear")).outcomes
  assert outcome.state == "absent" and "pytest is not installed" in outcome.note


def test_writers_at_the_same_time_lose_no_row(tmp_path):
  """Steps share their files: processes that write at once each find the others' rows."""
  text = (
    "import pathlib, sys; from benchmarks.rows import merge_rows; "
    "[merge_rows(pathlib.Path(sys.argv[1]) / 'kind.json', [{'name': sys.argv[2] + str(i)}]) "
    "for i in range(50)]"
  )
  command = [sys.executable, "-c", text, str(tmp_path)]
  writers = [subprocess.Popen([*command, name], cwd=ROOT) for name in "abc"]
  assert [writer.wait() for writer in writers] == [0, 0, 0]
  assert len(_rows(tmp_path / "kind.json")) == 150
  assert [path.name for path in tmp_path.iterdir()] == ["kind.json"]


def test_fetched_rows_do_not_replace_newer_ones(tmp_path):
  old = tmp_path / "old"
  out = tmp_path / "out"
  for folder, value, names in ((old, "old", "ab"), (out, "new", "a")):
    folder.mkdir()
    rows = [{"name": name, "value": value} for name in names]
    (folder / "kind.json").write_text(json.dumps(rows))
  (old / "torn.json").write_text('[{"na')
  gpu_slot.Slot(out, 1).resume(old)
  found = {name: row["value"] for name, row in _rows(out / "kind.json").items()}
  assert found == {"a": "new", "b": "old"} and not (out / "torn.json").exists()
  with pytest.raises(FileNotFoundError, match="--resume=.*missing is no folder"):
    gpu_slot.Slot(out, 1).resume(tmp_path / "missing")


def test_an_assembler_is_found(tmp_path, monkeypatch):
  """The machine's own CUDA serves where PATH has no ptxas, and only there."""
  cuda = tmp_path / "cuda"
  other = tmp_path / "other"
  for folder in (cuda / "bin", other):
    folder.mkdir(parents=True)
    (folder / "ptxas").touch(mode=0o755)
  monkeypatch.setattr(gpu_slot, "CUDA", cuda)
  found = gpu_slot.with_assembler({"PATH": str(tmp_path), "KEPT": "1"})
  assert found == {"PATH": f"{tmp_path}{os.pathsep}{cuda / 'bin'}", "KEPT": "1"}
  assert gpu_slot.with_assembler({"PATH": str(other)}) == {"PATH": str(other)}


# ---- what is read off an output ------------------------------------------------------------------

_HALF = "wanted a, seed 0\nwanted b\nwanted c\nbegin a, seed 0\nok    a, seed 0   out 1\nbegin b\n"
_BAD = "begin a\nWRONG a  NaN\nbegin b\nFAILED b  FAILED: no\nunreached c\n"


@pytest.mark.parametrize(
  "text, code, state, begun, wrong, unreached",
  [
    (_HALF, None, "killed", "b", [], ["c"]),
    ("wanted a\nunreached a\n", 1, "unreached", "", [], ["a"]),
    (_BAD, 1, "wrong", "", ["a", "b"], ["c"]),
    ("", -9, "died: SIGKILL", "", [], []),
    ("", 2, "exit 2", "", [], []),
    ("", 0, "ok", "", [], []),
  ],
)
def test_output_is_read_as_it_was_meant(text, code, state, begun, wrong, unreached):
  found = read_output(plans.checks("x", ""), text, code)
  assert (found.state, found.begun, found.wrong) == (state, begun, wrong)
  assert found.unreached == unreached and found.good == (state == "ok")


# ---- plans ---------------------------------------------------------------------------------------

_ALL = [
  step
  for name in plans.PLANS
  for step in plans.plan(name, "plain" if name in ("hangs", "wrong") else "")
]


def _rows_of(step: Step) -> list[cases.Case]:
  """Returns the checks or timed rows of a step."""
  options = dict(argument.removeprefix("--").split("=", 1) for argument in step.arguments)
  parts = options.get("parts", "checks").split(",")
  found = [case for case in cases.chosen(FULL, parts) if re.search(options["only"], case.name)]
  assert {case.part for case in found} == set(parts), step.name
  # Every alternative by itself: one that finds nothing is a case that nobody checks.
  listed = re.fullmatch(r"\^\(([^?].*)\)\$", options["only"])
  for part in listed.group(1).split("|") if listed else ():
    assert any(re.search(part, case.name) for case in found), (step.name, part)
  return found


def test_every_pattern_of_a_plan_finds_something_and_nothing_that_costs_minutes():
  """No row of a million tokens, no peer from PyTorch, no dense attention of 512K tokens."""
  found = [case for s in _ALL if s.module in (plans.CHECK, plans.TIMED) for case in _rows_of(s)]
  assert found and not [case for case in found if re.search("1[mM]|dense.*512k|torch", case.name)]
  for step in _ALL:
    assert step.module != plans.TESTS or (ROOT / step.arguments[-1]).exists()


def test_a_timed_step_is_longer_than_the_guard_of_its_last_row():
  assert {case.part for case in cases.cases(FULL)} <= set(plans.GUARDS)
  for step in (step for step in _ALL if step.module == plans.TIMED):
    guards = (plans.GUARDS[case.part] for case in _rows_of(step))
    assert step.seconds >= plans.START + max(guards) + plans.MARGIN, step.name


def test_plans_and_steps_are_named_or_refused():
  for name in plans.PLANS:
    found = [step.name for step in plans.plan(name, "plain" if name in ("hangs", "wrong") else "")]
    assert len(set(found)) == len(found) and found[0] == "facts"
  for arguments, message in (
    (("second",), "choose one of first, right, hangs, wrong, study_1, study_2"),
    (("hangs",), "--case names the case"),
    (("first", "plain"), "--case names the case"),
  ):
    with pytest.raises(ValueError, match=message):
      plans.plan(*arguments)
  with pytest.raises(ValueError, match="--steps has no nothing; steps are facts; "):
    plans.chosen(plans.FIRST, "nothing", False)
  assert not set(plans.MISBEHAVING) & set(plans.chosen(plans.FIRST, "", False))
  assert set(plans.MISBEHAVING) < set(plans.chosen(plans.FIRST, "", True))


def test_small_checks_share_the_machine_and_timed_steps_do_not():
  grouped = gpu_slot.groups(plans.FIRST)
  assert [step for group in grouped for step in group] == list(plans.FIRST)
  assert all(len(group) == 1 or not any(step.alone for step in group) for group in grouped)
  assert max(map(len, grouped)) > 4
  timed = (plans.TIMED, "benchmarks.gpu.train")
  assert all(step.alone for step in plans.FIRST if step.module in timed)


def test_every_variant_of_the_bisect_fits_the_attention_kernels():
  """All of them: one that does not fit would run, and be called right, as it is configured."""
  sizes = itertools.product((64, 128), (64, 128), (64, 128), DIRECTIONS)
  keys = [tuning.Key("h100", *size) for size in sizes]
  for variant in plans.VARIANTS:
    assert config.changed(config.parse(variant), keys)


@pytest.mark.parametrize(
  "states, words, repair",
  [
    (("killed", "ok", "ok"), "c is repaired by by_lane and, alone, by step", "by_lane"),
    (("wrong", "wrong", "not begun"), "c is not repaired by any of: by_lane", ""),
    (("ok", "ok", "ok"), "c was right when it ran again as is: timing matters", ""),
    (("not begun",) * 3, "c: no time to bisect", ""),
  ],
)
def test_the_words_of_a_bisect(states, words, repair):
  names = (f"bisect: {name}" for name in ("as is", "by_lane", "step"))
  found = plans.verdict("c", dict(zip(names, states, strict=True)))
  assert found[0].startswith(words) and found[1] == repair
