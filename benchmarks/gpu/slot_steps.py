"""Plans for minutes on a scarce GPU: which commands run, in which order, for how long at most.

Times assume an H100 with 16 cores and compiled programs kept between steps; they are estimates
until a slot has run. This module imports no jax, because the process that reads it must outlive
whatever a kernel does.
"""

import dataclasses
import re

from benchmarks.gpu.guards import GUARDS

# Seconds until a child process has imported jax, opened the GPU and begun its first case.
START = 10.0
# Seconds between a child's own deadline and its limit: it stops by itself, with everything written,
# before it is killed.
MARGIN = 3.0


@dataclasses.dataclass(frozen=True)
class Step:
  """One process of a slot.

  Attributes:
    name: in the log and the summary.
    module: run with `python -m`; it takes --out, --minutes and, in a rehearsal, --rehearse.
    arguments: further ones.
    seconds: it is killed after so many.
    alone: nothing else runs beside it, because it is timed or because others build on it.
    bisect: if a case of it hangs or is wrong, that case is tried under other configurations
      (`bisection`).
    after: names of steps; if one of them was killed or died, this one is not begun, since it would
      end likewise.
    wrapper: a program and its arguments that run the command; the step is left out where PATH has
      no such program.
    judged: False: what it finds is reported and kept in the log, and neither its rows nor its exit
      status count.
    resumes: it is left out where an earlier call of the same code on the same device ended it well.
  """

  name: str
  module: str
  arguments: tuple[str, ...] = ()
  seconds: float = 60.0
  alone: bool = False
  bisect: bool = False
  after: tuple[str, ...] = ()
  wrapper: tuple[str, ...] = ()
  judged: bool = True
  resumes: bool = True


def checks(name: str, only: str, seconds: float = 60.0, **fields) -> Step:
  """Returns a step of benchmarks.gpu.check over the cases that the regular expression finds."""
  return Step(name, "benchmarks.gpu.check", (f"--only={only}",), seconds, **fields)


def only(cases: list[str]) -> str:
  """Returns a regular expression that finds these cases and no others."""
  return f"^({'|'.join(re.escape(case) for case in cases)})$"


def timed(name: str, parts: str, only: str, seconds: float, **fields) -> Step:
  """Returns a step of benchmarks.attention, alone on the machine.

  Args:
    name: of the step.
    parts: of benchmarks.gpu.run, separated by commas.
    only: a regular expression that finds the rows.
    seconds: of the whole step.
    fields: others of the step.

  Raises:
    ValueError: if the step is so short that its last row would be left out.
  """
  least = START + MARGIN + max(GUARDS[part] for part in parts.split(","))
  if seconds < least:
    raise ValueError(
      f"step {name!r} of {seconds:g} s would leave out its last row: give it at least {least:g} s, "
      f"which is the start, the row's guard (gpu_guards.py) and {MARGIN:g} s to end."
    )
  arguments = ("--device=gpu", f"--parts={parts}", f"--only={only}")
  return Step(name, "benchmarks.attention", arguments, seconds, alone=True, **fields)


def sanitizer(tool: str) -> Step:
  """Returns a step that runs the smallest call under compute-sanitizer; false alarms on wgmma
  operands are known."""
  return Step(
    tool,
    "benchmarks.gpu.check",
    ("--only=^one tile, seed 0$",),
    60,
    alone=True,
    wrapper=("compute-sanitizer", "--tool", tool),
    judged=False,
    after=("first calls",),
  )


FIRST_CALLS = checks(
  "first calls", "^(one tile, seed 0|constant table|sliced in a scan)$", 75, alone=True, bisect=True
)
FACTS = Step("facts", "benchmarks.gpu.facts", (), 30, alone=True, resumes=False)
TRAIN = Step(
  "training step",
  "benchmarks.gpu.train",
  ("--steps=60",),
  75,
  alone=True,
  after=("plain",),
  resumes=False,
)
# All cases of attention but those of a million tokens, which take most of a minute each.
_SMALL = "^(?!1M).*, seed 0$"
_FORWARD = ("first calls", "plain")

# Does every kernel run, end and agree with the oracle? Then: how fast is what is right?
FIRST = (
  FACTS,
  FIRST_CALLS,
  checks("plain", "^plain, seed 0$", bisect=True),
  checks("lists", "^(ragged, empty rows|128x64 tiles, odd counts), seed 0$", bisect=True),
  checks("64-row tiles", "^(64x64 tiles|64x64 tiles, d=64), seed 0$", bisect=True),
  checks("no lists", "^(dense mode, ragged|one table for all heads), seed 0$", bisect=True),
  checks("padding and repeat", "^padding and repeat$"),
  checks("around", "^around", 75),
  checks("linear", "^linear, frames, softmax|^linear, long frames", 75),
  checks("selection and search", "^(selection|search)$"),
  timed("dense", "ceilings,dense_mode", "ceiling|^dense/a_(64k|16k)$", 100, after=_FORWARD),
  timed("random lists", "lists", "^lists_d10/a_128k$|^lists_d05/a_64k$", 75, after=_FORWARD),
  timed(
    "backward", "backward", "^backward_lists_d10/a_64k$|^backward_dense/a_16k$", 85, after=_FORWARD
  ),
  timed("window", "window", "window", 60, after=_FORWARD),
  TRAIN,
  checks("all cases", _SMALL, 120),
  checks("all of linear", "^linear", 90),
  timed("around, timed", "around,linear", "a_128k", 75, after=("around", "linear")),
  sanitizer("racecheck"),
  sanitizer("memcheck"),
)

