"""Measured attention calls from JSON files, written by hand or by this repository's benchmarks.

A row of measurements is an object with

  name, source; gpu (a name of `--gpu`) or device (the device's own name: NVIDIA H100 80GB HBM3)
  heads, head_dim, seconds (or tflops, by useful FLOPs), batch (default 1)
  the lists: counts (fields of `kernels.block_sparse.cost.CallCost`, of all samples and heads); or
    method, grid and, if need be, tile; or tokens (or n) and density (default 1): the share of key
    tiles that every query tile lists
  block_q (or block; default 128), block_kv (default: the same)
  fit: whether rates may be fitted to it. If no row says so, every other one is.
  implementation: the kernel; derived: how the figure follows from others, if not measured itself

A row of `python -m benchmarks.attention` may hold several timed calls: `attention_calls` describes
each, by the name of its times. Everything else that benchmarks write is left out and counted.
"""

import collections
import dataclasses
import json
import math
import pathlib

from freqformer.config import ConfigError
from freqformer.grid.layout import TileLayout
from freqformer.kernels.block_sparse.cost import CallCost, uniform
from freqformer.simulation.descriptions import gpu_named
from freqformer.simulation.forward import attention_call, make_method


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One measured call; see the fields of rows.

  Attributes:
    heads: heads times samples.
    fit: whether rates may be fitted to it; None: not stated.
    kernel: that was measured; rates of one kernel say little about another.
  """

  name: str
  seconds: float
  call: CallCost
  heads: float
  fit: bool | None
  source: str
  derived: str
  kernel: str


def load_rows(path, gpu: str) -> tuple[list[Measurement], list[str]]:
  """Returns the rows of one device in a JSON file, and notes on what was left or held out.

  Raises:
    ConfigError: for a file that is absent or no list of rows, a row without a needed field (names
      it), or a file with no row of this device to fit to (says what its rows are instead).
  """
  try:
    rows = json.loads(pathlib.Path(path).read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(f"--calibrate={path} cannot be read as JSON rows: {error}") from error
  if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
    raise ConfigError(f"--calibrate={path} must be a JSON list of objects, one per measured call.")
  counts = collections.Counter()
  found = []
  for row in rows:
    reason = _left_out(row, gpu)
    if reason:
      counts[reason] += 1
    else:
      found += _measurements(row)
  found, notes = _split(found)
  parts = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
  left_out = [f"{counts.total()} of {len(rows)} rows left out: {parts}"] if counts else []
  if not any(m.fit for m in found):
    why = left_out[0] if left_out else "every row says fit: false" if rows else "it is empty"
    raise ConfigError(
      f"{path} has no row of {gpu} to fit to ({why}). Rows need heads, head_dim, seconds and "
      f"gpu={gpu!r}, or a device that calls itself so; choose --gpu accordingly."
    )
  return found, left_out + notes


def _split(found: list[Measurement]) -> tuple[list[Measurement], list[str]]:
  """Decides which rows are fitted to and which are held out, and says what was decided."""
  # If some row asks to be fitted, rows without `fit` are held out. If none does: of the rows of the
  # kernel that has the most, sorted by FLOPs, every other one between the smallest and the largest
  # is held out (of two the larger), so that nothing is extrapolated; so are other kernels' rows.
  notes = []
  open_rows = [m for m in found if m.fit is None]
  if not open_rows or any(m.fit for m in found):
    found = [dataclasses.replace(m, fit=bool(m.fit)) for m in found]
  else:
    kernel = collections.Counter(m.kernel for m in open_rows).most_common(1)[0][0]
    own = sorted((m for m in open_rows if m.kernel == kernel), key=lambda m: m.call.flops)
    held_out = {id(m) for m in found if m.kernel != kernel or m.fit is False}
    held_out |= {id(m) for m in own[1:-1:2] or own[1:]}
    found = [dataclasses.replace(m, fit=id(m) not in held_out) for m in found]
    of = f" of {kernel}" if any(m.kernel != kernel for m in found) else ""
    notes.append(
      f"no row says which to fit to: {len(found) - len(held_out)}{of} were, every other one by "
      f"FLOPs; {len(held_out)} held out"
    )
  if found and all(m.fit for m in found):
    notes.append("nothing was held out: the errors are those of a fit, not of a prediction")
  return found, notes


def _left_out(row: dict, gpu: str) -> str:
  """Returns the reason why a row is not used; "" if it is."""
  device = row.get("gpu") or row.get("device")
  called = row.get("gpu") or gpu_named(str(device)) or str(device)
  timed = "attention_calls" in row or (
    {"heads", "head_dim"} <= row.keys() and bool({"seconds", "tflops"} & row.keys())
  )
  # Of a row written by hand, a missing field is named instead of passing over the row.
  by_hand = bool({"heads", "head_dim"} & row.keys()) and "command" not in row
  reasons = {
    "of a rehearsal": bool(row.get("rehearsal")),
    "not measured but modelled": bool(row.get("expected")) or row.get("measured") is False,
    "failed": isinstance(row.get("error"), str),
    "wrong results": row.get("correct") is False,
    "no timed attention call": not (timed or by_hand),
    "not of a forward pass alone": row.get("direction", "forward") != "forward",
    "without gpu or device": device is None,
    f"of {called}": called != gpu,
  }
  return next((reason for reason, holds in reasons.items() if holds), "")


# ---- one row -------------------------------------------------------------------------------------


def _measurements(row: dict) -> list[Measurement]:
  """Returns a row's timed calls; raises ConfigError naming the row and its wrong field."""
  if "attention_calls" not in row:
    return [_measurement(row)]
  calls = row["attention_calls"]
  if not isinstance(calls, dict) or not all(isinstance(call, dict) for call in calls.values()):
    raise ConfigError(
      f"measured row {row.get('name')!r}: attention_calls must hold an object per timed call, got "
      f"{calls!r}."
    )
  shared = {k: row[k] for k in ("source", "command", "commit", "fit") if k in row}
  found = []
  for part, call in calls.items():
    timing = row.get(part)
    timed = isinstance(timing, dict) and "median_s" in timing
    times = {"seconds": timing["median_s"]} if timed else {}
    found.append(_measurement(shared | times | call | {"name": f"{row.get('name')}: {part}"}))
  return found


