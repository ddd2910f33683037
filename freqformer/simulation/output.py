"""Rows of the simulator for people and programs. A row with `error` was refused: its numbers are None, the others stand."""

import csv
import io
import json

REFUSED = (
  "attention_flops",
  "linear_flops",
  "total_flops",
  "hbm_bytes",
  "seconds",
)  # of every row, None in a refused one

_COLUMNS = (
  ("tokens", lambda r: f"{r['tokens']:,}"),
  ("grid", lambda r: "x".join(map(str, r["grid"]))),
  ("method", lambda r: r["method"]),
  ("GPUs", lambda r: str(r.get("gpus", 1))),
  ("density", lambda r: f"{r['density']:.4f}"),
  ("attention TFLOP", lambda r: f"{r['attention_flops'] / 1e12:,.1f}"),
  ("linear TFLOP", lambda r: f"{r['linear_flops'] / 1e12:,.1f}"),
  ("device memory GB", lambda r: f"{r['hbm_bytes'] / 1e9:,.1f}"),
  ("KV GB", lambda r: f"{r['kv_bytes'] / 1e9:,.1f}"),
  ("FLOP/byte", lambda r: f"{r['flops_per_byte']:,.0f}"),
  ("seconds", lambda r: f"{r['seconds']:.4g}"),
  ("tokens/s", lambda r: f"{r['tokens_per_s']:,.0f}"),
  ("video s", lambda r: f"{r['video_seconds']:.1f}"),
  ("run s", lambda r: f"{r['run_seconds']:,.0f}" if "run_seconds" in r else "-"),
  ("resident GB/GPU", lambda r: f"{r['memory_bytes'] / 1e9:.1f}" if "memory_bytes" in r else "-"),
  (
    "unpadded dense / this",
    lambda r: f"{r['speedup_over_dense']:.2f}" if "speedup_over_dense" in r else "-",
  ),
  ("measured", lambda r: "yes" if r["measured"] else "no"),
)
_KNOWN = ("tokens", "grid", "method", "GPUs", "measured")  # columns that a refused row has


def table(rows: list[dict]) -> str:
  """The rows for people: what they are of, a line each, and why some were refused."""

  def cell(r, name, show):
    return show(r) if "error" not in r or name in _KNOWN else "-"

  cells = [
    [name for name, _ in _COLUMNS],
    *([cell(r, *column) for column in _COLUMNS] for r in rows),
  ]
  widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
  of = dict.fromkeys(f"{r['model']} on {r.get('gpus', 1)} x {r['gpu']}" for r in rows)
  lines = [
    f"{', '.join(of)}: one forward at batch 1, {'simulated' if not any(r['measured'] for r in rows) else 'measured too'}"
  ]
  lines += [f"rates: {rates}" for rates in dict.fromkeys(r["rates"] for r in rows if "rates" in r)]
  lines += ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
  return "\n".join(
    lines
    + [
      f"refused: {r['method']} on {r['tokens']:,} tokens: {r['error']}"
      for r in rows
      if "error" in r
    ]
  )


def render(rows: list[dict], form: str) -> str:
  """Rows as "table", "json" or "csv"."""
  if form == "json":
    return json.dumps(rows, indent=1)
  if form == "table":
    return table(rows)
  out = io.StringIO()
  writer = csv.DictWriter(out, list(dict.fromkeys(k for r in rows for k in r)), lineterminator="\n")
  writer.writeheader()

  def joined(v):
    return (
      (" " if v and isinstance(v[0], str) else "x").join(map(str, v)) if isinstance(v, list) else v
    )

  writer.writerows({k: joined(v) for k, v in r.items()} for r in rows)
  return out.getvalue().rstrip("\n")
