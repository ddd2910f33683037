"""Reads the files of a run for its report."""

import json
import math
import pathlib

import numpy as np

from freqformer.train.metrics import read


class Absent(Exception):
  """A section cannot be shown; the message says why and is shown instead."""


def read_json(workdir: pathlib.Path, name: str, writer: str = "train.py"):
  """Reads a JSON file of a run.

  Raises:
    Absent: it is not there, or not JSON.
  """
  path = workdir / name
  if not path.exists():
    raise Absent(f"this run has no {name} (written by {writer}).")
  try:
    return json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise Absent(f"{name} is not valid JSON ({error}).") from error


def json_if_any(workdir: pathlib.Path, name: str) -> dict:
  """Returns a JSON object of a run; of a file that is absent, damaged or no object an empty one."""
  try:
    found = read_json(workdir, name)
  except Absent:
    return {}
  return found if isinstance(found, dict) else {}


def metric_rows(workdir: pathlib.Path, kind: str) -> list[dict]:
  """Returns the lines of metrics.jsonl of a kind: train, val, val_soft or warning.

  Numbers that were not finite, which are null there, are NaN.
  """
  return [_with_nan(row) for row in read(workdir / "metrics.jsonl") if row["kind"] == kind]


def _with_nan(value):
  if isinstance(value, dict):
    return {key: _with_nan(own) for key, own in value.items()}
  if isinstance(value, list):
    return [_with_nan(own) for own in value]
  return math.nan if value is None else value


def series(rows: list[dict], key: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
  """Returns `over` and the finite values of a key, `[n]` both, of the lines that have them."""
  pairs = [(row[over], row[key]) for row in rows if key in row and over in row]
  pairs = np.array(pairs, np.float64).reshape(-1, 2)
  return tuple(pairs[np.isfinite(pairs[:, 1])].T)
