"""Goals of the GPU kernels: which rows they read, what passes, what would be a record.

A gate reads one field of named rows. It is met only if every one of its rows is there and correct;
a gate with some of its rows missing shows what it has so far and says that it is incomplete.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Gate:
  """One goal.

  Attributes:
    rows: names of the rows that it reads; the worst one counts.
    field: of those rows.
    passes: bound that passes.
    record: bound of a record; below `passes` if less is better.
    unit: of the bounds; "" is a ratio, and "ms" of a field in seconds.
  """

  name: str
  rows: tuple[str, ...]
  field: str
  passes: float
  record: float
  unit: str = ""

  def row(self, found: dict[str, dict]) -> dict:
    """Returns the gate's row: its bounds and the worst of what was measured (None: nothing yet)."""
    values = []
    missing = []
    for name in self.rows:
      row = found.get(name, {})
      value = row.get(self.field)
      if row.get("correct") is False:
        missing.append(f"{name} (wrong result)")
      elif value is None or not math.isfinite(value):
        missing.append(name)
      else:
        values.append(value * (1e3 if self.unit == "ms" else 1.0))
    least = self.record >= self.passes
    relation = ">=" if least else "<="
    worst = (min if least else max)(values, default=None)

    def met(bound: float) -> bool | None:
      if missing:
        return None
      return worst >= bound if least else worst <= bound

    return {
      "name": f"gate: {self.name}",
      "unit": self.unit,
      "pass": f"{relation} {self.passes:g}",
      "record": f"{relation} {self.record:g}",
      "measured": worst,
      "missing": missing,
      "passed": met(self.passes),
      "record_met": met(self.record),
    }


_LISTS = tuple(f"lists_d{d}/{s}" for d in ("05", "10") for s in ("a_64k", "a_128k", "a_512k"))
_DENSE = ("dense/a_16k", "dense/a_64k", "dense/a_128k")
_BACKWARD = ("backward_lists_d10/a_64k", "backward_lists_d10/a_128k")
_FUSED = ("fused_over_separate/a_64k", "fused_over_separate/a_128k", "fused_over_separate/a_1m")
_MID = ("freqformer/a_128k", "freqformer/a_1m")
_WINDOW = ("window/b_115k",)
_AROUND = ("around/a_128k",)
GATES = (
  Gate("dense mode, 16K-128K, of cuDNN's rate", _DENSE, "over_cudnn", 0.95, 0.99),
  Gate("block-sparse 128x128, density 5-10 %, 64K-512K, retained", _LISTS, "retained", 0.85, 0.94),
  Gate("3-D window 18x24x24, 30x48x80, 24 heads", _WINDOW, "seconds", 28.0, 25.4, "ms"),
  Gate("backward, block lists (2.5x convention)", _BACKWARD, "tflops", 400.0, 500.0, "TFLOP/s"),
  Gate("one launch over the best separate ones, everywhere", _FUSED, "ratio", 1.0, 1.0, "x"),
  Gate("one launch over the best separate ones, 64K", _FUSED[:1], "ratio", 1.0, 1.04, "x"),
  Gate("FreqFormer attention, mid 5 %, 128K, over cuDNN", _MID[:1], "speedup", 20.0, 25.0, "x"),
  Gate("FreqFormer attention, mid 5 %, 1M, over cuDNN", _MID[1:], "speedup", 29.0, 35.0, "x"),
  Gate("FreqFormer attention, 4K keys, 1M", ("fixed4k/a_1m",), "seconds", 60.0, 38.0, "ms"),
  Gate("selection + transforms at 128K, of attention", _AROUND, "over_attention", 0.15, 0.05),
)


def gate_rows(rows: list[dict]) -> list[dict]:
  """Returns one row per gate."""
  found = {row["name"]: row for row in rows}
  return [gate.row(found) for gate in GATES]


def table(rows: list[dict]) -> str:
  """Returns the gates for people."""
  lines = [f"{'gate':<58} {'pass':>8} {'record':>8} {'measured':>10}"]
  for row in rows:
    measured = "-" if row["measured"] is None else f"{row['measured']:.3g}"
    if row["missing"]:
      state = "" if row["measured"] is None else "incomplete"
    elif row["record_met"]:
      state = "RECORD"
    else:
      state = {None: "", True: "passed", False: "MISSED"}[row["passed"]]
    lines.append(
      f"{row['name'].removeprefix('gate: '):<58} {row['pass']:>8} {row['record']:>8} "
      f"{measured:>10} {state:<11} {row['unit']}"
    )
  return "\n".join(lines)
