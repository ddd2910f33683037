"""Runs a plan within minutes on a scarce GPU, and keeps what was found whatever a kernel does.

  python3 -m benchmarks.gpu.slot --minutes=6.6 --out=$OUT
  python3 -m benchmarks.gpu.slot --minutes=4 --out=$OUT --resume=runs/gpu --plan=right
  python3 -m benchmarks.gpu.slot --rehearse --minutes=15 --out=/tmp/x

docs/gpu_queue.md says when to run which plan; the last line rehearses one with a stand-in on a CPU.
Every step is a process of its own. When it overstays, its whole process group is killed and the
case it had begun is named. Small checks run several at a time, what is timed runs alone. Each step
writes into a private folder; its rows are merged into one file per kind under --out as soon as it
ends, so that a run that is cut off leaves whole files. This process imports no jax: nothing that a
kernel does can hold it.
"""

import argparse
import contextlib
import dataclasses
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
from benchmarks.gpu.rows import code_digest
from benchmarks.gpu.slot_steps import Step
from benchmarks.rows import merge_rows, read_rows

ROOT = pathlib.Path(__file__).parents[2]
CUDA = pathlib.Path("/usr/local/cuda")
LOG, STATE = "slot.log", "slot.json"
# A rented machine may return no more files than this; slot.log and slot.json are two of them.
MOST_FILES = 8
AT_ONCE = 6
# Cases behind one that hung get so many seconds together: they may hang, too.
REST_SECONDS = 40.0
# Seconds kept for the end: killing, merging and the summary.
CLOSING = 5.0
# A debugger that looks at a hung kernel gets so many seconds, and so many kernels are looked at.
DEBUGGER_SECONDS, DEBUGGED = 20.0, 2
# Of a step's output, characters that the log keeps.
_LOG_CHARACTERS = 200_000
# How the children begin the line of a case that ended; all as long as the longest.
_VERDICTS = ("ok    ", "WRONG ", "FAILED")
GOOD = ("ok", "skipped", "absent")
# The module of the timed steps: it takes the kernels' configuration.
_REPAIRABLE = "benchmarks.attention"


@dataclasses.dataclass
class Outcome:
  """The end of a step.

  Attributes:
    step: the step.
    state: "ok"; "wrong" (a case is), "unreached" (no time for a case); "killed", "died: SIGNAL",
      "exit N"; "not begun"; "error" (of this process); "skipped" (an earlier call ended it well),
      "absent" (its wrapper is); "said something" (a step that is not judged).
    seconds: how long it ran.
    lines: verdicts that it printed, one per case.
    reached: names of the cases that have one.
    begun: the case in which it was killed or died.
    wrong, unreached: names of cases.
    note: why it was not begun, or could not be merged.
    command: the module and its arguments, where it ran.
  """

  step: Step
  state: str
  seconds: float = 0.0
  lines: list[str] = dataclasses.field(default_factory=list)
  reached: list[str] = dataclasses.field(default_factory=list)
  begun: str = ""
  wrong: list[str] = dataclasses.field(default_factory=list)
  unreached: list[str] = dataclasses.field(default_factory=list)
  note: str = ""
  command: list[str] = dataclasses.field(default_factory=list)

  @property
  def broke(self) -> bool:
    """True if the process did not end by itself."""
    return self.state == "killed" or self.state.startswith("died")

  @property
  def good(self) -> bool:
    return self.state in GOOD or (not self.step.judged and self.state != "not begun")


def read_output(step: Step, text: str, code: int | None) -> Outcome:
  """Returns what a step's output and exit status say.

  Args:
    step: the step.
    text: all that it printed.
    code: its exit status, negative for a signal; None: it was killed for overstaying.
  """
  named = {word: [] for word in ("wanted", "begin", "unreached")}
  found = Outcome(step, "ok")
  for line in text.splitlines():
    word, _, rest = line.partition(" ")
    if word in named:
      named[word].append(rest.strip())
    elif line.startswith(_VERDICTS):
      # A verdict names its case first; figures come behind two spaces.
      name = line[len(_VERDICTS[0]) :].strip().split("  ")[0]
      found.lines.append(line)
      found.reached.append(name)
      if not line.startswith("ok"):
        found.wrong.append(name)
  if code is None:
    found.state = "killed"
  elif code < 0:
    found.state = f"died: {_signal_name(-code)}"
  elif found.wrong:
    found.state = "wrong"
  elif named["unreached"]:
    found.state = "unreached"
  elif code:
    found.state = f"exit {code}"
  found.unreached = named["unreached"]
  if found.broke:
    found.begun = next((name for name in named["begin"][-1:] if name not in found.reached), "")
    reached = [*named["begin"], *found.reached, *found.unreached]
    found.unreached = [*found.unreached, *(name for name in named["wanted"] if name not in reached)]
  if not step.judged and step.wrapper and not (code == 0 and _clean(text)):
    found.state = "killed" if code is None else "said something"
  return found


