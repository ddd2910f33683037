"""The goals of the GPU kernels: what passes, what would be a record, what was measured, and what the model expects.

A gate reads one field of named rows. It is met only if every one of its rows is there and correct; a gate with some of its
rows missing shows what it has so far and says that it is incomplete.
"""

import dataclasses
import math

_WORSE = {">=": min, "<=": max}


@dataclasses.dataclass(frozen=True)
class Gate:
  """One goal.

  Attributes:
    name: what is asked for.
    rows: names of the rows that it reads.
    field: of those rows.
    unit: "" is a ratio.
    relation: ">=" or "<=": the worst row counts.
    passes, record: bounds.
    scale: the field times this is what bounds are in.
  """

  name: str
  rows: tuple[str, ...]
  field: str
  unit: str
  relation: str
  passes: float
  record: float
  scale: float = 1.0

  def __post_init__(self):
    if self.relation not in _WORSE:
      raise ValueError(f"{self.relation=} must be one of {', '.join(_WORSE)}.")

  def value(self, found: dict[str, dict], missing: list[str] | None = None) -> float | None:
    """The worst of the rows, in the gate's unit; None if there is none. Rows not there or wrong are appended to `missing`."""
    values = []
    for name in self.rows:
      row = found.get(name, {})
      value = row.get(self.field)
      if value is None or row.get("correct") is False or not math.isfinite(value):
        if missing is not None:
          missing.append(name + (" (wrong result)" if row.get("correct") is False else ""))
      else:
        values.append(value * self.scale)
    return _WORSE[self.relation](values) if values else None

  def met(self, value: float | None, bound: float) -> bool:
    """Whether a value keeps a bound."""
    if value is None:
      return False
    return value >= bound if self.relation == ">=" else value <= bound


def _lists(densities=("05", "10"), specs=("a_64k", "a_128k", "a_512k")):
  return tuple(f"lists_d{d}/{s}" for d in densities for s in specs)


_FUSED = ("fused_over_separate/a_64k", "fused_over_separate/a_128k", "fused_over_separate/a_1m")
GATES = (
  Gate(
    "dense mode, 16K-128K, of cuDNN's rate",
    ("dense/a_16k", "dense/a_64k", "dense/a_128k"),
    "over_cudnn",
    "",
    ">=",
    0.95,
    0.99,
  ),
  Gate(
    "block-sparse 128x128, density 5-10 %, 64K-512K, retained",
    _lists(),
    "retained",
    "",
    ">=",
    0.85,
    0.94,
  ),
  Gate(
    "3-D window 18x24x24, 30x48x80, 24 heads",
    ("window/b_115k",),
    "seconds",
    "ms",
    "<=",
    28.0,
    25.4,
    1e3,
  ),
  Gate(
    "backward, block lists (2.5x convention)",
    ("backward_lists_d10/a_64k", "backward_lists_d10/a_128k"),
    "tflops",
    "TFLOP/s",
    ">=",
    400.0,
    500.0,
  ),
  Gate("one launch over the best separate ones, everywhere", _FUSED, "ratio", "x", ">=", 1.0, 1.0),
  Gate("one launch over the best separate ones, 64K", _FUSED[:1], "ratio", "x", ">=", 1.0, 1.04),
  Gate(
    "FreqFormer attention, mid 5 %, 128K, over cuDNN",
    ("freqformer/a_128k",),
    "speedup",
    "x",
    ">=",
    20.0,
    25.0,
  ),
  Gate(
    "FreqFormer attention, mid 5 %, 1M, over cuDNN",
    ("freqformer/a_1m",),
    "speedup",
    "x",
    ">=",
    29.0,
    35.0,
  ),
  Gate(
    "FreqFormer attention, 4K keys, 1M", ("fixed4k/a_1m",), "seconds", "ms", "<=", 60.0, 38.0, 1e3
  ),
  Gate(
    "selection + transforms at 128K, of attention",
    ("around/a_128k",),
    "over_attention",
    "",
    "<=",
    0.15,
    0.05,
  ),
)


def gate_rows(
  measured: list[dict], expected: list[dict] = (), gates: tuple[Gate, ...] = GATES
) -> list[dict]:
  """One row per gate: bounds, what was measured (None: nothing yet) and, apart from it, what the model expects."""
  found = {row["name"]: row for row in measured if not row.get("expected")}
  modelled = {row["name"]: row for row in expected if row.get("expected")}
  rows = []
  for gate in gates:
    missing = []
    value = gate.value(found, missing)
    complete = not missing
    rows.append(
      {
        "name": f"gate: {gate.name}",
        "unit": gate.unit,
        "pass": f"{gate.relation} {gate.passes:g}",
        "record": f"{gate.relation} {gate.record:g}",
        "measured": value,
        "complete": complete,
        "missing": missing,
        "passed": gate.met(value, gate.passes) if complete else None,
        "record_met": gate.met(value, gate.record) if complete else None,
        "expected_value": gate.value(modelled),
        "of": list(gate.rows),
      }
    )
  return rows


def table(rows: list[dict]) -> str:
  """Gates for people; an expected value stands in its own column, never in the measured one."""
  lines = [
    f"{'gate':<58} {'pass':>8} {'record':>8} {'measured':>10} {'':<11} {'expected (model)':>16}"
  ]
  for row in rows:
    state = {None: "", True: "passed", False: "MISSED"}[row["passed"]]
    state = "RECORD" if row["record_met"] else state
    state = "incomplete" if row["measured"] is not None and not row["complete"] else state

    def number(x):
      return "-" if x is None else f"{x:.3g}"

    lines.append(
      f"{row['name'].removeprefix('gate: '):<58} {row['pass']:>8} {row['record']:>8} {number(row['measured']):>10} {state:<11} "
      f"{number(row['expected_value']):>16} {row['unit']}"
    )
  return "\n".join(lines)
