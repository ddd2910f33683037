"""Writes one HTML file that shows a run: samples, losses, routing, cost. It needs no network.

  python -m freqformer.report --workdir=runs/demo

Each section reads some files of the run and names them. A section whose file is absent says so, and
the others are shown.
"""

import html
import json
import pathlib
from collections.abc import Callable

import numpy as np
from absl import logging
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from freqformer.command import cli
from freqformer.config import ConfigError
from freqformer.evaluate.record_masks import heat
from freqformer.pages.html import (
  absent,
  facts,
  image,
  page,
  panels,
  plain_facts,
  section,
  table,
  video,
)
from freqformer.pages.losses import loss_figure
from freqformer.train.metrics import read
from freqformer.train.resume import change_text

_COLOURS = ("#3b6fb6", "#e0a030", "#b5483f", "#4f8f5b", "#7a5ca8", "#6b7280")
_GREY = _COLOURS[-1]
_MAX_CLASSES = 24  # videos are embedded: all classes of UCF-101 would make tens of megabytes
_MAX_NAMES = 64  # rows of a heatmap that can each carry a name
_ROUTER = {
  "router_entropy": "router entropy (nats)",
  "density": "density (scored pairs / n²)",
  "cost": "cost (computed pairs / n²)",
}
_LAST = {
  "loss": "last training loss",
  "lr": "last learning rate",
  "steps_per_s": "steps per second",
}
_VALIDATIONS = {"val": "validation", "val_soft": "validation, soft routing"}
_BAR = 0.27  # distance of bars that belong together, in units of an axis with steps of 1


class Absent(Exception):
  """A section cannot be shown; the message says why and is shown instead."""


def _missing(name: str, writer: str) -> Absent:
  return Absent(f"this run has no {name} (written by {writer}).")


def _read_json(workdir: pathlib.Path, name: str, writer: str = "train.py"):
  """Reads a JSON file of the run; raises Absent if it is not there, or not JSON."""
  path = workdir / name
  if not path.exists():
    raise _missing(name, writer)
  try:
    return json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise Absent(f"{name} is not valid JSON ({error}).") from error


def _metric_rows(workdir: pathlib.Path, kind: str) -> list[dict]:
  """Returns the lines of metrics.jsonl of a kind: train, val or val_soft."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    raise _missing("metrics.jsonl", "train.py")
  return [row for row in read(path) if row["kind"] == kind]


def _series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps and finite values of a key, `[n]` both."""
  pairs = np.array([(row["step"], row[key]) for row in rows if key in row], np.float64)
  pairs = pairs.reshape(-1, 2)
  return tuple(pairs[np.isfinite(pairs[:, 1])].T)


# Source, intro and function of each section, by title.
SECTIONS: dict[str, tuple[str, str, Callable[[pathlib.Path], str]]] = {}


def shown(title: str, source: str, intro: str) -> Callable:
  """Makes a section of the decorated function, which makes HTML from the run's folder.

  `source` names the files of the run that it shows, `intro` is one sentence.
  """

  def register(body: Callable[[pathlib.Path], str]):
    SECTIONS[title] = (source, intro, body)
    return body

  return register


def _show(workdir: pathlib.Path, title: str) -> str:
  """Returns a section; if its function fails, the reason is shown in its place."""
  source, intro, body = SECTIONS[title]
  try:
    inner = body(workdir)
  except Absent as reason:
    inner = absent(f"Not shown: {reason}")
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    logging.exception("the report's section %r cannot be drawn", title)
    inner = absent(f"Not shown: {source} has another form than expected ({error!r}).")
  return section(title, intro, inner, source)