def _signal_name(number: int) -> str:
  known = {int(each): each.name for each in signal.Signals}
  return known.get(number, f"signal {number}")


def _clean(text: str) -> bool:
  """Returns True if compute-sanitizer's report is empty."""
  return "ERROR SUMMARY: 0 errors" in text or "RACECHECK SUMMARY: 0 hazards" in text


class Slot:
  """One run over a plan.

  Attributes:
    out: folder of what is kept.
    outcomes: of the steps so far, in the order in which they ended.
  """

  def __init__(self, out: pathlib.Path, minutes: float, rehearse: bool = False):
    self.out, self.rehearse = out, rehearse
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
    self._files = {LOG, STATE}
    self._code = code_digest()
    self._env = with_assembler(os.environ) | {
      "PYTHONUNBUFFERED": "1",
      "PYTHONFAULTHANDLER": "1",
      "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
      # Programs are compiled once for all steps: the checks compile what the timed steps run.
      "JAX_COMPILATION_CACHE_DIR": os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(self._work / "compiled")
      ),
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
        self._together(
          [remainder(outcome) for outcome in ended if outcome.broke and outcome.unreached]
        )
      self._say(self.summary())
    shutil.rmtree(self._work, ignore_errors=True)
    return all(outcome.good for outcome in self.outcomes)

  def _together(self, steps: list[Step]) -> list[Outcome]:
    """Runs steps at the same time, so many at once."""
    if not steps:
      return []
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
        case = failing[0]
        found = self._together(list(plans.bisection(case, outcome.step.module)))
        states = {o.step.name: o.state for o in found}
        self._repair = plans.repair(states)
        self._notes.append(plans.verdict(case, states))
        if self._repair:
          self._notes.append(f"what is timed from here on runs with {self._repair}")
        self._say("\n".join(self._notes))
        return

  # ---- one step ----------------------------------------------------------------------------------

  def _step(self, step: Step) -> Outcome:
    """Runs one step; whatever becomes of it, the next one follows."""
    try:
      outcome, text = self._attempt(step)
    except Exception as error:  # no memory for a process, no room on the disk: this step is lost
      outcome, text = Outcome(step, "error", note=f"{type(error).__name__}: {error}"), ""
    with self._lock:
      self.outcomes.append(outcome)
      self._log(f"==== {step.name}: {outcome.state} after {outcome.seconds:.0f} s")
      self._log(text[-_LOG_CHARACTERS:])
      self._say("\n".join(described(outcome, text)))
      self._write_state()
    return outcome

  def _attempt(self, step: Step) -> tuple[Outcome, str]:
    """Runs a step unless it is refused; returns what became of it and what it printed."""
    if (refusal := self._refusal(step)) is not None:
      return refusal, ""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="step-", dir=self._work))
    seeded = self._seed(folder) if step.judged else {}
    start, arguments = time.monotonic(), self._arguments(step)
    code = self._process(step, arguments, folder)
    text = (folder / "log").read_bytes().decode(errors="replace")
    outcome = read_output(step, text, code)
    outcome.seconds = time.monotonic() - start
    outcome.command = [step.module, *arguments]
    if step.judged:
      outcome.note = self._merge(folder, seeded)
    return outcome, text

  def _refusal(self, step: Step) -> Outcome | None:
    """Why a step is not begun; None if it is."""
    if step.wrapper and shutil.which(step.wrapper[0]) is None:
      return Outcome(step, "absent", note=f"there is no {step.wrapper[0]}")
    if self._stopped:
      return Outcome(step, "not begun", note=self._stopped)
    broken = [o.step.name for o in self.outcomes if o.step.name in step.after and o.broke]
    if broken and not (self._repair and step.module == _REPAIRABLE):
      return Outcome(step, "not begun", note=f"{' and '.join(broken)} did not end")
    if step.resumes and self._ended_well(step):
      return Outcome(step, "skipped", note="it ended well in an earlier call")
    if self.left < min(step.seconds, plans.START + plans.MARGIN):
      return Outcome(step, "not begun", note="no time left")
    return None

  def _ended_well(self, step: Step) -> bool:
    """Returns True if an earlier call's record says so, for this code, device and command."""
    if (self._before.get("code"), self._before.get("rehearsal")) != (self._code, self.rehearse):
      return False
    if self._before.get("device") != self._device():
      return False
    record = self._before.get("steps", {}).get(step.name, {})
    return record.get("state") in ("ok", "skipped") and record.get("command") == [
      step.module,
      *step.arguments,
    ]

  def _arguments(self, step: Step) -> list[str]:
    """A step's arguments; what is timed runs in the configuration that a bisect found right."""
    repaired = [f"--config={self._repair}"] if self._repair and step.module == _REPAIRABLE else []
    return [*step.arguments, *repaired]

  def _process(self, step: Step, arguments: list[str], folder: pathlib.Path) -> int | None:
    """Runs the step's process within its limit; returns its exit status, None if it was killed."""
    limit = min(step.seconds, self.left)
    own = max(0.5, limit - plans.START - plans.MARGIN)
    command = [*step.wrapper, sys.executable, "-m", step.module, *arguments]
    command += [f"--out={folder}", f"--minutes={own / 60:.4f}", *["--rehearse"] * self.rehearse]
    with (folder / "log").open("wb") as sink:
      process = self._spawn(command, sink)
      try:
        return None if self._stopped else process.wait(limit)
      except subprocess.TimeoutExpired:
        self._debug(process.pid, sink)
        return None
      finally:
        self._end(process)

  def _spawn(self, command: list[str], sink) -> subprocess.Popen:
    """Starts a process in a session, and so in a process group, of its own: `_kill` ends it with
    all that it starts."""
    process = subprocess.Popen(
      command,
      cwd=ROOT,
      env=self._env,
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
      process.wait(3)
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
    # A debugger that hangs on the kernel, too, has nothing to say: it is killed, and the slot goes on.
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
      if _are_rows(found) and self._room(path.name):
        there = {row["name"] for row in read_rows(self.out / path.name)}
        merge_rows(self.out / path.name, [row for row in found if row["name"] not in there])

  def _seed(self, folder: pathlib.Path) -> dict[str, list]:
    """Gives a step the rows that are there, so that it skips what is right; returns these."""
    with self._lock:
      found = {path.name: _read_json(path, None) for path in self.out.glob("*.json")}
    found = {name: content for name, content in found.items() if _are_rows(content)}
    for name, content in found.items():
      (folder / name).write_text(json.dumps(content))
    return found

  def _merge(self, folder: pathlib.Path, seeded: dict[str, list]) -> str:
    """Puts what a step wrote beside what the others did; returns what could not be read or kept.

    Rows that the step only was given are left alone: another step may have replaced them meanwhile.
    """
    troubles = []
    with self._lock:
      for path in sorted(folder.glob("*.json")):
        found = _read_json(path, None)
        if found is None:
          troubles.append(f"{path.name} is no whole JSON file")
        elif found == seeded.get(path.name):
          continue
        elif not self._room(path.name):
          troubles.append(f"{path.name} is left out: {MOST_FILES} files are there already")
        elif _are_rows(found):
          merge_rows(
            self.out / path.name, [row for row in found if row not in seeded.get(path.name, [])]
          )
        else:
          _write_json(self.out / path.name, found)
    return "; ".join(troubles)

  def _room(self, name: str) -> bool:
    """Counts a file in and returns True, or returns False if there are as many as come back."""
    with self._lock:
      if name not in self._files and len(self._files) >= MOST_FILES:
        return False
      self._files.add(name)
      return True

  def _write_state(self):
    records = {
      outcome.step.name: {
        "state": outcome.state,
        "seconds": round(outcome.seconds, 1),
        "command": outcome.command or [outcome.step.module, *outcome.step.arguments],
        "begun": outcome.begun,
        "wrong": outcome.wrong,
        "unreached": outcome.unreached,
        "note": outcome.note,
      }
      for outcome in self.outcomes
    }
    facts = {
      "code": self._code,
      "rehearsal": self.rehearse,
      "device": self._device(),
      "notes": self._notes,
    }
    _write_json(self.out / STATE, facts | {"steps": self._before.get("steps", {}) | records})

  def _device(self) -> str:
    """The GPU's name, as the step "facts" found it."""
    return _read_json(self.out / "facts.json", {}).get("device", "unknown")

  def _log(self, text: str):
    with self._lock, (self.out / LOG).open("a", errors="replace") as sink:
      sink.write(text.rstrip("\n") + "\n")

  def _say(self, text: str):
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
    """The slot on one page: a line a step, then what needs attention, then where the files are."""
    lines = ["", "---- summary" + (" (a rehearsal: no measurement)" if self.rehearse else "")]
    for outcome in self.outcomes:
      detail = f"in: {outcome.begun}" if outcome.begun else outcome.note
      ending = f" ({detail})" if detail else ""
      lines.append(f"{outcome.state:<15} {outcome.seconds:4.0f} s  {outcome.step.name}{ending}")
    judged = [outcome for outcome in self.outcomes if outcome.step.judged]
    # A case that one step did not reach, another one may have.
    reached = {name for outcome in judged for name in outcome.reached}
    failed = [outcome for outcome in judged if outcome.state.startswith(("exit", "error"))]
    late = [outcome for outcome in judged if outcome.state == "not begun"]
    unreached = [name for outcome in judged for name in outcome.unreached]
    for title, names in (
      ("wrong", [name for outcome in judged for name in outcome.wrong]),
      ("did not end", [outcome.begun or outcome.step.name for outcome in judged if outcome.broke]),
      ("failed", [outcome.step.name for outcome in failed]),
      ("unreached", [name for name in unreached if name not in reached]),
      ("not begun", [outcome.step.name for outcome in late]),
    ):
      lines.append(f"{title}: {'; '.join(names)[:1500] or 'none'}")
    lines += [f"bisect: {note}" for note in self._notes]
    found = sorted(name for name in self._files if (self.out / name).exists())
    lines.append(f"files in {self.out}: {', '.join(found)}")
    return "\n".join(lines)


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


def described(outcome: Outcome, text: str) -> list[str]:
  """Returns what is printed of a step: all that is known to a reader who has lost the log."""
  step = outcome.step
  right = sum(line.startswith("ok") for line in outcome.lines)
  first = f"[{step.name}] {outcome.state} after {outcome.seconds:.0f} s"
  first += f", {right} right" if outcome.lines else ""
  first += f": {outcome.note}" if outcome.note else ""
  if step.name == "facts":
    return [first, *("  " + line[:400] for line in text.splitlines())]
  timed = step.module != "benchmarks.gpu.check"
  lines = [line for line in outcome.lines if timed or not line.startswith("ok")][:12]
  if outcome.begun:
    lines.append(f"in: begin {outcome.begun}")
  if step.judged and (outcome.broke or outcome.state.startswith("exit")):
    known = ("wanted", "begin", *_VERDICTS)
    said = [line for line in text.splitlines() if line.strip() and not line.startswith(known)]
    lines += said[-12:]
  return [first, *("  " + line[:170] for line in lines)]


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


def _are_rows(content) -> bool:
  if not isinstance(content, list):
    return False
  return all(isinstance(row, dict) and "name" in row for row in content)


def _write_json(path: pathlib.Path, content):
  """Writes a whole file or none."""
  fresh = path.with_name(path.name + ".new")
  fresh.write_text(json.dumps(content, indent=1) + "\n")
  fresh.replace(path)


def command_line() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--minutes", type=float, default=6.6, help="everything has ended by then")
  parser.add_argument(
    "--out", type=pathlib.Path, help="folder for rows and log; default $OUT, else runs/gpu"
  )
  parser.add_argument(
    "--resume",
    type=pathlib.Path,
    help="folder with the files of an earlier call, whose right rows are kept",
  )
  parser.add_argument("--plan", default="first", help=f"one of {', '.join(plans.PLANS)}")
  parser.add_argument(
    "--case", default="", help="the case that hangs or is wrong, for these two plans"
  )
  parser.add_argument(
    "--steps", default="", help="only the steps with these names, separated by ';'"
  )
  parser.add_argument(
    "--rehearse",
    action="store_true",
    help="tiny shapes and a stand-in on a CPU; checks this program",
  )
  return parser


def main() -> int:
  parser = command_line()
  options = parser.parse_args()
  try:
    steps = plans.chosen(plans.plan(options.plan, options.case), options.steps, options.rehearse)
    slot = Slot(
      options.out or pathlib.Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"),
      options.minutes,
      options.rehearse,
    )
    if options.resume:
      slot.resume(options.resume)
  except (ValueError, FileNotFoundError) as error:
    parser.error(str(error))
  return 0 if slot.run(steps) else 1


if __name__ == "__main__":
  sys.exit(main())
