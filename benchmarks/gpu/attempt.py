"""One row of a run: found, measured, failed or not reached, and announced to a waiting slot."""

import gc
from collections.abc import Callable

from absl import logging

from benchmarks.gpu.device import Deadline
from benchmarks.rows import Store


def attempt(
  store: Store,
  name: str,
  measure: Callable[[], dict],
  deadline: Deadline,
  seconds: float = 0.0,
  context: dict | None = None,
) -> dict | None:
  """Returns the row of a name, measured unless a right one is there; None where there was no time.

  The row is announced before it is measured: a run that is killed has named the one it was in. No
  time is unknown, not wrong, and makes no row.

  Args:
    measure: returns the row's fields; if it raises, the row says why.
    seconds: that it may take, at a guess; nothing is begun that would end after the deadline.
    context: further fields, also of a row that fails.
  """
  row = store.get(name)
  if row is not None and row.get("correct", True):
    return row
  if deadline.left <= seconds:
    print(f"unreached {name}", flush=True)
    return None
  print(f"begin {name}", flush=True)
  try:
    fields = measure()
  except Exception as error:
    fields = failure(name, error)
  gc.collect()  # jitted calls hold their arguments in cycles
  return store.add({"name": name} | (context or {}) | fields)


def failure(name: str, error: Exception) -> dict:
  """Logs an error and returns the fields that a row has instead of figures."""
  logging.error("%s failed", name, exc_info=error)
  return {"correct": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}


def verdict(row: dict) -> str:
  """Returns the word with which a row's line begins; a slot looks for it."""
  if "error" in row:
    return "FAILED"
  return "ok   " if row.get("correct", True) else "WRONG"
