"""Draws losses: over steps, FLOPs and seconds of training, and by timestep."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from freqformer.pages.files import Absent, metric_rows, series
from freqformer.pages.html import COLOURS, GREY, facts, image, legend, panels, table
from freqformer.train import alarm

WORK = {"step": "steps", "flops": "training FLOPs", "seconds": "seconds of training"}
VALIDATIONS = {"val": "validation", "val_soft": "validation, soft routing"}
_CURVES = {
  "grad_norm": "gradient norm",
  "router_entropy": "router entropy (nats)",
  "density": "density (scored pairs / n²)",
  "cost": "cost (computed pairs / n²)",
}
_MEDIANS = {
  "mfu": "model FLOPs utilisation",
  "dense_equivalent_mfu": "the same if dense attention's FLOPs had been done (no utilisation)",
  "data_wait": "share of the time in which the loop waits for data",
  "loop": "share of the time in which it waits for neither data nor steps",
}
_BAR = 0.27  # distance of bars that belong together, in units of an axis with steps of 1
_CONSTANT = 1e-3  # choice: a curve that moves by less than this share of its size is no curve


def loss_figure(
  curves: Mapping[str, Sequence[Mapping]], training: Mapping[str, Sequence[Mapping]] | None = None
) -> Figure:
  """Returns a panel per kind of work, with one curve per label.

  Methods that are equal in steps are seldom equal in FLOPs or seconds.

  Args:
    curves: validation lines of metrics.jsonl by label. Lines that lack a kind of work, which
      earlier versions wrote, are left out of its panel.
    training: training lines by label, drawn smoothed and thin, in the colour of their label.
  """
  figure, axes = panels(len(WORK), 9.5, 2.9)
  labels = dict.fromkeys([*curves, *(training or {})])
  colours = dict(zip(labels, np.resize(COLOURS, len(labels)), strict=True))
  for axis, (key, name) in zip(axes, WORK.items(), strict=True):
    for label, rows in (training or {}).items():
      work, losses = series(rows, "loss", key)
      own = "training, smoothed" if len(labels) == len(training) + len(curves) else None
      axis.plot(work, smoothed(losses), lw=0.8, alpha=0.6, color=colours[label], label=own)
    for label, rows in curves.items():
      work, losses = series(rows, "loss", key)
      axis.plot(work, losses, "o-", ms=3, lw=1.2, label=label, color=colours[label])
    axis.set(xlabel=name, xlim=(0, None))
    axis.locator_params("x", nbins=5)
  axes[0].set_ylabel("velocity loss (mean square)")
  figure.legend(
    *axes[0].get_legend_handles_labels(),
    loc="outside upper center",
    ncols=3,
    frameon=False,
    fontsize=8,
  )
  return figure


def smoothed(values: np.ndarray) -> np.ndarray:
  """Returns an exponential mean over about a fifteenth of a curve `[n]`."""
  if not len(values):
    return values
  weights = (1 - 1 / max(1, len(values) / 15)) ** np.arange(len(values))
  return np.convolve(values, weights)[: len(values)] / np.cumsum(weights)


def plain_log(axis: Axes):
  """Makes the vertical axis logarithmic, with ticks as people write them: 0.2, 0.5, 1, 2."""
  axis.set_yscale("log")
  axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
  axis.yaxis.set_minor_formatter(NullFormatter())


def losses(workdir: pathlib.Path) -> str:
  """Shows losses over work, the curves of training, and the run's totals."""
  train = metric_rows(workdir, "train")
  if not train:
    raise Absent("metrics.jsonl has no training line yet.")
  curves = {label: metric_rows(workdir, kind) for kind, label in VALIDATIONS.items()}
  curves = {label: rows for label, rows in curves.items() if rows}
  drawn = dict(curves)
  if len(curves) > 1 and _alike(*curves.values()):
    drawn.popitem()
  found = image(loss_figure(drawn, {"training": train}), "loss over steps, FLOPs and seconds")
  moving, constant = _curves(train)
  if moving:
    found += image(_curve_figure(moving), "curves of training over steps")
  warnings = [
    (f"warning at step {row['step']}", row["text"]) for row in metric_rows(workdir, alarm.KIND)
  ]
  return found + facts([*warnings, *_totals(train, curves), *constant])


def _alike(first: list[dict], second: list[dict]) -> bool:
  """Tells whether two curves would lie on each other, as with levels that are always mixed."""
  losses = [[row["loss"] for row in rows] for rows in (first, second)]
  return len(first) == len(second) and np.allclose(*losses, rtol=_CONSTANT)


