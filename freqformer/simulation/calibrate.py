"""Fits a device's free rates to measured attention calls, and says how wrong every row comes out, the fitted and the others.

A row of measurements is a JSON object with

  name, gpu, heads, head_dim, seconds (or tflops, by useful FLOPs), source
  tokens (or n), and density (default 1: every query tile lists that share of the key tiles), or
  method, grid and, if need be, tile: the lists that the method makes of that grid
  block (or block_q; default 128), batch (default 1), fit (true: may be fitted to; default true)

so that rows of `benchmarks/attention.py --device=gpu` (forward only) are taken as they are.
"""

import dataclasses
import json
import math
import pathlib
import statistics

from freqformer.config import ConfigError
from freqformer.cost import method_call
from freqformer.layout import TileLayout
from freqformer.simulation.descriptions import Gpu
from freqformer.simulation.forward import make_method
from freqformer.simulation.roofline import attention_seconds
from kernels.cost import CallCost, uniform

# In the order in which they are added while there are rows to tell them apart, and how far each may move.
_FREE = {
  "attention_flops": (0.1, 10.0),
  "softmax_exposed": (0.01, 3.0),
  "item_s": (0.01, 30.0),
  "l2": (0.1, 10.0),
  "launch_s": (0.01, 30.0),
}
_MATTERS = 0.01  # a rate is fitted only if doubling it moves some fitted row by this share


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One measured call."""

  name: str
  seconds: float
  call: CallCost
  heads: float
  fit: bool
  source: str


@dataclasses.dataclass(frozen=True)
class Calibration:
  """The device with fitted rates, which rates those are, and a row per measurement with the prediction's error."""

  gpu: Gpu
  fitted: tuple[str, ...]
  rows: list[dict]

  def worst(self, fitted: bool) -> float:
    """Largest absolute relative error of the fitted, or of the other rows; 0 if there are none."""
    return max((abs(r["error"]) for r in self.rows if r["fitted"] == fitted), default=0.0)

  def report(self) -> str:
    """For people."""
    rates = ", ".join(f"{name} = {getattr(self.gpu.rates, name):.4g}" for name in self.fitted)
    lines = [
      f"{self.gpu.name}: fitted {rates or 'nothing'}",
      f"{'row':<44} {'measured ms':>12} {'simulated ms':>13} {'error':>8}  fitted",
    ]
    for r in self.rows:
      times = f"{1e3 * r['measured_seconds']:>12.4g} {1e3 * r['seconds']:>13.4g} {r['error']:>+8.1%}"
      lines.append(f"{r['name']:<44} {times}  {'yes' if r['fitted'] else 'no'}")
    errors = [abs(r["error"]) for r in self.rows if not r["fitted"]]
    if errors:
      lines.append(f"{len(errors)} rows not fitted: mean error {statistics.mean(errors):.1%}, worst {max(errors):.1%}")
    return "\n".join(lines)


def load_rows(path, gpu: str) -> list[Measurement]:
  """The rows of one device in a JSON file.

  Raises:
    ConfigError: for a file that is absent or no list of rows, or a row without a needed field (names it).
  """
  try:
    rows = json.loads(pathlib.Path(path).read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(f"--calibrate={path} cannot be read as JSON rows: {error}") from error
  if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
    raise ConfigError(f"--calibrate={path} must be a JSON list of objects, one per measured call.")
  found = [measurement(r) for r in rows if r.get("gpu", gpu) == gpu and r.get("direction", "forward") == "forward"]
  if not any(m.fit for m in found):
    devices = sorted({str(r.get("gpu")) for r in rows})
    raise ConfigError(f"{path} has no row of {gpu} to fit to (its rows are of {', '.join(devices)}); choose --gpu accordingly.")
  return found


def measurement(row: dict) -> Measurement:
  """A row as the call that was measured; raises ConfigError naming the row and what it lacks."""
  name = str(row.get("name", "(no name)"))
  try:
    heads, d, block = int(row["heads"]), int(row["head_dim"]), int(row.get("block_q", row.get("block", 128)))
    samples = heads * int(row.get("batch", 1))
    if "method" in row:
      layout = TileLayout.fit(row["grid"], block, row.get("tile"))
      call = method_call(make_method(row["method"]), layout, heads, d)
    else:
      n = int(row["tokens"] if "tokens" in row else row["n"])
      tiles, density = -(-n // block), float(row.get("density", 1.0))
      call = uniform(tiles, density * tiles, tiles, d, block=block, fill=n / (tiles * block), heads=samples)
    seconds = float(row["seconds"]) if "seconds" in row else call.flops / (float(row["tflops"]) * 1e12)
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      f"measured row {name!r} lacks or misstates a field: {error} (freqformer/simulation/calibrate.py lists them)."
    ) from error
  if not (seconds > 0 and math.isfinite(seconds)):
    raise ConfigError(f"measured row {name!r}: {seconds=} must be positive.")
  return Measurement(name, seconds, call, samples, bool(row.get("fit", True)), str(row.get("source", "")))


def calibrate(gpu: Gpu, measured: list[Measurement], free: tuple[str, ...] | None = None) -> Calibration:
  """Least squares of log(simulated / measured) over the rows with `fit`, one rate at a time until nothing moves.

  Args:
    gpu: where the rates start; those not fitted stay.
    measured: of `load_rows`.
    free: names of rates to fit; default: of `_FREE`, in its order, those that matter to these rows, at most one per row.
  """
  rows = [m for m in measured if m.fit]
  names = tuple(n for n in _FREE if _matters(gpu, rows, n))[: len(rows)] if free is None else free
  best = gpu
  for step in (2.0, 1.3, 1.1, 1.03, 1.01, 1.003, 1.001, 1.0003):
    for _ in range(60):
      before = _loss(best, rows)
      for name in names:
        best = _line_search(best, gpu, rows, name, step)
      if _loss(best, rows) > before * (1 - 1e-6) - 1e-15:
        break
  changed = f"Fitted ({', '.join(names)}) to {len(rows)} measured rows; the other rates as before: {gpu.rates_from}"
  best = dataclasses.replace(best, rates_from=changed, calibrated=True)
  found = [_row(best, m) for m in measured]
  return Calibration(best, names, found)


def _line_search(best, start, rows, name, step):
  low, high = (factor * max(getattr(start.rates, name), 1e-9) for factor in _FREE[name])
  high = min(high, start.tensor_flops) if name == "attention_flops" else high
  for factor in (step, 1 / step):
    while True:
      value = getattr(best.rates, name) * factor
      moved = _with(best, name, min(max(value, low), high))
      if _loss(moved, rows) >= _loss(best, rows):
        break
      best = moved
  return best


def _with(gpu, name, value):
  return dataclasses.replace(gpu, rates=dataclasses.replace(gpu.rates, **{name: value}))


def _predict(gpu, m):
  return attention_seconds(m.call, gpu, m.heads).total


def _loss(gpu, rows):
  return sum(math.log(_predict(gpu, m) / m.seconds) ** 2 for m in rows)


def _matters(gpu, rows, name):
  """Whether some row depends on the rate, halved or doubled."""
  halved = _with(gpu, name, getattr(gpu.rates, name) / 2)
  return any(abs(_predict(halved, m) / _predict(gpu, m) - 1) > _MATTERS for m in rows)


def _row(gpu, m):
  seconds = _predict(gpu, m)
  return {
    "name": m.name,
    "gpu": gpu.name,
    "attention_flops": m.call.flops,
    "measured_seconds": m.seconds,
    "seconds": seconds,
    "measured": False,
    "error": seconds / m.seconds - 1,
    "fitted": m.fit,
    "source": m.source,
  }
