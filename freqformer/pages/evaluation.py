"""Shows what was measured on samples and clips: metrics with their company, other tables as is."""

import pathlib

from freqformer.pages.files import Absent, json_if_any, read_json
from freqformer.pages.html import json_tables, table

_VALIDATION = ("checkpoint", "clips", "loss", "density", "regret")


def evaluation(workdir: pathlib.Path) -> str:
  """Shows evaluation.json, whatever tables it holds, and the validations by eval.py."""
  text = ""
  if (workdir / "evaluation.json").exists():
    found = read_json(workdir, "evaluation.json")
    text += _metrics(found) if _are_metrics(found) else json_tables(found)
  rows = []
  for path in sorted((workdir / "validation").glob("*.json")):
    found = json_if_any(workdir, f"validation/{path.name}")
    if "loss" in found:
      rows.append([path.stem, found.get("method"), *map(found.get, _VALIDATION)])
  if rows:
    text += table(["validated on", "method", "step", "clips", "loss", "density", "regret"], rows)
  if not text:
    raise Absent("this run was not evaluated: it has no evaluation.json and no validation/.")
  return text


def _are_metrics(found) -> bool:
  """Tells whether JSON is rows of `python -m freqformer.evaluate`."""
  return (
    isinstance(found, list)
    and len(found) > 0
    and all(isinstance(row, dict) and {"name", "value", "floor"} <= row.keys() for row in found)
  )


def _metrics(rows: list[dict]) -> str:
  """Returns a line per metric: samples, the floor and the controls; all details are folded."""
  controls = list(dict.fromkeys(name for row in rows for name in _group(row, "controls")))
  head = ["metric", "unit", "of", "all samples", "mean", "spread", "floor"]
  lines = []
  for row in rows:
    own = _group(row, "controls")
    line = [row["name"], row.get("unit") or None, _group(row, "protocol").get("drawn")]
    line += [row["value"], row.get("mean"), row.get("spread"), _mean(row["floor"])]
    lines.append([*line, *(_mean(own.get(name)) for name in controls)])
  titles = [name.replace("_", " ") for name in controls]
  details = f"<details><summary>All that was recorded</summary>{json_tables(rows)}</details>"
  return table([*head, *titles], lines) + details


def _group(row: dict, key: str) -> dict:
  """Returns an object of a row, an empty one if there is none."""
  value = row.get(key)
  return value if isinstance(value, dict) else {}


def _mean(value) -> float | None:
  """Returns a number, or the mean of an object that has one."""
  return value.get("mean") if isinstance(value, dict) else value
