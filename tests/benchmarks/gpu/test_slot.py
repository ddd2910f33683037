"""A slot keeps what was found whatever its steps do: rehearsed with real processes, some of which
misbehave on purpose."""

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

from benchmarks.gpu import attention as gpu_attention
from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import slot as gpu_slot
from benchmarks.gpu import slot_planted as gpu_slot_planted
from benchmarks.gpu import slot_steps as plans
from benchmarks.gpu.guards import GUARDS
from benchmarks.gpu.plan import FULL
from benchmarks.gpu.rows import Deadline, Store
from benchmarks.gpu.slot_steps import Step

pytestmark = pytest.mark.xdist_group("gpu_slot")

ROOT = pathlib.Path(__file__).parents[3]
_MODULE = "benchmarks.gpu.slot_planted"
# Children compile little, and find what an earlier run of the tests compiled.
_QUICK = {
  "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


def _alive(pid: int) -> bool:
  """Returns True while a process runs; one that waits to be collected by its parent does not."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


def _rows(path: pathlib.Path) -> dict[str, dict]:
  return {row["name"]: row for row in json.loads(path.read_text())}


# ---- a whole rehearsal ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
  """A rehearsal of the first plan and of all steps that misbehave: what it printed, its exit
  status and its folder."""
  out = tmp_path_factory.mktemp("slot")
  command = [
    sys.executable,
    "-m",
    "benchmarks.gpu.slot",
    "--rehearse",
    "--minutes=15",
    f"--out={out}",
  ]
  done = subprocess.run(
    command,
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, **_QUICK},
    timeout=960,
    check=False,
  )
  assert not done.stderr, done.stderr
  return done.stdout, done.returncode, out


def _state(out: pathlib.Path) -> dict:
  return json.loads((out / gpu_slot.STATE).read_text())


def test_a_step_that_overstays_is_killed_with_its_children_and_keeps_its_rows(rehearsed):
  printed, _, out = rehearsed
  record = _state(out)["steps"]["stubborn"]
  assert (record["state"], record["begun"]) == ("killed", "stubborn") and record["seconds"] < 8
  assert "in: begin stubborn" in printed and re.search("did not end: .*stubborn", printed)
  assert not _alive(_rows(out / "planted.json")[gpu_slot_planted.ROW]["child"])
  # Half of a file is named, and neither kept nor fatal.
  assert "cut_off.json is no whole JSON file" in record["note"]
  assert not (out / "cut_off.json").exists()


def test_every_step_of_the_plan_runs_and_is_right(rehearsed):
  _, _, out = rehearsed
  steps = _state(out)["steps"]
  for step in plans.FIRST:
    record = steps[step.name]  # sanitizers are not judged, and may be absent
    assert step.wrapper or record["state"] == "ok", (step.name, record)
  train = _rows(out / "gpu_train_rehearsal.json")["train/ucf101_S"]
  assert train["correct"] and train["rehearsal"] and train["steps"] > 1


def test_the_cases_behind_one_that_hung_are_run_without_it(rehearsed):
  printed, _, out = rehearsed
  steps = _state(out)["steps"]
  assert steps["stubborn"]["unreached"] == [gpu_slot_planted.BEHIND]
  assert steps["stubborn, the rest"]["state"] == "ok" and "unreached: none" in printed


def test_every_end_of_a_process_has_its_name(rehearsed):
  printed, code, out = rehearsed
  states = {name: record["state"] for name, record in _state(out)["steps"].items()}
  assert states["aborting"] == "died: SIGABRT" and states["failing"] == "exit 3"
  assert states["garbage"] == "ok" and states["wrong"] == "wrong" and states["facts"] == "ok"
  assert code == 1 and f"wrong: {gpu_slot_planted.CASE}" in printed and "failed: failing" in printed
  log = (out / gpu_slot.LOG).read_text(errors="strict")
  assert "Fatal Python error: Aborted" in log and "==== window: ok" in log


def test_what_is_wrong_is_bisected_by_itself(rehearsed):
  printed, _, out = rehearsed
  found = _state(out)
  repair = gpu_slot_planted.REPAIRED_BY
  assert found["notes"][0] == f"{gpu_slot_planted.CASE} is repaired by {repair}"
  assert found["notes"][1] == f"what is timed from here on runs with {repair}"
  assert f"bisect: {found['notes'][0]}" in printed
  tried = {name for name in found["steps"] if name.startswith(plans.PREFIX)}
  variants = ("as is", "by_lane=True", "take_turns=False", "stages=2", "step=64")
  assert {f"bisect: {variant}" for variant in variants} <= tried
  # No variant's row took the place of the case's own.
  assert _rows(out / "planted.json")[gpu_slot_planted.CASE]["correct"] is False


def test_rows_of_several_processes_lie_in_one_file_per_kind(rehearsed):
  _, _, out = rehearsed
  checks = _rows(out / "gpu_check_rehearsal.json")
  some = {f"check: {case}, seed 0" for case in ("plain", "one tile", "64x64 tiles, d=64")}
  assert some | {"check: selection", "check: search", "check: sliced in a scan"} <= set(checks)
  for row in checks.values():
    assert row["correct"] and row["rehearsal"] and row["ptxas"] and row["driver"]
  assert _rows(out / "attention_gpu_rehearsal.json")["window/b_115k"]["correct"]


def test_what_comes_back_fits(rehearsed):
  """A rented machine returns 8 files, two folders deep at most, and the last 12,000 characters."""
  printed, _, out = rehearsed
  files = [path for path in out.rglob("*") if path.is_file()]
  assert len(files) <= 8
  assert all(path.parent == out and re.fullmatch(r"[\w.-]+", path.name) for path in files)
  assert len(printed) < 12_000
  summary = printed[printed.index("---- summary") :]
  for name in ("plain", "window", "stubborn", "wrong:", "unreached:", "files in"):
    assert name in summary


def test_what_is_right_is_not_run_again(rehearsed, tmp_path):
  """In another folder, from fetched files; of other code, or on another device, it would be."""
  _, _, out = rehearsed
  slot = gpu_slot.Slot(tmp_path, 1, rehearse=True)
  slot.resume(out)
  steps = plans.chosen(plans.FIRST, "facts;plain;selection and search;window", False)
  start = time.monotonic()
  assert slot.run(steps) and time.monotonic() - start < 10
  assert [outcome.state for outcome in slot.outcomes] == ["ok", *["skipped"] * 3]
  assert set(_rows(tmp_path / "gpu_check_rehearsal.json")) == set(
    _rows(out / "gpu_check_rehearsal.json")
  )
  other = gpu_slot.Slot(tmp_path, 1, rehearse=True)
  assert other._ended_well(steps[1])
  other._before["device"] = "NVIDIA H200"
  assert not other._ended_well(steps[1])
  other = gpu_slot.Slot(tmp_path, 1, rehearse=True)
  other._before["code"] = "other"
  assert not other._ended_well(steps[1])


# ---- single properties, with steps that need no jax ----------------------------------------------


def test_the_parent_imports_no_jax():
  code = "import sys; sys.modules['jax'] = None; import benchmarks.gpu.slot; print('imported')"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
  )
  assert done.stdout.strip() == "imported"


@pytest.fixture
def hurried(monkeypatch):
  """Limits of a slot cut short, so that its end comes within a second or two."""
  monkeypatch.setattr(gpu_slot, "CLOSING", 0.5)
  monkeypatch.setattr(plans, "START", 0.1)
  monkeypatch.setattr(plans, "MARGIN", 0.1)


def _planted(kind: str, seconds: float = 60.0, **fields) -> Step:
  return Step(kind, _MODULE, (f"--kind={kind}",), seconds, **fields)


def test_everything_ends_in_time(hurried, tmp_path, capsys):
  """A step longer than what is left is cut off there, and what follows is named as not begun: not
  as wrong."""
  start = time.monotonic()
  slot = gpu_slot.Slot(tmp_path, 2.5 / 60, rehearse=True)
  assert not slot.run((_planted("stubborn", alone=True), _planted("failing", alone=True)))
  assert time.monotonic() - start < 2.6
  states = {outcome.step.name: outcome.state for outcome in slot.outcomes}
  assert states["stubborn"] == "killed" and states["failing"] == "not begun"
  summary = slot.summary()
  assert "not begun: stubborn, the rest; failing" in summary and "wrong: none" in summary
  assert f"unreached: {gpu_slot_planted.BEHIND}" in summary


def test_a_stopped_parent_kills_its_children_and_keeps_the_rows(tmp_path):
  out, temporary = tmp_path / "out", tmp_path / "temporary"
  temporary.mkdir()
  code = (
    "import pathlib, sys; from benchmarks import gpu_slot; "
    "from benchmarks.gpu.slot_steps import Step; "
    "slot = gpu_slot.Slot(pathlib.Path(sys.argv[1]), 1, True); "
    f"step = lambda kind: Step(kind, {_MODULE!r}, ('--kind=' + kind,), 50, alone=True); "
    "sys.exit(0 if slot.run((step('stubborn'), step('failing'))) else 1)"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code, str(out)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "TMPDIR": str(temporary)},
  )
  for _ in range(200):
    time.sleep(0.05)
    if list(temporary.rglob("planted.json")):
      break
  process.send_signal(signal.SIGTERM)
  printed, _ = process.communicate(timeout=10)
  assert process.returncode == 1 and "---- summary" in printed and "stopped by SIGTERM" in printed
  assert not _alive(_rows(out / "planted.json")[gpu_slot_planted.ROW]["child"])


def test_steps_that_build_on_a_broken_one_are_left_out(tmp_path):
  slot = gpu_slot.Slot(tmp_path, 1, rehearse=True)
  slot.run((_planted("aborting", alone=True), _planted("garbage", after=("aborting",), alone=True)))
  assert [outcome.state for outcome in slot.outcomes] == ["died: SIGABRT", "not begun"]
  assert slot.outcomes[1].note == "aborting did not end"


def test_what_is_timed_runs_with_the_repair(tmp_path):
  """A hang that a bisect repairs costs no timed row; other steps run as they are."""
  slot = gpu_slot.Slot(tmp_path, 1, rehearse=True)
  timed = plans.timed("dense", "dense_mode", "a_16k", 60, after=("aborting",))
  slot._together([_planted("aborting")])
  assert slot._refusal(timed).note == "aborting did not end" and slot._arguments(timed) == list(
    timed.arguments
  )
  slot._bisect(
    [gpu_slot.Outcome(_planted("wrong", bisect=True), "wrong", wrong=["planted, seed 0"])]
  )
  assert slot._refusal(timed) is None
  assert slot._arguments(timed) == [*timed.arguments, f"--config={gpu_slot_planted.REPAIRED_BY}"]
  assert slot._refusal(_planted("garbage", after=("aborting",))) is not None
  assert "--config" not in str(slot._arguments(plans.FIRST_CALLS))


def test_an_error_of_the_parent_costs_one_step(tmp_path, monkeypatch):
  slot = gpu_slot.Slot(tmp_path, 1, rehearse=True)
  popen = subprocess.Popen

  def no_memory(command, **options):
    if "--kind=failing" in command:
      raise OSError("no memory")
    return popen(command, **options)

  monkeypatch.setattr(gpu_slot.subprocess, "Popen", no_memory)
  assert not slot.run((_planted("failing", alone=True), _planted("garbage", alone=True)))
  assert [outcome.state for outcome in slot.outcomes] == ["error", "ok"]
  assert "failed: failing" in slot.summary() and "OSError: no memory" in slot.summary()


def test_a_hung_kernel_is_looked_at_before_it_is_killed(tmp_path, monkeypatch):
  tools = tmp_path / "tools"
  tools.mkdir()
  debugger = tools / "cuda-gdb"
  debugger.write_text('#!/bin/sh\necho "looks at $2: $*"\n')
  debugger.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
  slot = gpu_slot.Slot(tmp_path / "out", 1, rehearse=True)
  slot.run((_planted("stubborn", 1.0),))
  log = (tmp_path / "out" / gpu_slot.LOG).read_text()
  assert "-batch -ex info cuda kernels -ex info cuda warps" in log


def test_a_sanitizer_reports_and_is_not_judged(tmp_path, monkeypatch):
  """It is left out where it is missing; what it says never makes a case wrong, nor takes a row's
  place."""
  assert gpu_slot.Slot(tmp_path / "without", 1, True).run((plans.sanitizer("memcheck"),))
  tools = tmp_path / "tools"
  tools.mkdir()
  tool = tools / "compute-sanitizer"
  tool.write_text(
    "#!/bin/sh\necho '========= Invalid read'\necho '========= ERROR SUMMARY: 2 errors'\nexit 0\n"
  )
  tool.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
  slot = gpu_slot.Slot(tmp_path / "with", 1, True)
  assert slot.run((plans.sanitizer("memcheck"),)) and slot.outcomes[0].state == "said something"
  assert "Invalid read" in (tmp_path / "with" / gpu_slot.LOG).read_text()
  tool.write_text(
    "#!/bin/sh\necho '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)'\n"
  )
  slot = gpu_slot.Slot(tmp_path / "clean", 1, True)
  assert slot.run((plans.sanitizer("racecheck"),)) and slot.outcomes[0].state == "ok"


def test_merging_keeps_the_rows_of_all_writers(tmp_path):
  """Two steps that began from the same rows: neither puts back what the other has replaced."""
  slot = gpu_slot.Slot(tmp_path / "out", 1)
  (tmp_path / "out" / "kind.json").write_text(
    json.dumps([{"name": "a", "value": 0}, {"name": "b", "value": 0}])
  )
  for name in "ab":
    (tmp_path / name).mkdir()
  seeded = {name: slot._seed(tmp_path / name) for name in "ab"}
  for name in "ab":
    path = tmp_path / name / "kind.json"
    found = json.loads(path.read_text())
    path.write_text(
      json.dumps([row | ({"value": 1} if row["name"] == name else {}) for row in found])
    )
  for name in "ab":
    assert slot._merge(tmp_path / name, seeded[name]) == ""
  assert json.loads((tmp_path / "out" / "kind.json").read_text()) == [
    {"name": "a", "value": 1},
    {"name": "b", "value": 1},
  ]


def test_no_more_files_than_come_back(tmp_path):
  slot = gpu_slot.Slot(tmp_path / "out", 1)
  folder = tmp_path / "step"
  folder.mkdir()
  for i in range(10):
    (folder / f"kind{i}.json").write_text(json.dumps([{"name": "a"}]))
  note = slot._merge(folder, {})
  slot._write_state()
  slot._log("text")
  assert len(list((tmp_path / "out").iterdir())) == gpu_slot.MOST_FILES == 8
  assert note.count("is left out: 8 files are there already") == 4


def test_fetched_rows_do_not_replace_newer_ones(tmp_path):
  old, out = tmp_path / "old", tmp_path / "out"
  old.mkdir()
  out.mkdir()
  (old / "kind.json").write_text(
    json.dumps([{"name": "a", "value": "old"}, {"name": "b", "value": "old"}])
  )
  (old / "torn.json").write_text('[{"na')
  (out / "kind.json").write_text(json.dumps([{"name": "a", "value": "new"}]))
  gpu_slot.Slot(out, 1).resume(old)
  assert {name: row["value"] for name, row in _rows(out / "kind.json").items()} == {
    "a": "new",
    "b": "old",
  }
  assert not (out / "torn.json").exists()
  with pytest.raises(FileNotFoundError, match="--resume=.*missing is no folder"):
    gpu_slot.Slot(out, 1).resume(tmp_path / "missing")


def test_output_is_read_as_it_was_meant():
  step = plans.checks("x", "")

  def read(text, code):
    return gpu_slot.read_output(step, text, code)

  text = "wanted a, seed 0\nwanted b\nwanted c\nbegin a, seed 0\nok    a, seed 0   out 1\nbegin b\n"
  killed = read(text, None)
  assert (killed.state, killed.begun, killed.unreached, killed.wrong) == ("killed", "b", ["c"], [])
  late = read("wanted a\nunreached a\n", 1)
  assert (late.state, late.unreached, late.wrong, late.good) == ("unreached", ["a"], [], False)
  wrong = read("begin a\nWRONG a  NaN\nbegin b\nFAILED b  FAILED: no\nunreached c\n", 1)
  assert (wrong.state, wrong.wrong, wrong.unreached) == ("wrong", ["a", "b"], ["c"])
  assert read("", -9).state == "died: SIGKILL" and read("", 2).state == "exit 2"
  assert read("", 0).good


# ---- plans ---------------------------------------------------------------------------------------


class _Names(gpu_attention.Session):
  """Notes which rows a part would measure."""

  def __init__(self, folder, only):
    super().__init__(FULL, Store.open(folder, "names", "command"), Deadline(1e9), "xla", only)
    self.names = []

  def row(self, name, make, seconds=15.0):
    self.names += [name] if self.wants(name) else []


def _options(step: Step) -> dict[str, str]:
  return dict(argument.removeprefix("--").split("=", 1) for argument in step.arguments)


_ALL = [*plans.FIRST, *plans.RIGHT, *plans.plan("wrong", "plain, seed 0")]


def test_every_pattern_of_a_plan_finds_something(tmp_path):
  cases = [job.name for job in gpu_check.jobs(small=False)]
  for step in _ALL:
    only = _options(step).get("only", "")
    if step.module == "benchmarks.gpu.check":
      # Every alternative by itself: one that finds nothing is a case that nobody checks.
      assert [name for name in cases if re.search(only, name)], step
      listed = re.fullmatch(r"\^\((.*)\)(, seed 0)?\$", only)
      for part in listed.group(1).split("|") if listed else only.split("|"):
        assert any(re.search(part, name) for name in cases), (step.name, part)
    if step.module == "benchmarks.attention":
      for part in _options(step)["parts"].split(","):
        run = _Names(tmp_path, only)
        if part != "ceilings":
          gpu_run.parts_named([part])[0](run)
          assert run.names, (step.name, part)


def test_first_slots_leave_out_what_costs_minutes(tmp_path):
  """No row of a million tokens, no peer from PyTorch, no dense attention of 512K tokens."""
  names = []
  for step in (step for step in _ALL if step.module == "benchmarks.attention"):
    run = _Names(tmp_path, _options(step)["only"])
    for part in gpu_run.parts_named(_options(step)["parts"].split(",")):
      assert part not in (gpu_run.torch, gpu_run.tokamax)
      names += [] if part is gpu_run.ceilings else (part(run), run.names)[1]
  assert names and not [name for name in names if "a_1m" in name or re.search("dense.*512k", name)]
  for step in (step for step in _ALL if step.module == "benchmarks.gpu.check"):
    only = _options(step)["only"]
    huge = [job.name for job in gpu_check.jobs(False) if job.name.startswith("1M")]
    assert huge and not [name for name in huge if re.search(only, name)], step.name


def test_a_timed_step_is_longer_than_the_guard_of_its_last_row():
  with pytest.raises(ValueError, match=r"would leave out its last row: give it at least 53 s"):
    plans.timed("x", "lists,dense_mode", "", 50)
  assert plans.timed("x", "lists,dense_mode", "", 53).alone
  assert {part.__name__ for part in (*gpu_run.PARTS, *gpu_run.OTHER_PARTS)} <= set(GUARDS)


def test_plans_and_steps_are_named_or_refused():
  for name in plans.PLANS:
    case = "plain, seed 0" if name in ("hangs", "wrong") else ""
    found = [step.name for step in plans.plan(name, case)]
    assert len(set(found)) == len(found) and found[0] == "facts"
  with pytest.raises(ValueError, match="choose one of first, right, hangs, wrong"):
    plans.plan("second")
  with pytest.raises(ValueError, match="--case names the case"):
    plans.plan("hangs")
  with pytest.raises(ValueError, match="--case names the case"):
    plans.plan("first", "plain, seed 0")
  with pytest.raises(ValueError, match="--steps has no nothing; steps are facts; "):
    plans.chosen(plans.FIRST, "nothing", False)
  assert not set(plans.PLANTED) & set(plans.chosen(plans.FIRST, "", False))
  assert set(plans.PLANTED) < set(plans.chosen(plans.FIRST, "", True))


def test_small_checks_share_the_machine_and_timed_steps_do_not():
  found = plans.FIRST
  for group in gpu_slot.groups(found):
    assert len(group) == 1 or not any(step.alone for step in group)
  assert [step for group in gpu_slot.groups(found) for step in group] == list(found)
  timed = ("benchmarks.attention", "benchmarks.gpu.train")
  assert all(step.alone for step in found if step.module in timed)


def test_every_variant_of_the_bisect_fits_the_attention_kernels():
  keys = [tuning.Key("h100", d, 128, 128, way) for d in (64, 128) for way in tuning.DIRECTIONS]
  for step in plans.bisection("plain, seed 0"):
    fields = gpu_check.gpu_config.parse(_options(step)["config"])
    for config in gpu_check.gpu_config.changed(fields, keys).values():
      assert all(getattr(config, name) == value for name, value in fields.items())
  assert len(plans.bisection("x")) >= 6


def test_what_a_bisect_says():

  def say(**states):
    named = {f"bisect: {name.replace('__', ' ')}": state for name, state in states.items()}
    return plans.verdict("c", named)

  repaired = say(as__is="killed", by_lane="ok", step="ok")
  assert repaired == "c is repaired by by_lane and, alone, by step"
  assert say(as__is="wrong", by_lane="wrong") == "c is not repaired by any of: by_lane"
  assert "timing matters" in say(as__is="ok", by_lane="ok")
  assert say(as__is="not begun", by_lane="not begun") == "c: no time to bisect"


def test_temporary_folders_are_removed(tmp_path, monkeypatch):
  monkeypatch.setattr(gpu_slot.tempfile, "tempdir", str(tmp_path))
  assert gpu_slot.Slot(tmp_path / "out", 1, rehearse=True).run((_planted("garbage"),))
  assert not list(tmp_path.glob("slot-*"))


def test_an_assembler_is_found(tmp_path, monkeypatch):
  """The machine's own CUDA serves where PATH has no ptxas, and only there."""
  cuda, other = tmp_path / "cuda", tmp_path / "other"
  for folder in (cuda / "bin", other):
    folder.mkdir(parents=True)
    (folder / "ptxas").touch(mode=0o755)
  monkeypatch.setattr(gpu_slot, "CUDA", cuda)
  found = gpu_slot.with_assembler({"PATH": str(tmp_path), "KEPT": "1"})
  assert found == {"PATH": f"{tmp_path}{os.pathsep}{cuda / 'bin'}", "KEPT": "1"}
  assert gpu_slot.with_assembler({"PATH": str(other)}) == {"PATH": str(other)}
