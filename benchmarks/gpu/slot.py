"""Runs a plan within minutes on a scarce GPU, and keeps what was found whatever a kernel does.

  python3 -m benchmarks.gpu.slot --minutes=6.6 --out=$OUT
  python3 -m benchmarks.gpu.slot --minutes=4 --out=$OUT --resume=runs/gpu --plan=right
  python3 -m benchmarks.gpu.slot --rehearse --minutes=15 --out=/tmp/x

docs/gpu_queue.md says when to run which plan; the last line rehearses one with a stand-in on a CPU.
Every step is a process of its own. When it overstays, its process group is killed and the case it
had begun is named. Checks run several at a time, what is timed runs alone. Steps write row by row,
each file whole or not at all. This process imports no jax: no kernel can hold it.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu import slot_steps as plans
from benchmarks.gpu.code import ROOT, code_digest
from benchmarks.gpu.slot_output import Outcome, described, read_output, summary
from benchmarks.gpu.slot_steps import Step
from benchmarks.rows import merge_rows, read_rows, write_json

CUDA = pathlib.Path("/usr/local/cuda")
LOG = "slot.log"
STATE = "slot.json"
AT_ONCE = 6
# Cases after one that hung get so many seconds together: they may hang, too.
REST_SECONDS = 40.0
# Seconds kept for the end: killing, merging and the summary.
CLOSING = 5.0
# Seconds for a debugger to look at a hung kernel, and the number of kernels that it looks at.
DEBUGGER_SECONDS = 20.0
DEBUGGED = 2
# Seconds to wait for a process that was killed.
_REAPING_SECONDS = 3
# Of a step's output, characters that the log keeps.
_LOG_CHARACTERS = 200_000


class Slot:
  """One run over a plan; `outcomes` are those of the steps so far, in the order of their ends."""

  def __init__(self, out: pathlib.Path, minutes: float, rehearse: bool = False):
    self.out = out
    self.rehearse = rehearse
    self.outcomes: list[Outcome] = []
    self._deadline = time.monotonic() + 60 * minutes
    self._work = pathlib.Path(tempfile.mkdtemp(prefix="slot-"))
    self._lock = threading.RLock()
    self._running: dict[int, subprocess.Popen] = {}
    self._stopped = ""
    self._debugged = 0
    self._repair = ""
    self._notes: list[str] = []
    out.mkdir(parents=True, exist_ok=True)
    self._before = _read_json(out / STATE, {})
    self._code = code_digest()
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self._work / "compiled"))
    self._environment = with_assembler(os.environ) | {
      "PYTHONUNBUFFERED": "1",
      "PYTHONFAULTHANDLER": "1",
      "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
      # Programs are compiled once for all steps: the checks compile what the timed steps run.
      "JAX_COMPILATION_CACHE_DIR": compiled,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "JAX_PLATFORMS": "cpu" if rehearse else "cuda",
    }

  @property
  def left(self) -> float:
    """Seconds in which a step may run."""
    return self._deadline - CLOSING - time.monotonic()

  # ---- the run -----------------------------------------------------------------------------------

  def run(self, steps: tuple[Step, ...]) -> bool:
    """Runs every step, then what follows from those that broke; returns whether all is right."""
    with self._signals(), self._last_resort():
      for group in groups(steps):
        ended = self._together(group)
        self._bisect(ended)
        broken = [outcome for outcome in ended if outcome.broke and outcome.unreached]
        self._together([remainder(outcome) for outcome in broken])
      self._say(self.summary())
    shutil.rmtree(self._work, ignore_errors=True)
    return all(outcome.good for outcome in self.outcomes)

  def _together(self, steps: list[Step]) -> list[Outcome]:
    """Runs steps at the same time, as many at once as the machine takes."""
    at_once = min(AT_ONCE, max(2, (os.cpu_count() or 2) // 2))
    with ThreadPoolExecutor(at_once) as pool:
      return list(pool.map(self._step, steps))

  def _bisect(self, ended: list[Outcome]):
    """Bisects the first failing case of a step that asks for it, once per slot."""
    if any(outcome.step.name.startswith(plans.PREFIX) for outcome in self.outcomes):
      return
    for outcome in ended:
      failing = [outcome.begun] if outcome.begun else outcome.wrong
      if outcome.step.bisect and failing:
        found = self._together(list(plans.bisection(failing[0], outcome.step.module)))
        states = {each.step.name: each.state for each in found}
        words, self._repair = plans.verdict(failing[0], states)
        self._notes.append(words)
        if self._repair:
          self._notes.append(f"what is timed from here on runs with {self._repair}")
        self._say("\n".join(self._notes))
        return

  # ---- one step ----------------------------------------------------------------------------------

  def _step(self, step: Step) -> Outcome:
    """Runs one step unless it is refused; whatever becomes of it, the next one follows."""
    start = time.monotonic()
    text = ""
    try:
      outcome = self._refusal(step)
      if outcome is None:
        log = self._work / f"{step.name}.log"
        arguments = self._arguments(step)
        code = self._process(step, arguments, log)
        text = log.read_bytes().decode(errors="replace")
        outcome = read_output(step, text, code)
        outcome.command = [step.module, *arguments]
    except Exception as error:  # no memory for a process, no room on the disk: this step is lost
      outcome = Outcome(step, "error", note=f"{type(error).__name__}: {error}")
    outcome.seconds = time.monotonic() - start
    with self._lock:
      self.outcomes.append(outcome)
      self._log(f"==== {step.name}: {outcome.state} after {outcome.seconds:.0f} s")
      self._log(text[-_LOG_CHARACTERS:])
      self._say(described(outcome, text))
      self._write_state()
    return outcome

  def _refusal(self, step: Step) -> Outcome | None:
    """Returns why a step is not begun; None if it is."""
    if step.wrapper and shutil.which(step.wrapper[0]) is None:
      return Outcome(step, "absent", note=f"there is no {step.wrapper[0]}")
    if step.module == plans.TESTS and importlib.util.find_spec(plans.TESTS) is None:
      return Outcome(step, "absent", note="pytest is not installed: conformance is not checked")
    if self._stopped:
      return Outcome(step, "not begun", note=self._stopped)
    broken = [o.step.name for o in self.outcomes if o.step.name in step.after and o.broke]
    if broken and not self._repaired(step):
      return Outcome(step, "not begun", note=f"{' and '.join(broken)} did not end")
    if step.resumes and self._ended_well(step):
      return Outcome(step, "skipped", note="it ended well in an earlier call")
    if self.left < min(step.seconds, plans.START + plans.MARGIN):
      return Outcome(step, "not begun", note="no time left")
    return None

  def _repaired(self, step: Step) -> bool:
    """Returns True if the step takes the configuration that a bisect found right."""
    return bool(self._repair) and step.module == plans.TIMED

  def _ended_well(self, step: Step) -> bool:
    """Returns True if an earlier call's record says so, for this code, device and command."""
    here = {"code": self._code, "rehearsal": self.rehearse, "device": self._device()}
    if any(self._before.get(key) != value for key, value in here.items()):
      return False
    record = self._before.get("steps", {}).get(step.name, {})
    same = record.get("command") == [step.module, *step.arguments]
    return same and record.get("state") in ("ok", "skipped")

  def _arguments(self, step: Step) -> list[str]:
    """Returns a step's arguments; what is timed runs in the configuration that is right."""
    repaired = [f"--config={self._repair}"] if self._repaired(step) else []
    return [*step.arguments, *repaired]

  def _process(self, step: Step, arguments: list[str], log: pathlib.Path) -> int | None:
    """Runs the step's process within its limit; returns its exit status, None if it was killed."""
    limit = min(step.seconds, self.left)
    own = max(0.5, limit - plans.START - plans.MARGIN)
    command = [*step.wrapper, sys.executable, "-m", step.module, *arguments]
    command.append(f"--minutes={own / 60:.4f}")
    if step.module != plans.TESTS:
      command.append(f"--out={self.out if step.judged else self._work / 'not judged'}")
    if self.rehearse:
      command.append("--rehearse")
    with log.open("wb") as sink:
      process = self._spawn(command, sink)
      try:
        return None if self._stopped else process.wait(limit)
      except subprocess.TimeoutExpired:
        self._debug(process.pid, sink)
        return None
      finally:
        self._end(process)

  def _spawn(self, command: list[str], sink) -> subprocess.Popen:
    """Starts a process in a session, and so in a process group, of its own, which `_kill` ends."""
    process = subprocess.Popen(
      command,
      cwd=ROOT,
      env=self._environment,
      stdin=subprocess.DEVNULL,
      stdout=sink,
      stderr=sink,
      start_new_session=True,
    )
    with self._lock:
      self._running[process.pid] = process
    return process

  def _end(self, process: subprocess.Popen):
    """Kills what is left of a process group."""
    _kill(process.pid)
    # A process that waits for the driver can outlive SIGKILL for a while; nobody waits for it.
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(_REAPING_SECONDS)
    with self._lock:
      del self._running[process.pid]

  def _debug(self, pid: int, sink):
    """Asks cuda-gdb, where there is one, at which instructions the kernel of a hung process is."""
    debugger = shutil.which("cuda-gdb")
    with self._lock:
      late = self._stopped or self.left < DEBUGGER_SECONDS
      if debugger is None or late or self._debugged >= DEBUGGED:
        return
      self._debugged += 1
    asked = ("-ex", "info cuda kernels", "-ex", "info cuda warps")
    process = self._spawn([debugger, "-p", str(pid), "-batch", *asked], sink)
    # A debugger that hangs on the kernel, too, is killed, and the slot goes on.
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(DEBUGGER_SECONDS)
    self._end(process)

  # ---- files -------------------------------------------------------------------------------------

  def resume(self, folder: pathlib.Path):
    """Takes the rows of an earlier call over; those that are in the output folder already stay.

    Raises:
      FileNotFoundError: if there is no such folder.
    """
    if not folder.is_dir():
      raise FileNotFoundError(
        f"--resume={folder} is no folder; name the one that holds the files of an earlier call."
      )
    self._before = self._before or _read_json(folder / STATE, {})
    for path in sorted(folder.glob("*.json")):
      found = _read_json(path, None)
      if isinstance(found, list):
        there = {row["name"] for row in read_rows(self.out / path.name)}
        merge_rows(self.out / path.name, [row for row in found if row["name"] not in there])

  def _write_state(self):
    """Writes what became of the steps, for a later call."""
    records = {outcome.step.name: outcome.record() for outcome in self.outcomes}
    state = {
      "code": self._code,
      "rehearsal": self.rehearse,
      "device": self._device(),
      "notes": self._notes,
      "steps": self._before.get("steps", {}) | records,
    }
    write_json(self.out / STATE, state)

  def _device(self) -> str:
    """Returns the GPU's name, as the step "facts" found it."""
    return _read_json(self.out / "facts.json", {}).get("device", "unknown")

  def _log(self, text: str):
    with self._lock, (self.out / LOG).open("a", errors="replace") as sink:
      sink.write(text.rstrip("\n") + "\n")

  def _say(self, text: str):
    """Prints and logs a text."""
    with self._lock:
      print(text, flush=True)
      self._log(text)

  # ---- the end -----------------------------------------------------------------------------------

  def stop(self, reason: str):
    """Kills what runs; nothing is begun any more, and the summary follows."""
    self._stopped = self._stopped or reason
    for pid in list(self._running):
      _kill(pid)

  @contextlib.contextmanager
  def _signals(self):
    """SIGTERM and SIGINT end the run in order: rows are merged, the summary is printed."""

    def stop(number, _):
      self.stop(f"stopped by {signal.Signals(number).name}")

    old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
      yield
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)

  @contextlib.contextmanager
  def _last_resort(self):
    """Ends this process at its time even if something holds it; merged rows are on the disk."""

    def end():
      self.stop("out of time")
      print("out of time: ended without a summary; see slot.json", flush=True)
      os._exit(1)

    timer = threading.Timer(max(0.0, self._deadline - time.monotonic()), end)
    timer.daemon = True
    timer.start()
    try:
      yield
    finally:
      timer.cancel()

  def summary(self) -> str:
    """Returns the slot on one page, with the names of its files."""
    lines = summary(self.outcomes, self._notes, self.rehearse)
    found = sorted(path.name for path in self.out.iterdir())
    return "\n".join([*lines, f"files in {self.out}: {', '.join(found)}"])


