"""Goals of the GPU kernels: which rows they read, what passes, what would be a record.

A gate reads one field of named rows. It is met only if every one of its rows is there and correct;
a gate with some of its rows missing shows what it has so far and says that it is incomplete.
"""

import dataclasses
import math

_WORSE = {">=": min, "<=": max}


@dataclasses.dataclass(frozen=True)
class Gate:
  """One goal.

  Attributes:
    rows: names of the rows that it reads; the worst one counts.
    field: of those rows.
    passes: bound that passes.
    record: bound of a record.
    unit: of the bounds; "" is a ratio, and "ms" of a field in seconds.
    relation: ">=" or "<=".
  """

  name: str
  rows: tuple[str, ...]
  field: str
  passes: float
  record: float
  unit: str = ""
  relation: str = ">="

  def read(self, found: dict[str, dict]) -> tuple[float | None, list[str]]:
    """Returns the worst value in the gate's unit (None: no row), and the rows that are missing."""
    values = []
    missing = []
    scale = 1e3 if self.unit == "ms" else 1.0
    for name in self.rows:
      row = found.get(name, {})
      value = row.get(self.field)
      if row.get("correct") is False:
        missing.append(f"{name} (wrong result)")
      elif value is None or not math.isfinite(value):
        missing.append(name)
      else:
        values.append(value * scale)
    return _WORSE[self.relation](values) if values else None, missing

  def met(self, value: float, bound: float) -> bool:
    """True if a value keeps a bound."""
    return value >= bound if self.relation == ">=" else value <= bound


_LISTS = tuple(f"lists_d{d}/{s}" for d in ("05", "10") for s in ("a_64k", "a_128k", "a_512k"))
_DENSE = ("dense/a_16k", "dense/a_64k", "dense/a_128k")
_BACKWARD = ("backward_lists_d10/a_64k", "backward_lists_d10/a_128k")
_FUSED = ("fused_over_separate/a_64k", "fused_over_separate/a_128k", "fused_over_separate/a_1m")
GATES = (
  Gate("dense mode, 16K-128K, of cuDNN's rate", _DENSE, "over_cudnn", 0.95, 0.99),
  Gate("block-sparse 128x128, density 5-10 %, 64K-512K, retained", _LISTS, "retained", 0.85, 0.94),
  Gate(
    "3-D window 18x24x24, 30x48x80, 24 heads", ("window/b_115k",), "seconds", 28.0, 25.4, "ms", "<="
  ),
  Gate("backward, block lists (2.5x convention)", _BACKWARD, "tflops", 400.0, 500.0, "TFLOP/s"),
  Gate("one launch over the best separate ones, everywhere", _FUSED, "ratio", 1.0, 1.0, "x"),
  Gate("one launch over the best separate ones, 64K", _FUSED[:1], "ratio", 1.0, 1.04, "x"),
  Gate(
    "FreqFormer attention, mid 5 %, 128K, over cuDNN",
    ("freqformer/a_128k",),
    "speedup",
    passes=20.0,
    record=25.0,
    unit="x",
  ),
  Gate(
    "FreqFormer attention, mid 5 %, 1M, over cuDNN",
    ("freqformer/a_1m",),
    "speedup",
    passes=29.0,
    record=35.0,
    unit="x",
  ),
  Gate("FreqFormer attention, 4K keys, 1M", ("fixed4k/a_1m",), "seconds", 60.0, 38.0, "ms", "<="),
  Gate(
    "selection + transforms at 128K, of attention",
    ("around/a_128k",),
    "over_attention",
    passes=0.15,
    record=0.05,
    relation="<=",
  ),
)


def gate_rows(rows: list[dict], gates: tuple[Gate, ...] = GATES) -> list[dict]:
  """Returns one row per gate: its bounds and what was measured (None: nothing yet).

  Rows of a model (`expected`) are no measurements and are left out.
  """
  found = {row["name"]: row for row in rows if not row.get("expected")}
  judged = []
  for gate in gates:
    value, missing = gate.read(found)
    judged.append(
      {
        "name": f"gate: {gate.name}",
        "unit": gate.unit,
        "pass": f"{gate.relation} {gate.passes:g}",
        "record": f"{gate.relation} {gate.record:g}",
        "measured": value,
        "complete": not missing,
        "missing": missing,
        "passed": None if missing else gate.met(value, gate.passes),
        "record_met": None if missing else gate.met(value, gate.record),
        "of": list(gate.rows),
      }
    )
  return judged


def table(rows: list[dict]) -> str:
  """Returns the gates for people."""
  lines = [f"{'gate':<58} {'pass':>8} {'record':>8} {'measured':>10} {'':<11}"]
  for row in rows:
    state = {None: "", True: "passed", False: "MISSED"}[row["passed"]]
    if row["record_met"]:
      state = "RECORD"
    if row["measured"] is not None and not row["complete"]:
      state = "incomplete"
    measured = "-" if row["measured"] is None else f"{row['measured']:.3g}"
    lines.append(
      f"{row['name'].removeprefix('gate: '):<58} {row['pass']:>8} {row['record']:>8} "
      f"{measured:>10} {state:<11} {row['unit']}"
    )
  return "\n".join(lines)
