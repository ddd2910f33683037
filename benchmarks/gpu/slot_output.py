"""Reads what became of a step from its output and exit status, and says it to people.

A step prints `wanted CASE` for all its cases, `begin CASE` before each, `ok    CASE  figures`,
`WRONG CASE` or `FAILED CASE` after it, and `unreached CASE` where time was up.
"""

import dataclasses
import signal

from benchmarks.gpu.slot_steps import CHECK, TESTS, Step

# The beginnings of the line of a case that ended; all as long as the longest.
VERDICTS = ("ok    ", "WRONG ", "FAILED")
# A step that ended so needs no attention.
GOOD = ("ok", "skipped", "absent")
# Shown of a step: lines of verdicts and of other output, characters of a line and of a fact.
_LINES = 12
_LINE_CHARACTERS = 170
_FACT_CHARACTERS = 400
# Characters of each list of names in the summary: a rented machine returns the last 12,000.
_LIST_CHARACTERS = 1500


@dataclasses.dataclass
class Outcome:
  """The end of a step.

  Attributes:
    state: "ok"; "wrong" (a case is), "unreached" (no time for a case); "killed", "died: SIGNAL",
      "exit N"; "not begun"; "error" (of the slot itself); "skipped" (an earlier call ended it
      well), "absent" (a program that it needs is); "said something" (a step that is not judged).
    lines: verdicts that it printed, one per case.
    reached: names of the cases that have one.
    begun: the case in which it was killed or died.
    wrong: names of cases that are wrong or failed.
    unreached: names of cases for which there was no time.
    note: why it was not begun.
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
    """True if nobody needs to look at it."""
    return self.state in GOOD or (not self.step.judged and self.state != "not begun")

  def record(self) -> dict:
    """Returns the fields that slot.json keeps."""
    return {
      "state": self.state,
      "seconds": round(self.seconds, 1),
      "command": self.command or [self.step.module, *self.step.arguments],
      "begun": self.begun,
      "wrong": self.wrong,
      "unreached": self.unreached,
      "note": self.note,
    }


def read_output(step: Step, text: str, code: int | None) -> Outcome:
  """Returns the outcome that a step's output and exit status mean.

  The status `code` is negative for a signal, and None if the step was killed for overstaying.
  """
  named = {word: [] for word in ("wanted", "begin", "unreached")}
  found = Outcome(step, "ok")
  for line in text.splitlines():
    word, _, rest = line.partition(" ")
    if word in named:
      named[word].append(rest.strip())
    elif line.startswith(VERDICTS):
      # A verdict names its case first; figures come after two spaces.
      name = line[len(VERDICTS[0]) :].strip().split("  ")[0]
      found.lines.append(line)
      found.reached.append(name)
      if not line.startswith("ok"):
        found.wrong.append(name)
  found.unreached = named["unreached"]
  if code is None:
    found.state = "killed"
  elif code < 0:
    found.state = f"died: {signal.Signals(-code).name}"
  elif found.wrong:
    found.state = "wrong"
  elif found.unreached:
    found.state = "unreached"
  elif code:
    found.state = f"exit {code}"
  if found.broke:
    found.begun = next((name for name in named["begin"][-1:] if name not in found.reached), "")
    known = {*named["begin"], *found.reached, *found.unreached}
    found.unreached += [name for name in named["wanted"] if name not in known]
  if step.wrapper and not step.judged and code is not None and (code or not _clean(text)):
    found.state = "said something"
  return found


def _clean(text: str) -> bool:
  """Returns True if compute-sanitizer's report is empty."""
  return "ERROR SUMMARY: 0 errors" in text or "RACECHECK SUMMARY: 0 hazards" in text


def described(outcome: Outcome, text: str) -> str:
  """Returns what is printed of a step: all that is known to a reader who has lost the log."""
  step = outcome.step
  first = f"[{step.name}] {outcome.state} after {outcome.seconds:.0f} s"
  if outcome.lines:
    first += f", {sum(line.startswith('ok') for line in outcome.lines)} right"
  first += f": {outcome.note}" if outcome.note else ""
  if step.name == "facts":
    return "\n".join([first, *(f"  {line[:_FACT_CHARACTERS]}" for line in text.splitlines())])
  # The verdicts of timed rows have figures; of checks those that are right need no line.
  checked = step.module in (CHECK, TESTS)
  lines = [line for line in outcome.lines if not (checked and line.startswith("ok"))][:_LINES]
  if outcome.begun:
    lines.append(f"in: begin {outcome.begun}")
  if step.judged and (outcome.broke or outcome.state.startswith("exit")):
    known = ("wanted", "begin", *VERDICTS)
    other = [line for line in text.splitlines() if line.strip() and not line.startswith(known)]
    lines += other[-_LINES:]
  return "\n".join([first, *(f"  {line[:_LINE_CHARACTERS]}" for line in lines)])


def summary(outcomes: list[Outcome], notes: list[str], rehearse: bool) -> list[str]:
  """Returns a slot on one page: a line a step, what needs attention, the notes of the bisect."""
  lines = ["", "---- summary" + (" (a rehearsal: no measurement)" if rehearse else "")]
  for outcome in outcomes:
    detail = f"in: {outcome.begun}" if outcome.begun else outcome.note
    ending = f" ({detail})" if detail else ""
    lines.append(f"{outcome.state:<15} {outcome.seconds:4.0f} s  {outcome.step.name}{ending}")
  judged = [outcome for outcome in outcomes if outcome.step.judged]
  # A case that one step did not reach, another one may have.
  reached = {name for outcome in judged for name in outcome.reached}
  failed = [o.step.name for o in judged if o.state.startswith(("exit", "error"))]
  unreached = [name for o in judged for name in o.unreached if name not in reached]
  for title, names in (
    ("wrong", [name for outcome in judged for name in outcome.wrong]),
    ("did not end", [outcome.begun or outcome.step.name for outcome in judged if outcome.broke]),
    ("failed", failed),
    ("unreached", unreached),
    ("not begun", [outcome.step.name for outcome in judged if outcome.state == "not begun"]),
  ):
    lines.append(f"{title}: {'; '.join(names)[:_LIST_CHARACTERS] or 'none'}")
  return lines + [f"bisect: {note}" for note in notes]