def write_report(workdir) -> pathlib.Path:
  """Writes `<workdir>/report.html` from what the run has written so far and returns its path.

  Raises:
    ConfigError: `workdir` is no folder.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise ConfigError(f"{workdir} is no folder; give --workdir the folder of a run.")
  title = f"FreqFormer run: {workdir.resolve().name}"
  path = workdir / "report.html"
  sections = [_show(workdir, name) for name in SECTIONS]
  path.write_text(page(title, sections), encoding="utf-8")
  return path


_RUN_NAMES = {
  "method": "attention method",
  "device": "device",
  "git": "git revision",
  "params": "parameters",
  "tokens": "tokens per clip",
  "tiles": "tiles",
  "grid": "grid, t × y × x tokens",
  "tile": "tile, t × y × x tokens",
}


@shown("Run", "run.json", "What ran, on what, and how long each part took.")
def _run(workdir: pathlib.Path) -> str:
  run = {"seconds": {}, "versions": {}, "changes": [], **_read_json(workdir, "run.json")}
  rows = []
  if run.get("finished") is False:
    rows.append(("state", "training has not finished"))
  rows += [(name, run[key]) for key, name in _RUN_NAMES.items() if key in run]
  rows += [(f"{name}, seconds", float(value)) for name, value in run["seconds"].items()]
  if run["versions"]:
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items())))
  for change in run["changes"]:
    rows.append((f"config changed at step {change['step']}", change_text(change["keys"])))
  return facts(rows)


@shown(
  "Samples",
  "samples/ and real/",
  "Generated | a real training clip of the class (through the codec).",
)
def _samples(workdir: pathlib.Path) -> str:
  names = sorted(path.stem for path in (workdir / "samples").glob("*.mp4"))
  if not names:
    raise _missing("samples/*.mp4", "eval.py")
  cards = []
  for name in names[:_MAX_CLASSES]:
    generated = video(workdir / "samples" / f"{name}.mp4", "generated")
    clip = workdir / "real" / f"{name}.mp4"
    real = video(clip, "real") if clip.exists() else '<span class="absent">no clip</span>'
    pair = f'<div class="pair">{generated}{real}</div>'
    cards.append(f"<div><b>{html.escape(name)}</b>{pair}</div>")
  found = f'<div class="clips">{"".join(cards)}</div>'
  if len(names) > _MAX_CLASSES:
    found += f"<p>{len(names) - _MAX_CLASSES} further classes are in samples/.</p>"
  if (workdir / "samples" / "sampling.json").exists():
    details = facts(plain_facts(_read_json(workdir, "samples/sampling.json")))
    found += f"<details><summary>How they were sampled</summary>{details}</details>"
  return found


@shown("Losses", "metrics.jsonl", "The velocity error in training and on held-out clips.")
def _losses(workdir: pathlib.Path) -> str:
  train = _metric_rows(workdir, "train")
  if not train:
    raise Absent("metrics.jsonl has no training line yet.")
  figure, (left, right) = panels(2)
  steps, loss = _series(train, "loss")
  left.plot(steps, loss, color=_COLOURS[0], alpha=0.3, lw=0.8, label="train")
  if len(loss):
    weights = (1 - 1 / max(1, len(loss) / 15)) ** np.arange(len(loss))  # of an exponential mean
    smooth = np.convolve(loss, weights)[: len(loss)] / np.cumsum(weights)
    left.plot(steps, smooth, color=_COLOURS[0], label="train, smoothed")
  for colour, (kind, label) in zip(_COLOURS[2:0:-1], _VALIDATIONS.items(), strict=True):
    steps, loss = _series(_metric_rows(workdir, kind), "loss")
    if len(steps):
      left.plot(steps, loss, "o-", ms=4, color=colour, label=label)
  left.set(xlabel="step", ylabel="velocity loss (mean square)")
  left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
  right.plot(*_series(train, "grad_norm"), color=_GREY, lw=0.9)
  right.set(xlabel="step", ylabel="gradient norm", yscale="log")
  for axis in (left, right):
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
  last = []
  for key, name in _LAST.items():
    _, values = _series(train, key)
    if len(values):
      last.append((name, float(values[-1])))
  return image(figure, "loss over steps") + facts(last)


@shown(
  "Loss over work",
  "metrics.jsonl",
  "Compare methods at equal FLOPs or seconds of training as well as at equal steps.",
)
def _work(workdir: pathlib.Path) -> str:
  curves = {label: _metric_rows(workdir, kind) for kind, label in _VALIDATIONS.items()}
  curves = {label: rows for label, rows in curves.items() if rows}
  if not curves:
    raise Absent("metrics.jsonl has no validation line yet.")
  last = _metric_rows(workdir, "train")[-1:]
  names = {"flops": "training FLOPs", "seconds": "seconds of training"}
  work = [(name, row[key]) for row in last for key, name in names.items() if key in row]
  return image(loss_figure(curves), "validation loss over steps, FLOPs and seconds") + facts(work)


@shown(
  "Loss by timestep",
  "metrics.jsonl",
  "A model no better than the linear predictor has learned only channel statistics.",
)
def _buckets(workdir: pathlib.Path) -> str:
  rows = [row for row in _metric_rows(workdir, "val") if row.get("buckets")]
  if not rows:
    raise Absent("metrics.jsonl has no validation line with buckets yet.")
  last = rows[-1]
  bars = {"model": last["buckets"]}
  for row in _metric_rows(workdir, "val_soft"):
    if row["step"] == last["step"] and row.get("buckets"):
      bars.setdefault("model, soft routing", row["buckets"])
  colours = dict(zip(bars, _COLOURS, strict=False))
  if last.get("linear_buckets"):
    bars["best per-channel linear predictor"] = last["linear_buckets"]
  if last.get("bayes_buckets"):
    bars["Bayes risk, which no model can be below"] = last["bayes_buckets"]
  count = len(last["buckets"])
  edges = np.linspace(*last.get("time_range", (0, 1)), count + 1)
  labels = [f"{low:.3g} – {high:.3g}" for low, high in zip(edges, edges[1:], strict=False)]
  figure, (axis,) = panels(1, 8.5)
  for i, (name, values) in enumerate(bars.items()):
    at = np.arange(count) + (i - (len(bars) - 1) / 2) * _BAR
    axis.bar(at, values, 0.25, label=name, color=colours.get(name, _GREY))
  axis.set_xticks(range(count), labels)
  title = f"validation at step {last['step']}"
  axis.set(xlabel="t (1 is noise)", ylabel="velocity loss", title=title)
  _legend(axis)
  head = ["mean-square velocity error", *(f"t {label}" for label in labels)]
  numbers = [(name, *map(float, values)) for name, values in bars.items()]
  if "density_buckets" in last:
    numbers.append(("density of attention", *map(float, last["density_buckets"])))
  return image(figure, "loss by timestep") + table(head, numbers)


@shown(
  "Router in training",
  "metrics.jsonl",
  "Entropy 0: heads are decided. Density is the chosen branches, cost all that ran.",
)
def _router(workdir: pathlib.Path) -> str:
  rows = _metric_rows(workdir, "train")
  curves = {label: _series(rows, key) for key, label in _ROUTER.items()}
  curves = {label: curve for label, curve in curves.items() if len(curve[0])}
  if not curves:
    raise Absent("no training line has router_entropy, density or cost.")
  figure, axes = panels(len(curves), 3.3 * len(curves), 2.7)
  for axis, (label, (steps, values)), colour in zip(axes, curves.items(), _COLOURS, strict=False):
    axis.plot(steps, values, color=colour, lw=1.2)
    axis.set(xlabel="step", title=label)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_ylim(0, 1.08 * values.max() or None)
  return image(figure, "router entropy, density and cost over steps")


def heatmap(routing: dict) -> Figure:
  """Draws a panel per quarter of t, with a row per layer.head and a column per branch."""
  probs = np.array(routing["probs"])  # [layers, buckets, heads, branches]
  layers, buckets, heads, branches = probs.shape
  rows = layers * heads
  ticks = range(0, rows, -(-rows // _MAX_NAMES))
  figure, axes = panels(buckets, 1.2 + 1.9 * buckets, min(14, 1.3 + 0.17 * rows))
  for i, axis in enumerate(axes):
    shown = heat(axis, probs[:, i].reshape(rows, branches), heads)
    axis.set_xticks(range(branches), routing["branches"])
    axis.set_yticks(ticks, [f"{row // heads}.{row % heads}" for row in ticks], fontsize=7)
    axis.set_title("t {:g} – {:g}".format(*routing["bucket_edges"][i : i + 2]), fontsize=10)
    axis.label_outer()
  figure.colorbar(shown, ax=list(axes), label="mean probability", fraction=0.03, pad=0.01)
  return figure


@shown(
  "Routing",
  "routing.json",
  "Which branch each head is given, or what its levels weigh, by timestep: t near 1 is noise.",
)
def _routing(workdir: pathlib.Path) -> str:
  writer = "train.py, at a validation, of a method with a router"
  routing = _read_json(workdir, "routing.json", writer)
  names = routing["branches"]
  edges = routing["bucket_edges"]
  labels = [f"{low:g} – {high:g}" for low, high in zip(edges, edges[1:], strict=False)]
  kinds = {"probs": "mean soft probability", "choice": "share of heads by hard choice"}
  figure, axes = panels(2, 8.5, 2.8)
  for axis, (key, title) in zip(axes, kinds.items(), strict=True):
    share = np.mean(routing[key], (0, 2))  # [buckets, branches]
    below = np.zeros(len(share))
    for branch, name in enumerate(names):
      colour = _COLOURS[branch % len(_COLOURS)]
      axis.bar(labels, share[:, branch], 0.7, bottom=below, label=name, color=colour)
      below = below + share[:, branch]
    axis.set(xlabel="t (1 is noise)", title=title, ylim=(0, 1))
  _legend(axes[1])
  shares = np.mean(routing["probs"], (0, 2))
  rows = [(f"t {t}", *map(float, share)) for t, share in zip(labels, shares, strict=True)]
  pictures = image(heatmap(routing), "routing heatmap") + image(figure, "allocation over timesteps")
  return pictures + table(["mean probability", *names], rows)


_COST_BARS = {
  "attention_flops": "attention FLOPs",
  "layer_ms": "layer time",
  "attention_ms": "attention time",
}
_FLOP_UNITS = {1e12: "TFLOP", 1e9: "GFLOP", 1e6: "MFLOP"}


@shown("Cost", "cost.json", "What attention costs, counted and, where a time is given, measured.")
def _cost(workdir: pathlib.Path) -> str:
  rows = _read_json(workdir, "cost.json", "make demo")
  most = max(row["attention_flops"] + row["linear_flops"] for row in rows)
  scale = next((scale for scale in _FLOP_UNITS if most >= scale), 1e6)
  unit = _FLOP_UNITS[scale]
  head = ["method", f"attention, {unit}", f"linear, {unit}", "density", "sparsity"]
  head += ["layer, ms", "attention, ms", "note"]
  numbers = []
  for row in rows:
    flops = [row["attention_flops"] / scale, row["linear_flops"] / scale]
    density = float(row["density"])
    measured = [row.get("layer_ms"), row.get("attention_ms"), row.get("note") or ""]
    numbers.append([row["method"], *flops, density, 1 - density, *measured])
  found = table(head, numbers)
  dense = next((row for row in rows if row["method"] == "dense"), None)
  if dense is None:
    return found + absent("No chart: cost.json has no row named dense to compare with.")
  return image(_cost_chart(rows, dense), "cost relative to dense") + found


def _cost_chart(rows: list[dict], dense: dict) -> Figure:
  """Draws bars of each method's cost over dense attention's."""
  kinds = {key: label for key, label in _COST_BARS.items() if dense.get(key)}
  figure, (axis,) = panels(1, 7.5, 1.1 + 0.55 * len(rows))
  for i, (key, label) in enumerate(kinds.items()):
    at = np.arange(len(rows)) + (i - (len(kinds) - 1) / 2) * _BAR
    shares = [(row.get(key) or 0) / dense[key] for row in rows]
    texts = [f"{share:.2f}" if share else "not timed" for share in shares]
    bars = axis.barh(at, shares, 0.25, label=label, color=_COLOURS[i])
    axis.bar_label(bars, texts, padding=3, fontsize=8)
  axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
  axis.axvline(1, color=_GREY, lw=0.8, ls="--")
  axis.invert_yaxis()
  axis.set(xlabel="relative to dense (less is cheaper)")
  _legend(axis)
  return figure


@shown(
  "Evaluation",
  "evaluation.json",
  "Artefacts: 1 is as in real clips. Seams: differences across attention's tiles over elsewhere; "
  "flicker: energy above half the temporal Nyquist frequency over that of validation clips.",
)
def _evaluation(workdir: pathlib.Path) -> str:
  found = _read_json(workdir, "evaluation.json", "make demo")
  rows = [
    (name, result["count"], *result["seam_ratio"], result["flicker"])
    for name, result in found.items()
  ]
  return table(["clips", "count", "seams in t", "in y", "in x", "flicker"], rows)


@shown("Config", "config.json", "Every setting of the run.")
def _config(workdir: pathlib.Path) -> str:
  text = html.escape(json.dumps(_read_json(workdir, "config.json"), indent=2))
  return f"<details><summary>Show the full config</summary><pre>{text}</pre></details>"


def _legend(axis: Axes):
  axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
  # Not at import: other commands have a --workdir of their own.
  from absl import flags

  _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
  cli.run(lambda _: print(write_report(_WORKDIR.value)))
