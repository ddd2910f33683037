"""Reads the files of a run for a report; one that is missing, cut off or foreign costs its section.

What is read is not checked any further: drawing fails on another form, which the section then says.
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


def read_json(workdir: pathlib.Path, name: str):
  """Reads a JSON file of the run.

  Raises:
    Absent: it is not there, or not JSON.
  """
  path = workdir / name
  if not path.exists():
    raise missing(name)
  try:
    return json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise Absent(f"{name} is not valid JSON ({error}).") from error


def metric_rows(workdir: pathlib.Path, kind: str) -> list[dict]:
  """Returns the lines of metrics.jsonl of a kind: train, val or val_soft.

  Raises:
    Absent: there is no such file.
  """
  path = workdir / "metrics.jsonl"
  if not path.exists():
    raise missing("metrics.jsonl")
  return [row for row in read(path) if row["kind"] == kind]


def series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps and finite values of a key, `[n]` both."""
  pairs = np.array([(row["step"], row[key]) for row in rows if key in row], np.float64)
  pairs = pairs.reshape(-1, 2)
  return tuple(pairs[np.isfinite(pairs[:, 1])].T)
