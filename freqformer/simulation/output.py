"""Rows of the simulator for people and programs.

A row with `error` was refused: its numbers are None, all else is as in other rows.
"""

import csv
import io
import json
from collections.abc import Callable


def number(field: str, form: str, unit: float = 1.0) -> Callable[[dict], str]:
  """Returns a cell: a field in a unit, or "-" where a row has none."""
  return lambda r: format(r[field] / unit, form) if r.get(field) is not None else "-"


def grid_text(row: dict) -> str:
  return "x".join(map(str, row["grid"]))


_COLUMNS = {
  "tokens": lambda r: f"{r['tokens']:,}",
  "grid": grid_text,
  "method": lambda r: r["method"],
  "GPUs": lambda r: str(r["gpus"]),
  "density": number("density", ".4f"),
  "attention TFLOP": number("attention_flops", ",.1f", 1e12),
  "linear TFLOP": number("linear_flops", ",.1f", 1e12),
  "device memory GB": number("hbm_bytes", ",.1f", 1e9),
  "KV GB": number("kv_bytes", ",.1f", 1e9),
  "FLOP/byte": number("flops_per_byte", ",.0f"),
  "seconds": number("seconds", ".4g"),
  "tokens/s": number("tokens_per_s", ",.0f"),
  "video s": number("video_seconds", ".1f"),
  "run s": number("run_seconds", ",.0f"),
  "run PFLOP": number("run_flops", ",.1f", 1e15),
  "resident GB/GPU": number("memory_bytes", ".1f", 1e9),
  "unpadded dense / this": number("speedup_over_dense", ".2f"),
  "measured": lambda r: "no",
}


def table(rows: list[dict]) -> str:
  """Returns the rows for people: models and devices, a line each, and why some were refused."""
  cells = [list(_COLUMNS), *([show(r) for show in _COLUMNS.values()] for r in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  of = dict.fromkeys(f"{r['model']} on {r['gpus']} x {r['gpu']}" for r in rows)
  lines = [f"{', '.join(of)}: one forward at batch 1, simulated"]
  lines += [f"rates: {rates}" for rates in dict.fromkeys(r["rates"] for r in rows if "rates" in r)]
  lines += ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
  refused = [r for r in rows if "error" in r]
  lines += [f"refused: {r['method']} on {r['tokens']:,} tokens: {r['error']}" for r in refused]
  return "\n".join(lines)


def render(rows: list[dict], form: str) -> str:
  """Returns rows as "table", "json" or "csv"."""
  if form == "json":
    return json.dumps(rows, indent=1)
  if form == "table":
    return table(rows)
  fields = list(dict.fromkeys(key for r in rows for key in r))
  out = io.StringIO()
  writer = csv.DictWriter(out, fields, lineterminator="\n")
  writer.writeheader()
  writer.writerows({key: _joined(value) for key, value in r.items()} for r in rows)
  return out.getvalue().rstrip("\n")


def _joined(value):
  """Returns a list as one cell: names with spaces, numbers with x."""
  if not isinstance(value, list):
    return value
  words = value and isinstance(value[0], str)
  return (" " if words else "x").join(map(str, value))
