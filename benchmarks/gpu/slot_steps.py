"""Plans for minutes on a scarce GPU: which commands run, in which order, for how long at most.

Times assume an H100 with 16 cores and compiled programs kept between steps; they are estimates
until a slot has run. This module imports no jax, because the process that reads it must outlive
whatever a kernel does.
"""

import dataclasses
import re

# Seconds until a child process has imported jax, opened the GPU and begun its first case.
START = 10.0
# Seconds between a child's own deadline and its limit: it stops by itself, with everything written,
# before it is killed.
MARGIN = 3.0
# Seconds that a row of each part of the benchmark may take, all estimates: the benchmark leaves a
# row out when less is left, and a step must be longer than its last row.
GUARDS = {
  "checks": 0,
  "ceilings": 15,
  "dense_mode": 40,
  "lists": 25,
  "list_variants": 25,
  "launches": 60,
  "backward": 30,
  "window": 40,
  "freqformer": 40,
  "around": 30,
  "linear": 30,
  "search": 30,
  "torch": 60,
  "rest": 40,
  "forms": 40,
}
# The modules that steps run: checks at real sizes, timed rows, conformance tests.
CHECK = "benchmarks.gpu.check"
TIMED = "benchmarks.attention"
TESTS = "pytest"


@dataclasses.dataclass(frozen=True)
class Step:
  """One process of a slot.

  Attributes:
    module: run with `python -m`; it takes --minutes, in a rehearsal --rehearse, and --out unless it
      is pytest.
    seconds: it is killed after so many.
    alone: nothing runs at the same time, because it is timed or because others build on it.
    bisect: if a case of it hangs or is wrong, that case is tried under other configurations
      (`bisection`).
    after: names of steps; if one of them was killed or died, this one is not begun, since it would
      end likewise.
    wrapper: a program, with arguments, that runs the command; without it the step is left out.
    judged: False: its findings are reported and kept in the log, and neither its rows nor its exit
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
  """Returns a step over the checks at real sizes that the regular expression finds."""
  return Step(name, CHECK, (f"--only={only}",), seconds, **fields)


def tests(name: str, place: str, seconds: float = 60.0) -> Step:
  """Returns a step that runs the conformance tests of a place in tests/kernels on the device.

  Those of Triton's kernels are left out: a machine may lack its packages.
  """
  others = "--only=^(?!.*triton)"
  return Step(name, TESTS, ("--device=gpu", others, f"tests/kernels/{place}"), seconds)


def only(cases: list[str]) -> str:
  """Returns a regular expression that finds these cases and no others."""
  return f"^({'|'.join(re.escape(case) for case in cases)})$"


def timed(name: str, parts: str, only: str, seconds: float, **fields) -> Step:
  """Returns a step of timed rows, alone on the machine.

  Args:
    parts: keys of `GUARDS`, separated by commas.
    only: a regular expression that finds the rows.
    seconds: enough for the start, the guard of any of its rows, and the end.
    fields: others of the step.
  """
  arguments = ("--device=gpu", f"--parts={parts}", f"--only={only}")
  return Step(name, TIMED, arguments, seconds, alone=True, **fields)


def sanitizer(tool: str, after: tuple[str, ...] = ("first calls",)) -> Step:
  """Returns a step that runs the smallest call under compute-sanitizer.

  False alarms on operands of wgmma are known, hence it is not judged.
  """
  wrapper = ("compute-sanitizer", "--tool", tool)
  fields = {"alone": True, "after": after, "wrapper": wrapper, "judged": False}
  return checks(tool, "^one tile$", **fields)


FACTS = Step("facts", "benchmarks.gpu.facts", (), 30, alone=True, resumes=False)
FIRST_CALLS = checks(
  "first calls", "^(one tile|constant table|sliced in a scan)$", 75, alone=True, bisect=True
)
TRAIN = Step(
  "training step",
  "benchmarks.gpu.train",
  ("--steps=60",),
  75,
  alone=True,
  after=("plain",),
  resumes=False,
)
_TUNED = "128:128:128:forward,128:128:128:dq,64:64:64:forward"
# Last of its plan, because the table that it writes makes rows of the old table void.
TUNING = Step(
  "tuning",
  "benchmarks.gpu.tune",
  (f"--keys={_TUNED}",),
  90,
  alone=True,
  after=("first calls",),
  resumes=False,
)
# All checks but those of a million tokens, which take most of a minute each.
_SMALL = "^(?!1M)"
_FORWARD = ("first calls", "plain")
_FIRST = ("first calls",)
_DENSE = ("ceilings,dense_mode", "ceiling|^dense/a_(64k|16k)$")
_LISTS = ("lists", "^lists_d10/a_128k$|^lists_d05/a_64k$")
_BACKWARD = "^backward_lists_d10/a_64k$|^backward_dense/a_16k$"

# Does every kernel run, end and agree with the oracle? Then: how fast is what is right?
FIRST = (
  FACTS,
  FIRST_CALLS,
  checks("plain", "^plain$", bisect=True),
  checks("lists", "^(ragged, empty rows|128x64 tiles, odd counts)$", bisect=True),
  checks("64-row tiles", "^(64x64 tiles|64x64 tiles, d=64)$", bisect=True),
  checks("no lists", "^(dense mode, ragged|one table for all heads)$", bisect=True),
  tests("conformance", "block_sparse/test_hopper.py", 90),
  tests("around", "around", 75),
  tests("linear", "linear", 75),
  tests("selection and search", "selection"),
  timed("dense", *_DENSE, 100, after=_FORWARD),
  timed("random lists", *_LISTS, 75, after=_FORWARD),
  timed("backward", "backward", _BACKWARD, 85, after=_FORWARD),
  timed("window", "window", "window", 60, after=_FORWARD),
  TRAIN,
  checks("all cases", _SMALL, 120),
  timed("around, timed", "around,linear", "a_128k", 75, after=("around", "linear")),
  sanitizer("racecheck"),
  sanitizer("memcheck"),
)

# Everything was right: what do the alternatives cost, and the rows that the first call had no time
# for.
RIGHT = (
  FACTS,
  FIRST_CALLS,
  timed("forms", "forms", "^form_(stage_by_stage|one_tile)", 80, after=_FIRST),
  timed("FreqFormer", "freqformer", "^(freqformer|fixed4k)/a_128k$", 75, after=_FIRST),
  timed(
    "64-row tiles and 512K",
    "list_variants,lists",
    "^lists_d10_64x64/|^lists_d05/a_512k$",
    60,
    after=_FIRST,
  ),
  timed("around, timed", "around,linear", "a_128k", 60, after=_FIRST),
  TUNING,
)


def arm(name: str) -> Step:
  """Returns a step that trains an arm of the study for 70 seconds."""
  arguments = (f"--arm={name}", "--seconds=70")
  return Step(name, "benchmarks.gpu.study", arguments, 160, alone=True)


# The kernels are right: which attention learns most in equal seconds? Two arms a call.
STUDY_1 = (FACTS, arm("octaves"), arm("window"))
STUDY_2 = (FACTS, arm("freqformer"), arm("dense"))

# Is a pretrained model's transformer right on the device, and how long does its decoder take?
WAN = (
  FACTS,
  Step("parity", "benchmarks.gpu.wan", ("--part=parity",), 150, alone=True),
  Step("decode", "benchmarks.gpu.wan", ("--part=decode",), 90, alone=True),
)

# Triton's kernels of attention, beside cuDNN and Hopper's: are they right, and how fast?
_TRITON = ("--implementation=triton",)


def of_triton(step: Step) -> Step:
  """Returns a step of the checks or the benchmark for Triton's kernels."""
  return dataclasses.replace(
    step, name=f"{step.name}, triton", arguments=(*step.arguments, *_TRITON)
  )