def _totals(train: list[dict], curves: Mapping[str, list[dict]]) -> list[tuple]:
  """Returns (name, value) of a run's last losses, its work and its speed."""
  rows = []
  for label, own in curves.items():
    rows.append((f"last {label} loss", f"{own[-1]['loss']:.4g} (step {own[-1]['step']})"))
  _, values = series(train, "loss")
  if len(values):
    rows.append(("training loss, smoothed", float(smoothed(values)[-1])))
  for key, name in (("flops", WORK["flops"]), ("seconds", WORK["seconds"])):
    if key in train[-1]:
      rows.append((name, float(train[-1][key])))
  _, rates = series(train, "steps_per_s")
  if len(rates):
    low, middle, high = np.percentile(rates, (10, 50, 90))
    text = f"{middle:.3g} (median; 80 % of the log's intervals: {low:.3g} to {high:.3g})"
    rows.append(("steps per second", text))
  for key, name in _MEDIANS.items():
    _, values = series(train, key)
    if len(values):
      rows.append((f"{name}, median", float(np.median(values))))
  _, values = series(train, "lr")
  if len(values):
    rows.append(("last learning rate", float(values[-1])))
  skipped = sum(row.get("skipped", 0) > 0 for row in train)
  if skipped:
    rows.append(("lines of the log whose step was not finite and skipped", skipped))
  return rows


def _curves(train: list[dict]) -> tuple[dict[str, tuple], list[tuple]]:
  """Returns the curves of training that move, by name, and the (name, value) of the others."""
  moving = {}
  constant = []
  for key, name in _CURVES.items():
    steps, values = series(train, key)
    if len(values) > 1 and np.ptp(values) > _CONSTANT * np.abs(values).max():
      moving[name] = (steps, values)
    elif len(values):
      constant.append((f"{name}, in all steps", float(values[-1])))
  return moving, constant


def _curve_figure(curves: Mapping[str, tuple]) -> Figure:
  figure, axes = panels(len(curves), max(3.4, 2.4 * len(curves)), 2.3)
  for axis, (name, (steps, values)) in zip(axes, curves.items(), strict=True):
    axis.plot(steps, values, color=GREY, lw=0.9)
    axis.set_title(name, fontsize=9)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if name == _CURVES["grad_norm"] and values.max() > 10 * values.min() > 0:
      plain_log(axis)
    else:
      axis.set_ylim(0, 1.08 * values.max() or None)
  return figure


def by_timestep(workdir: pathlib.Path) -> str:
  """Shows the last validation in each quarter of t, beside the linear predictor and the bound."""
  rows = [row for row in metric_rows(workdir, "val") if row.get("buckets")]
  if not rows:
    raise Absent("metrics.jsonl has no validation line with buckets yet.")
  last = rows[-1]
  bars = {"model": last["buckets"]}
  for row in metric_rows(workdir, "val_soft"):
    soft = row.get("buckets") if row["step"] == last["step"] else None
    if soft and not np.allclose(soft, last["buckets"], rtol=_CONSTANT):
      bars["model, soft routing"] = soft
  colours = dict(zip(bars, COLOURS, strict=False))
  if last.get("linear_buckets"):
    bars["best per-channel linear predictor"] = last["linear_buckets"]
  if last.get("bayes_buckets"):
    bars["Bayes risk, which no model can be below"] = last["bayes_buckets"]
  count = len(last["buckets"])
  labels = time_labels(np.linspace(*last.get("time_range", (0, 1)), count + 1))
  figure, (axis,) = panels(1, 8.5, 2.6)
  for i, (name, values) in enumerate(bars.items()):
    at = np.arange(count) + (i - (len(bars) - 1) / 2) * _BAR
    axis.bar(at, values, 0.25, label=name, color=colours.get(name, GREY))
  axis.set_xticks(range(count), labels)
  title = f"validation at step {last['step']}"
  axis.set(xlabel="t (1 is noise)", ylabel="velocity loss", title=title)
  legend(axis)
  head = ["mean-square velocity error", *(f"t {label}" for label in labels)]
  numbers = [(name, *map(float, values)) for name, values in bars.items()]
  if "density_buckets" in last:
    numbers.append(("density of attention", *map(float, last["density_buckets"])))
  return image(figure, "loss by timestep") + table(head, numbers)


def time_labels(edges: Sequence[float]) -> list[str]:
  """Returns `0 – 0.25`, ... of rising timesteps."""
  return [f"{low:.3g} – {high:.3g}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
