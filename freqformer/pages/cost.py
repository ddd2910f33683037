"""Counts what a run costs against dense attention, and shows it beside the seconds it took."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from freqformer.cost import Cost, sampling_cost, step_cost
from freqformer.pages.files import json_if_any, metric_rows, read_json, series
from freqformer.pages.html import COLOURS, GREY, absent, image, legend, panels, table
from freqformer.train.experiment import Experiment

_UNITS = {1e15: "PFLOP", 1e12: "TFLOP", 1e9: "GFLOP", 1e6: "MFLOP"}
_STAGES = {
  "training": "training: a step of one sample, forward and backward",
  "sampling": "sampling: one sample, all steps",
}
_SAME = (
  "steps",
  "sampler",
  "guidance",
  "guidance_interval",
  "latent_shape",
  "samples",
  "batch_size",
  "device",
)
_BAR = 0.27


def counted(exp: Experiment) -> dict:
  """Returns FLOPs of a run's own attention and of dense attention, as plain JSON.

  Sampling is the run that `exp.sample` asks for, with the evaluations and layers that
  `attention.schedule` makes dense.

  Returns:
    `{"training" | "sampling": {"own" | "dense": {"attention_flops", "total_flops"}}}`, of one
    sample, as `freqformer.cost` counts; and "method".

  Raises:
    ConfigError: a schedule does not fit so many evaluations.
  """
  shape = exp.latent_shape
  models = {"own": exp.model, "dense": exp.model.with_method("dense")}
  schedule = exp.model.phases(len(exp.sample.guided()))
  found = {"method": exp.model.attention.method}
  for stage in _STAGES:
    found[stage] = {}
    for name, model in models.items():
      if stage == "training":
        cost = _mean_step(exp) if name == "own" else step_cost(model, shape)
      else:
        phases = schedule if name == "own" else [("",) * len(step) for step in schedule]
        cost = sampling_cost(model, shape, phases, exp.sample.guided())
      found[stage][name] = {"attention_flops": cost.attention_flops, "total_flops": cost.total}
  return found


def _mean_step(exp: Experiment) -> Cost:
  """Returns a training step of one sample, the mean over a run whose layers are dense at first."""
  total = Cost()
  for steps, dense in exp.train.stages(exp.model.depth):
    own = step_cost(exp.model, exp.latent_shape, dense=dense, **exp.train.counted)
    total += own.scaled(steps / exp.train.steps)
  return total


def cost(workdir: pathlib.Path) -> str:
  """Shows counted FLOPs and measured seconds, in training and in sampling, and densities."""
  found = read_json(workdir, "cost.json")
  bars = {_STAGES[stage].split(":")[0]: _ratios(found[stage]) for stage in _STAGES}
  seconds = _seconds(workdir)
  for stage, _, own, dense, _ in seconds:
    if dense:
      bars[stage].setdefault("seconds", own / dense)
  flops = [_flop_row(found, stage) for stage in _STAGES]
  unit, scale = _unit(max(row[3] for row in flops))
  head = ["counted FLOPs", f"attention, {unit}", "of dense", f"all, {unit}", "of dense"]
  for row in flops:
    row[1] /= scale
    row[3] /= scale
  text = image(_chart(bars), "cost relative to dense attention") + table(head, flops)
  if seconds:
    head = ["measured seconds", "", found["method"], "dense", "of dense", "how"]
    lines = []
    for stage, name, own, dense, how in seconds:
      lines.append([stage, name, own, dense, own / dense if dense else None, how])
    text += table(head, lines)
  if not any(dense for _, _, _, dense, _ in seconds):
    text += absent(
      "Seconds of dense attention were not measured; `python -m freqformer.report --workdir=RUN "
      "--time_dense` does it on this device."
    )
  densities = _densities(workdir)
  return text + (table(["density (scored pairs / n²), as run", ""], densities) if densities else "")


def _ratios(stage: dict) -> dict[str, float]:
  """Returns FLOPs over dense attention's, by what they are of."""
  own = stage["own"]
  dense = stage["dense"]
  return {
    "attention FLOPs": own["attention_flops"] / dense["attention_flops"],
    "all FLOPs": own["total_flops"] / dense["total_flops"],
  }


def _flop_row(found: dict, stage: str) -> list:
  own = found[stage]["own"]
  ratios = _ratios(found[stage])
  return [
    _STAGES[stage],
    own["attention_flops"],
    ratios["attention FLOPs"],
    own["total_flops"],
    ratios["all FLOPs"],
  ]


def _unit(most: float) -> tuple[str, float]:
  """Returns the unit of FLOPs in which `most` is at least 1, and its size."""
  scale = next((scale for scale in _UNITS if most >= scale), 1e6)
  return _UNITS[scale], scale


def _seconds(workdir: pathlib.Path) -> list[tuple]:
  """Returns (stage, of what, own seconds, dense seconds or None, how measured), the best first."""
  rows = []
  timed = json_if_any(workdir, "seconds.json")
  for stage in _STAGES:
    if stage in timed:
      own = timed[stage]
      how = f"one after the other, {own['of']}; {timed['device']}"
      rows.append((stage, own["unit"], own["own"], own["dense"], how))
  _, rates = series(metric_rows(workdir, "train"), "steps_per_s")
  if len(rates):
    device = json_if_any(workdir, "run.json").get("device", "")
    how = f"while it trained, median of the log; {device}"
    rows.append(("training", "a step", float(1 / np.median(rates)), None, how))
  own = json_if_any(workdir, "samples/sampling.json")
  if "seconds_per_sample" in own:
    dense = json_if_any(workdir, "samples-dense/sampling.json")
    alike = all(own.get(key) == dense.get(key) for key in _SAME)
    other = dense.get("seconds_per_sample") if alike else None
    how = f"by eval.py, {own.get('samples')} samples; {own.get('device', '')}"
    rows.append(("sampling", "a sample", own["seconds_per_sample"], other, how))
  return rows


def _densities(workdir: pathlib.Path) -> list[tuple]:
  """Returns (when, density) as measured, the mean over layers and heads."""
  rows = []
  _, values = series(metric_rows(workdir, "train"), "density")
  if len(values):
    rows.append(("training, last step", float(values[-1])))
  _, values = series(metric_rows(workdir, "val"), "density")
  if len(values):
    rows.append(("last validation", float(values[-1])))
  steps = json_if_any(workdir, "samples/sampling.json").get("density_by_step")
  if steps:
    rows.append(("sampling, mean over steps", float(np.mean(steps))))
  return rows


def _chart(bars: dict[str, dict[str, float]]) -> Figure:
  """Draws bars of the run's cost over dense attention's, training and sampling apart."""
  kinds = list(dict.fromkeys(kind for own in bars.values() for kind in own))
  figure, (axis,) = panels(1, 7.5, 2.2)
  for i, kind in enumerate(kinds):
    stages = [stage for stage in bars if kind in bars[stage]]
    at = [list(bars).index(stage) + (i - (len(kinds) - 1) / 2) * _BAR for stage in stages]
    shares = [bars[stage][kind] for stage in stages]
    drawn = axis.barh(at, shares, 0.25, label=kind, color=COLOURS[i])
    axis.bar_label(drawn, [f"{share:.2f}" for share in shares], padding=3, fontsize=8)
  axis.set_yticks(range(len(bars)), list(bars))
  axis.axvline(1, color=GREY, lw=0.8, ls="--")
  axis.invert_yaxis()
  axis.set(xlabel="relative to dense attention (less is cheaper)")
  legend(axis)
  return figure