# ---- parts of a run ------------------------------------------------------------------------------


def with_assembler(environment: Mapping[str, str]) -> dict[str, str]:
  """Returns the environment with CUDA's own folder at the end of PATH if PATH has no ptxas.

  XLA then finds the one of the machine's CUDA; without any, nothing of ours compiles.
  """
  path = environment.get("PATH", "")
  if shutil.which("ptxas", path=path) is None:
    path = os.pathsep.join([path, str(CUDA / "bin")])
  return {**environment, "PATH": path}


def groups(steps: tuple[Step, ...]) -> list[list[Step]]:
  """Returns the steps in order: each that is alone by itself, those between two such together."""
  found: list[list[Step]] = []
  for step in steps:
    if step.alone or not found or found[-1][-1].alone:
      found.append([])
    found[-1].append(step)
  return found


def remainder(outcome: Outcome) -> Step:
  """Returns a step over the cases that a broken one did not reach: the others may be fine."""
  step = outcome.step
  others = [argument for argument in step.arguments if not argument.startswith("--only=")]
  return dataclasses.replace(
    step,
    name=f"{step.name}, the rest",
    arguments=(*others, f"--only={plans.only(outcome.unreached)}"),
    seconds=min(step.seconds, REST_SECONDS),
    alone=False,
  )


