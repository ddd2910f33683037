"""Fits a device's free rates to measured attention calls and reports the error of every row."""

import dataclasses
import math
import statistics

from freqformer.config import ConfigError
from freqformer.simulation.descriptions import Gpu
from freqformer.simulation.measurements import Measurement, load_rows
from freqformer.simulation.roofline import attention_seconds

# Rates that may be fitted, in the order in which they are added while there are rows to tell them
# apart: the factors by which each may move.
_FREE = {
  "attention_flops": (0.1, 10.0),
  "softmax_exposed": (0.01, 3.0),
  "item_s": (0.01, 30.0),
  "l2": (0.1, 10.0),
  "launch_s": (0.01, 30.0),
}
# choice: a rate is fitted only if halving it moves some fitted row by this share
_MATTERS = 0.01
# choice: no rates describe a fitted row that comes out further off than this
_MISSED = 0.15
# Rates that belong to an SM, whatever memory stands behind it.
_SM_RATES = ("attention_flops", "softmax_exposed", "item_s")
_SM_FACTS = ("tensor_flops", "sms", "exp_per_sm_s")


@dataclasses.dataclass(frozen=True)
class Calibration:
  """A fit.

  Attributes:
    gpu: the device with fitted rates; `gpu.fit_warnings`: reasons not to trust them.
    fitted: names of the rates of this fit.
    rows: one per measurement, with the prediction's error.
    notes: rows that were left out or held out.
  """

  gpu: Gpu
  fitted: tuple[str, ...]
  rows: list[dict]
  notes: tuple[str, ...] = ()

  def report(self) -> str:
    """Returns rates, rows and errors for people."""
    rates = ", ".join(f"{name} = {getattr(self.gpu.rates, name):.4g}" for name in self.fitted)
    lines = [
      *self.notes,
      f"{self.gpu.name}: fitted {rates or 'nothing'}; {', '.join(self.gpu.assumed)} assumed",
      f"{'row':<44} {'measured ms':>12} {'simulated ms':>13} {'error':>8}  fitted",
    ]
    for r in self.rows:
      times = (
        f"{1e3 * r['measured_seconds']:>12.4g} {1e3 * r['seconds']:>13.4g} {r['error']:>+8.1%}"
      )
      lines.append(f"{r['name']:<44} {times}  {'yes' if r['fitted'] else 'no'}")
    kernels = {r["implementation"] for r in self.rows}
    for kernel in sorted(kernels):
      own = [r for r in self.rows if r["implementation"] == kernel]
      errors = [abs(r["error"]) for r in own if not r["fitted"]]
      if errors:
        of = f" of {kernel}" if kernel and len(kernels) > 1 else ""
        lines.append(
          f"{len(errors)} rows{of} not fitted: mean error {statistics.mean(errors):.1%}, "
          f"worst {max(errors):.1%}"
        )
    return "\n".join(lines + [f"WARNING: {w}" for w in self.gpu.fit_warnings])


def fit_file(gpu: Gpu, path) -> Calibration:
  """Fits a device to the rows of a file; raises ConfigError as `load_rows` does."""
  measured, notes = load_rows(path, gpu.name)
  return dataclasses.replace(calibrate(gpu, measured), notes=tuple(notes))


def calibrate(
  gpu: Gpu, measured: list[Measurement], free: tuple[str, ...] | None = None
) -> Calibration:
  """Minimises squares of log(simulated / measured) over the rows with `fit`, one rate at a time.

  Args:
    gpu: starting rates; those not fitted stay.
    free: names of rates to fit; default: of `_FREE`, in its order, those that matter to these rows,
      at most one per row.
  """
  rows = [m for m in measured if m.fit]
  if free is None:
    free = tuple(name for name in _FREE if _matters(gpu, rows, name))[: len(rows)]
  best = gpu
  for step in (2.0, 1.3, 1.1, 1.03, 1.01, 1.003, 1.001, 1.0003):
    for _ in range(60):
      before = _loss(best, rows)
      for name in free:
        best = _line_search(best, gpu, rows, name, step)
      if _loss(best, rows) > before * (1 - 1e-6) - 1e-15:
        break
  to = f"{len(rows)} measured rows"
  before = tuple(n for n in gpu.fitted if n not in free)
  best = dataclasses.replace(
    best,
    rates_from=f"Fitted ({', '.join(free)}) to {to}; the other rates as before: {gpu.rates_from}",
    fitted=before + free,
    fitted_to=f"{to} (before: {gpu.fitted_to})" if before else to,
    fit_warnings=(*_limits(best, gpu, free), *_misses(best, rows)),
  )
  return Calibration(best, free, [_row(best, m) for m in measured])


def carry_over(fitted: Gpu, to: Gpu) -> Gpu:
  """Returns a device with the SMs' rates of a fitted one; memory and links stay its own.

  Clocks are taken to be the same, too: the data sheets say nothing else, and no measurement of `to`
  is involved.

  Raises:
    ConfigError: if the SMs differ by their descriptions.
  """
  differs = [f for f in _SM_FACTS if getattr(fitted, f) != getattr(to, f)]
  if differs:
    raise ConfigError(
      f"rates of {fitted.name} say nothing about {to.name}: {', '.join(differs)} differ."
    )
  names = tuple(n for n in _SM_RATES if n in fitted.fitted)
  return dataclasses.replace(
    to,
    rates=dataclasses.replace(to.rates, **{n: getattr(fitted.rates, n) for n in names}),
    rates_from=f"{', '.join(names)}: carried over from {fitted.name}, whose SMs are the same. "
    f"The others: {to.rates_from}",
    fitted=names,
    fitted_to=f"{fitted.fitted_to} of {fitted.name}, which has the same SMs",
    fit_warnings=fitted.fit_warnings,
  )


def _limits(gpu, start, names) -> list[str]:
  """Lists rates on a limit of their search: not determined by the rows, or the model is wrong."""
  values = {name: getattr(gpu.rates, name) for name in names}
  return [
    f"{name} ended on the limit of its search, {value:.4g}"
    for name, value in values.items()
    if any(math.isclose(value, limit, rel_tol=1e-6) for limit in _range(start, name))
  ]


def _misses(gpu, rows) -> list[str]:
  """Says how many fitted rows are missed all the same."""
  missed = [r for r in (_row(gpu, m) for m in rows) if abs(r["error"]) > _MISSED]
  if not missed:
    return []
  worst = max(missed, key=lambda r: abs(r["error"]))
  return [
    f"{len(missed)} of {len(rows)} fitted rows are missed by more than {_MISSED:.0%}; the worst is "
    f"{worst['name']}, {worst['error']:+.1%}"
  ]


def _range(start, name) -> tuple[float, float]:
  low, high = (factor * max(getattr(start.rates, name), 1e-9) for factor in _FREE[name])
  return low, min(high, start.tensor_flops) if name == "attention_flops" else high


def _line_search(best, start, rows, name, step):
  low, high = _range(start, name)
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
    "measured": False,  # of `seconds`
    "error": seconds / m.seconds - 1,
    "fitted": m.fit,
    "implementation": m.kernel,
    "derived": m.derived,
    "source": m.source,
    "rates_fitted": list(gpu.fitted),
    "rates_assumed": list(gpu.assumed),
    "rates_warnings": list(gpu.fit_warnings),
  }
