"""The rows of a run, one by one: found, measured, failed or not reached, and told to a slot."""

import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator

from absl import logging

from benchmarks.gpu.device import Deadline
from benchmarks.rows import Store


@dataclasses.dataclass(frozen=True)
class Job:
  """One row to measure.

  Attributes:
    measure: returns the row's fields; if it raises, the row says why.
    seconds: that it may take, at a guess; it is not begun if it would end after the deadline.
  """

  name: str
  measure: Callable[[], dict]
  seconds: float = 0.0


def attempts(
  store: Store, jobs: Iterable[Job], deadline: Deadline, again: bool = False
) -> Iterator[tuple[str, dict | None]]:
  """Yields the name and row of each job, measured unless a right row of that name is there.

  A row is announced before it is measured: a run that is killed has named the one it was in. No
  time is unknown, not wrong, and makes no row: None.

  Args:
    again: measure also what is there.
  """
  for job in jobs:
    row = None if again else store.get(job.name)
    if row is None or not row.get("correct", True):
      if deadline.left <= job.seconds:
        print(f"unreached {job.name}", flush=True)
        yield job.name, None
        continue
      print(f"begin {job.name}", flush=True)
      row = store.add({"name": job.name} | measured(job))
    print(f"{verdict(row)} {line(row)}", flush=True)
    yield job.name, row


def measured(job: Job) -> dict:
  """Returns a job's fields; if it fails, those that a row has instead of figures."""
  try:
    return job.measure()
  except Exception as error:
    logging.error("%s failed", job.name, exc_info=error)
    return {"correct": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
  finally:
    gc.collect()  # jitted calls hold their arguments in cycles


def verdict(row: dict) -> str:
  """Returns the word with which a row's line begins; a slot looks for it."""
  if "error" in row:
    return "FAILED"
  return "ok   " if row.get("correct", True) else "WRONG"


_ERRORS = ("out", "lse", "dq", "dk", "dv", "float32", "bfloat16", "plain", "kernels")
# Fields of a row in its printed line: factor and format.
_SHOWN = {
  "seconds": (1e3, "{:9.3f} ms"),
  "tflops": (1, "{:6.1f} TFLOP/s"),
  "tb_per_s": (1, "{:.2f} TB/s"),
  "density": (1, "density {:.4f}"),
  "speedup": (1, "{:6.2f}x"),
  "retained": (1, "retained {:.3f}"),
  "over_cudnn": (1, "{:.3f} of cuDNN"),
  "over_hopper": (1, "{:.3f} of Hopper's kernel"),
  "ratio": (1, "ratio {:.3f}"),
  "over_attention": (1, "{:.3f} of attention"),
  "steps_per_s": (1, "{:.3g} steps/s"),
  "attention_share": (100, "attention {:.1f} % of the step"),
  "peak_bytes": (2**-30, "peak memory {:.2f} GiB"),
} | {f"error_{name}": (1, name + " {:.1e}") for name in _ERRORS}


def line(row: dict) -> str:
  """Returns one row for people: its name, two spaces, its figures."""
  if "error" in row:
    return f"{row['name']:<40}  {row['error'][:160]}"
  shown = [
    form.format(factor * row[field])
    for field, (factor, form) in _SHOWN.items()
    if row.get(field) is not None
  ]
  return "  ".join([f"{row['name']:<40}", *shown])