def _kill(pid: int):
  """Kills a process group, which may be gone."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(pid, signal.SIGKILL)


def _read_json(path: pathlib.Path, otherwise):
  """Returns a file's content; `otherwise` if it is missing or cut off."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return otherwise


def command_line() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--minutes", type=float, default=6.6, help="everything has ended by then")
  add("--out", type=pathlib.Path, help="folder for rows and log; default $OUT, else runs/gpu")
  add("--resume", type=pathlib.Path, help="folder of an earlier call, whose right rows are kept")
  add("--plan", default="first", help=f"one of {', '.join(plans.PLANS)}")
  add("--case", default="", help="the case that hangs or is wrong, for these two plans")
  add("--steps", default="", help="only the steps with these names, separated by ';'")
  add("--rehearse", action="store_true", help="tiny shapes and a stand-in on a CPU")
  return parser


def main() -> int:
  parser = command_line()
  options = parser.parse_args()
  out = options.out or pathlib.Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
  try:
    steps = plans.chosen(plans.plan(options.plan, options.case), options.steps, options.rehearse)
    slot = Slot(out, options.minutes, options.rehearse)
    if options.resume:
      slot.resume(options.resume)
  except (ValueError, FileNotFoundError) as error:
    parser.error(str(error))
  return 0 if slot.run(steps) else 1


if __name__ == "__main__":
  sys.exit(main())
