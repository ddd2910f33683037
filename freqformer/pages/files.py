"""Reads the files of a run for a report, each checked for its form.

A file that is missing, cut off or foreign costs its section only. An error of the drawing itself is
ours and is not hidden.
"""

import json
import pathlib

import numpy as np

from freqformer.train.metrics import read

_WRITERS = {
  "samples/*.mp4": "eval.py",
  "routing.json": "train.py, at a validation, of a method with a router",
  "cost.json": "make demo",
  "evaluation.json": "make demo",
}


class Absent(Exception):
  """A section cannot be shown; the message says why and is shown instead."""


def missing(name: str) -> Absent:
  """Returns the remark that a run lacks a file, with what would write it."""
  return Absent(f"this run has no {name} (written by {_WRITERS.get(name, 'train.py')}).")


def check(value, form, where: str):
  """Checks a JSON value against its form and returns it.

  Args:
    value: of `json.loads`.
    form: a type (float takes whole numbers, too); `[form of each entry]`; or `{"key": form}`, where
      "key?" may be absent or null and the one key `str` stands for any.
    where: the file, for the message.

  Raises:
    Absent: names the place that differs.
  """
  if isinstance(form, type):
    allowed = (int, float) if form is float else form
    if not isinstance(value, allowed) or (isinstance(value, bool) and form is not bool):
      found = type(value).__name__
      raise Absent(
        f"{where} has another form than expected: {form.__name__} wanted, found {found}."
      )
  elif isinstance(form, list):
    for i, entry in enumerate(check(value, list, where)):
      check(entry, form[0], f"{where}[{i}]")
  elif str in form:
    for key, entry in check(value, dict, where).items():
      check(entry, form[str], f"{where}: {key}")
  else:
    check(value, dict, where)
    for key, own in form.items():
      name = key.removesuffix("?")
      if value.get(name) is not None:
        check(value[name], own, f"{where}: {name}")
      elif not key.endswith("?"):
        raise Absent(f"{where} has another form than expected: it lacks {name}.")
  return value


def read_json(workdir: pathlib.Path, name: str, form=dict):
  """Reads a JSON file of the run; Absent if it is not there, not JSON or of another form."""
  path = workdir / name
  if not path.exists():
    raise missing(name)
  try:
    value = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise Absent(f"{name} is not valid JSON ({error}).") from error
  return check(value, form, name)


def metric_rows(workdir: pathlib.Path, kind: str) -> list[dict]:
  """Returns the lines of metrics.jsonl of a kind: train, val or val_soft."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    raise missing("metrics.jsonl")
  rows = [row for row in read(path) if isinstance(row, dict) and row.get("kind") == kind]
  form = {"step": int, "buckets?": [float], "linear_buckets?": [float]}
  return [check(row, form, "metrics.jsonl") for row in rows]


def series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps and finite values of a key, `[n]` both."""
  given = [row for row in rows if isinstance(row.get(key), int | float)]
  pairs = [(row["step"], row[key]) for row in given if np.isfinite(row[key])]
  pairs = np.asarray(pairs).reshape(-1, 2)
  return pairs[:, 0], pairs[:, 1]


def read_routing(workdir: pathlib.Path) -> dict:
  """Reads routing.json; `probs` and `choice` are `[layers, quarters of t, heads, branches]`."""
  form = {"branches": [str], "bucket_edges": [float], "probs": list, "choice": list}
  routing = read_json(workdir, "routing.json", form)
  quarters = len(routing["bucket_edges"]) - 1
  branches = len(routing["branches"])
  for key in ("probs", "choice"):
    try:
      array = np.asarray(routing[key], np.float64)
    except (ValueError, TypeError) as error:  # ragged, or no numbers
      raise Absent(f"routing.json: {key} is no array of numbers ({error}).") from error
    if array.ndim != 4 or 0 in array.shape or array.shape[1::2] != (quarters, branches):
      raise Absent(
        f"routing.json: {key} has shape {array.shape}, expected [layers, {quarters} quarters, "
        f"heads, {branches} branches]."
      )
    routing[key] = array
  return routing