def _measurement(row: dict) -> Measurement:
  name = str(row.get("name", "(no name)"))
  try:
    heads = _positive(row, "heads")
    d = _positive(row, "head_dim")
    batch = _positive(row, "batch", 1)
    call = _call(row, heads, d, batch)
    if "seconds" in row:
      seconds = _positive(row, "seconds", whole=False)
    elif "tflops" in row:
      seconds = call.flops / (_positive(row, "tflops", whole=False) * 1e12)
    else:
      raise KeyError("seconds or tflops")
    fit = row.get("fit")
    if not isinstance(fit, bool | None):
      raise ValueError(f"{fit=} must be true or false")
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      f"measured row {name!r} lacks or misstates a field: {error} "
      "(freqformer/simulation/measurements.py lists them)."
    ) from error
  command = ", commit ".join(str(row[k]) for k in ("command", "commit") if k in row)
  return Measurement(
    name,
    seconds,
    call,
    heads * batch,
    fit,
    source=str(row.get("source") or command),
    derived=str(row.get("derived") or ""),
    kernel=str(row.get("implementation") or ""),
  )


def _call(row, heads, d, batch) -> CallCost:
  block = _positive(row, "block_q" if "block_q" in row else "block", 128)
  block_kv = _positive(row, "block_kv", block)
  if "counts" in row:
    call = CallCost(**row["counts"])
    valid = all(math.isfinite(x) and x >= 0 for x in dataclasses.astuple(call))
    if not valid or min(call.pairs, call.items, call.loads, call.head_dim) <= 0:
      raise ValueError(f"counts must be positive, got {row['counts']}")
    return call
  if "method" in row:
    layout = TileLayout.fit(row["grid"], block, row.get("tile"))
    return attention_call(make_method(row["method"]), layout, heads, d).scaled(batch)
  n = _positive(row, "tokens" if "tokens" in row else "n")
  density = row.get("density", 1.0)
  if isinstance(density, bool) or not 0 < density <= 1 + 1e-9:
    raise ValueError(f"{density=} must lie in (0, 1]: scored pairs over all pairs")
  q_tiles = -(-n // block)
  kv_tiles = -(-n // block_kv)
  call = uniform(
    q_tiles, density * kv_tiles, kv_tiles, d, block=block, block_kv=block_kv, heads=heads * batch
  )
  # As many pairs as the density says, whatever the last tiles hold.
  return dataclasses.replace(call, pairs=density * float(n) ** 2 * heads * batch)


def _positive(row, key, default=None, whole=True):
  value = row.get(key, default)
  if value is None:
    raise KeyError(key)
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not math.isfinite(value) or value <= 0 or (whole and value != int(value)):
    raise ValueError(f"{key}={value!r} must be a positive {'whole ' * whole}number")
  return int(value) if whole else float(value)