TRITON = (
  FACTS,
  of_triton(checks("plain", "^plain$", 75, alone=True)),
  of_triton(checks("all cases", _SMALL, 120)),
  Step("conformance, triton", TESTS, ("--device=gpu", "--only=triton", "tests/kernels"), 90),
  of_triton(timed("dense", "dense_mode", "^dense/a_(64k|16k)$", 100)),
  of_triton(timed("random lists", *_LISTS, 75)),
  of_triton(timed("64-row tiles", "list_variants", "^lists_d10_64x64/", 60)),
  of_triton(timed("backward", "backward", _BACKWARD, 85)),
)

# The rows of what works; what hangs, or is wrong, is bisected first (`plan`).
REST = (
  timed("dense", *_DENSE, 75),
  timed("random lists", *_LISTS, 60),
  timed("backward", "backward", "^backward_lists_d10/a_64k$", 60),
  checks("all cases", _SMALL, 90, alone=True),
)

# ---- the bisect ----------------------------------------------------------------------------------

# "" is the configuration as it is. A case that one of the others repairs was broken by that field.
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
PREFIX = "bisect: "
AS_IS = "as is"


def bisection(case: str, module: str = CHECK) -> tuple[Step, ...]:
  """Returns one step per variant of the kernels' configuration, all of the same case."""
  steps = []
  for variant in VARIANTS:
    arguments = (f"--only={only([case])}", f"--config={variant}")
    name = PREFIX + (variant or AS_IS)
    steps.append(Step(name, module, arguments, 30, judged=False, resumes=False))
  return tuple(steps)