# Everything was right: what do the alternatives cost, and the rows that the first call had no time
# for.
RIGHT = (
  FACTS,
  FIRST_CALLS,
  timed("forms", "forms", "form_", 80, after=("first calls",)),
  timed("FreqFormer", "freqformer", "^(freqformer|fixed4k)/a_128k$", 75, after=("first calls",)),
  timed(
    "64-row tiles and 512K",
    "list_variants,lists",
    "^lists_d10_64x64/|^lists_d05/a_512k$",
    60,
    after=("first calls",),
  ),
  timed("around, timed", "around,linear", "a_128k", 60, after=("first calls",)),
  # Last, because the table that it writes makes rows of the old table void.
  Step(
    "tuning",
    "benchmarks.gpu.tune",
    ("--keys=128:128:128:forward,128:128:128:dq,64:64:64:forward",),
    90,
    alone=True,
    after=("first calls",),
    resumes=False,
  ),
)

# The rows of what works; what hangs, or is wrong, is bisected first (`plan`).
REST = (
  timed("dense", "ceilings,dense_mode", "ceiling|^dense/a_(64k|16k)$", 75),
  timed("random lists", "lists", "^lists_d10/a_128k$|^lists_d05/a_64k$", 60),
  timed("backward", "backward", "^backward_lists_d10/a_64k$", 60),
  checks("all cases", _SMALL, 90, alone=True),
)

# ---- the bisect ----------------------------------------------------------------------------------

# "" is the configuration as it is. What is repaired by one of the others was broken by that field.
VARIANTS = (
  "",
  "by_lane=True",
  "take_turns=False",
  "compute_registers=0,memory_registers=0",
  "stages=2",
  "step=64",
  "scores_ahead=False",
  "tiles_per_block=1,compute_registers=0,memory_registers=0",
)
PREFIX = "bisect"


def bisection(case: str, module: str = "benchmarks.gpu.check") -> tuple[Step, ...]:
  """Returns one step per variant of the kernels' configuration, all of the same case.

  Args:
    case: its name.
    module: what checks the case; a rehearsal names a stand-in.
  """
  return tuple(
    Step(
      f"{PREFIX}: {variant or 'as is'}",
      module,
      (f"--only={only([case])}", f"--config={variant}"),
      30,
      judged=False,
      resumes=False,
    )
    for variant in VARIANTS
  )


def repair(states: dict[str, str]) -> str:
  """Returns the first variant under which the case was right, "" if there is none or if it was
  right as it is.

  Args:
    states: of the steps of a bisect, by name.
  """
  right = _right(states)
  return "" if not right or "as is" in right else right[0]


def verdict(case: str, states: dict[str, str]) -> str:
  """Returns what a bisect says of a case, see `repair`."""
  right = _right(states)
  tried = [_variant(name) for name, state in states.items() if state != "not begun"]
  others = "; ".join(name for name in tried if name != "as is")
  if "as is" in right:
    return f"{case} was right when it ran again as it is: timing matters, or what ran beside it"
  if right:
    return f"{case} is repaired by {' and, alone, by '.join(right)}"
  return f"{case} is not repaired by any of: {others}" if others else f"{case}: no time to bisect"


def _right(states: dict[str, str]) -> list[str]:
  """Names of the variants under which the case was right."""
  return [_variant(name) for name, state in states.items() if state == "ok"]


def _variant(name: str) -> str:
  return name.removeprefix(f"{PREFIX}: ")


# ---- what a call runs ----------------------------------------------------------------------------

# Steps that misbehave, behind a rehearsal's others: killed, died, failed, wrong; none of them may
# cost another one's rows.
PLANTED = tuple(
  Step(
    kind,
    "benchmarks.gpu.slot_planted",
    (f"--kind={kind}",),
    seconds,
    bisect=kind == "wrong",
    resumes=False,
  )
  for kind, seconds in (
    ("stubborn", 3.0),
    ("aborting", 15.0),
    ("failing", 15.0),
    ("garbage", 15.0),
    ("wrong", 15.0),
  )
)

PLANS = ("first", "right", "hangs", "wrong")


def plan(name: str, case: str = "") -> tuple[Step, ...]:
  """Returns the steps of a call.

  Args:
    name: of `PLANS`: the first call, or the second after one that was right, hung, or was wrong.
    case: for "hangs" and "wrong": the name of the case, e.g. "plain, seed 0".

  Raises:
    ValueError: for an unknown name, or where a case must be named and is not, or must not and is.
  """
  if name not in PLANS:
    raise ValueError(f"--plan={name!r} is unknown; choose one of {', '.join(PLANS)}.")
  if bool(case) != (name in ("hangs", "wrong")):
    raise ValueError(
      "--case names the case that hangs or is wrong: give it with these two plans, and only there."
    )
  if name == "first":
    return FIRST
  if name == "right":
    return RIGHT
  tools = [sanitizer("memcheck"), sanitizer("racecheck")] if name == "wrong" else []
  sanitizers = [dataclasses.replace(step, after=()) for step in tools]
  return (FACTS, *bisection(case), *sanitizers, *REST)


def chosen(steps: tuple[Step, ...], names: str, rehearse: bool) -> tuple[Step, ...]:
  """Returns the steps with these names, all if there are none; a rehearsal has those that
  misbehave, too.

  Args:
    steps: of a plan.
    names: separated by ";".
    rehearse: whether it is one.

  Raises:
    ValueError: for a name that no step has.
  """
  if rehearse:
    # Two shared cores compile more slowly than sixteen.
    slower = (dataclasses.replace(step, seconds=3 * step.seconds) for step in steps)
    steps = (*slower, *PLANTED)
  wanted = [name.strip() for name in names.split(";") if name.strip()]
  known = [step.name for step in steps]
  if unknown := [name for name in wanted if name not in known]:
    raise ValueError(f"--steps has no {'; '.join(unknown)}; steps are {'; '.join(known)}.")
  return tuple(step for step in steps if not wanted or step.name in wanted)