def verdict(case: str, states: dict[str, str]) -> tuple[str, str]:
  """Returns the meaning of a bisect in words, and the variant that repairs the case.

  That is the first one under which the case was right: "" if there is none, or if it was right as
  it is. `states` are those of the bisect's steps, by name.
  """
  found = {name.removeprefix(PREFIX): state for name, state in states.items()}
  right = [name for name, state in found.items() if state == "ok"]
  tried = [name for name, state in found.items() if state != "not begun" and name != AS_IS]
  if AS_IS in right:
    return f"{case} was right when it ran again {AS_IS}: timing matters, or its neighbours do", ""
  if right:
    return f"{case} is repaired by {' and, alone, by '.join(right)}", right[0]
  if tried:
    return f"{case} is not repaired by any of: {'; '.join(tried)}", ""
  return f"{case}: no time to bisect", ""


# ---- what a call runs ----------------------------------------------------------------------------

PLANTED = "benchmarks.gpu.slot_planted"


def planted(kind: str, seconds: float = 15.0, **fields) -> Step:
  """Returns a step that misbehaves on purpose."""
  return Step(kind, PLANTED, (f"--kind={kind}",), seconds, resumes=False, **fields)


# Steps that misbehave, at the end of a rehearsal; none of them may cost another one's rows.
MISBEHAVING = (
  planted("stubborn", 3.0),
  planted("aborting"),
  planted("failing"),
  planted("garbage"),
  planted("wrong", bisect=True),
)
# Two shared cores compile more slowly than sixteen.
_REHEARSAL_PATIENCE = 3

PLANS = ("first", "right", "hangs", "wrong", "study_1", "study_2", "wan", "triton")


def plan(name: str, case: str = "") -> tuple[Step, ...]:
  """Returns the steps of a call: the first, the second after one that was right, hung or wrong, a
  half of the study, what a pretrained model runs beside attention, or Triton's kernels.

  Raises:
    ValueError: for an unknown name, or where a case must be named and is not, or must not and is.
  """
  if name not in PLANS:
    raise ValueError(f"--plan={name!r} is unknown; choose one of {', '.join(PLANS)}.")
  if bool(case) != (name in ("hangs", "wrong")):
    raise ValueError(
      "--case names the case that hangs or is wrong: give it with these two plans, and only there."
    )
  whole = {"first": FIRST, "right": RIGHT, "study_1": STUDY_1, "study_2": STUDY_2}
  whole |= {"wan": WAN, "triton": TRITON}
  if name in whole:
    return whole[name]
  tools = ("memcheck", "racecheck") if name == "wrong" else ()
  return (FACTS, *bisection(case), *(sanitizer(tool, after=()) for tool in tools), *REST)


def chosen(steps: tuple[Step, ...], names: str, rehearse: bool) -> tuple[Step, ...]:
  """Returns the steps with these names, separated by ";", or all if there are none.

  A rehearsal adds the steps that misbehave, and gives all more time.

  Raises:
    ValueError: for a name that no step has.
  """
  if rehearse:
    slower = [
      dataclasses.replace(step, seconds=_REHEARSAL_PATIENCE * step.seconds) for step in steps
    ]
    steps = (*slower, *MISBEHAVING)
  wanted = [name.strip() for name in names.split(";") if name.strip()]
  known = [step.name for step in steps]
  if unknown := [name for name in wanted if name not in known]:
    raise ValueError(f"--steps has no {'; '.join(unknown)}; steps are {'; '.join(known)}.")
  return tuple(step for step in steps if not wanted or step.name in wanted)
