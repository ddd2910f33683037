"""Plots: measured is black and filled, simulated is coloured (hollow marks, lines, bars)."""

import pathlib

import matplotlib
import matplotlib.ticker
from matplotlib.figure import Figure

from freqformer.config import ConfigError

SIMULATED = "#3b6fb6"
MEASURED = "black"
# Colours of a stack of simulated parts, none of them black.
_PARTS = (SIMULATED, "#e0a030", "#4f8f5b", "#c4b5dd")
_LINES = ("-", "--", ":", "-.")
_MARKS = "osD^vPX*<>"


def check_format(path) -> None:
  """Raises ConfigError unless the name's ending is a format that can be drawn."""
  formats = sorted(Figure().canvas.get_supported_filetypes())
  if pathlib.Path(path).suffix[1:].lower() not in formats:
    raise ConfigError(
      f"a plot cannot be written to {path}: its name must end in one of .{', .'.join(formats)}."
    )


def save(figure: Figure, path) -> None:
  """Writes a figure; raises ConfigError where that cannot be done."""
  path = pathlib.Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no hash in the file: the same rows give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "freqformer"}):
      metadata = {"Date": None} if path.suffix == ".svg" else None
      figure.savefig(path, bbox_inches="tight", dpi=130, metadata=metadata)
  except OSError as error:
    raise ConfigError(
      f"the plot cannot be written to {path}: {error.strerror or error}."
    ) from error


def scaling_figure(rows: list[dict]) -> Figure:
  """Draws seconds, device memory traffic and FLOPs per byte of one forward over tokens.

  A line per method, all simulated; rows that were refused have no point.
  """
  figure = Figure(figsize=(13, 3.6), layout="constrained")
  axes = figure.subplots(1, 3)
  rows = [r for r in rows if r["seconds"] is not None]
  names = list(dict.fromkeys(r["method"] for r in rows))
  panels = (
    ("seconds", "seconds per forward"),
    ("hbm_bytes", "device memory, bytes"),
    ("flops_per_byte", "FLOPs per byte"),
  )
  for axis, (key, label) in zip(axes, panels, strict=True):
    for i, name in enumerate(names):
      own = sorted((r["tokens"], r[key]) for r in rows if r["method"] == name)
      x, y = zip(*own, strict=True)
      style = {"ls": _LINES[i % 4], "marker": _MARKS[i % 10], "mfc": "none", "ms": 5, "lw": 1.2}
      axis.plot(x, y, color=f"C{i % 10}", label=f"{name[:32]}: simulated", **style)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
    tokens = sorted({r["tokens"] for r in rows})
    axis.set_xticks(tokens, [_count(n) for n in tokens])
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  axes[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
  of = "{model} on {gpus} x {gpu}".format(**rows[0])
  figure.suptitle(f"{of}: simulated, nothing measured", fontsize=10)
  return figure


def validation_figure(rows: list[dict]) -> Figure:
  """Draws a line for each calibration row in units of its measured seconds: measured is at 1."""
  figure = Figure(figsize=(8, 1.2 + 0.24 * len(rows)), layout="constrained")
  axis = figure.subplots()
  labels = [f"{r['name']}: {1e3 * r['measured_seconds']:.4g} ms" for r in rows]
  axis.axvspan(0.85, 1.15, color="black", alpha=0.06, lw=0, label="within 15 %")
  hollow = {"mfc": "none", "ms": 7}
  looks = {
    "measured": {"marker": "o", "color": MEASURED, "ms": 4},
    "derived from measurements": {"marker": "D", "color": MEASURED, "mfc": "none", "ms": 4},
    "simulated, fitted to this row": {"marker": "s", "color": SIMULATED} | hollow,
    "simulated, not fitted to it": {"marker": "o", "color": SIMULATED} | hollow,
  }
  points = {label: [] for label in looks}
  for i, r in enumerate(rows):
    points["derived from measurements" if r.get("derived") else "measured"].append((1, i))
    fit = "simulated, fitted to this row" if r["fitted"] else "simulated, not fitted to it"
    points[fit].append((r["seconds"] / r["measured_seconds"], i))
  for label, own in points.items():
    if own:
      axis.plot(*zip(*own, strict=True), ls="none", label=label, **looks[label])
  axis.set_yticks(range(len(rows)), labels, fontsize=8)
  axis.invert_yaxis()
  axis.set(xlabel="seconds / measured seconds")
  axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  return figure


def bars(rows: list[dict], title: str) -> Figure:
  """Draws the parts of one forward's time: stacked simulated seconds per method."""
  figure = Figure(figsize=(8.5, 0.9 + 0.42 * len(rows)), layout="constrained")
  axis = figure.subplots()
  left = [0.0] * len(rows)
  labels = [r["method"][:32] for r in rows]
  parts = ("attention_seconds", "around_seconds", "matmul_seconds", "elementwise_seconds")
  for i, part in enumerate(parts):
    values = [r[part] for r in rows]
    name = part.replace("_seconds", "").replace("around", "around attention") + " (simulated)"
    axis.barh(labels, values, left=left, color=_PARTS[i], label=name, edgecolor="white")
    left = [a + b for a, b in zip(left, values, strict=True)]
  axis.invert_yaxis()
  axis.set(xlabel="seconds per forward", title=title)
  axis.legend(frameon=False, fontsize=8)
  return figure


def errors_figure(rows: list[dict]) -> Figure:
  """Draws a point for each head: the largest error / bound of its rows; below 1 all keep theirs."""
  figure = Figure(figsize=(8.5, 3.8), layout="constrained")
  axis = figure.subplots()
  cases = list(dict.fromkeys(r["case"] for r in rows))
  kinds = list(dict.fromkeys(r["kind"] for r in rows))
  for j, kind in enumerate(kinds):
    # Heads lie side by side in their order, so that equal ratios stay visible.
    x = []
    ratios = []
    for i, case in enumerate(cases):
      heads = [r for r in rows if r["kind"] == kind and r["case"] == case]
      centre = i + 0.25 * (j - (len(kinds) - 1) / 2)
      x += [centre + 0.16 * ((k + 0.5) / len(heads) - 0.5) for k in range(len(heads))]
      ratios += [r["closest"]["ratio"] for r in heads]
    label = f"{kind} (measured)"
    axis.plot(x, ratios, _MARKS[j], color=MEASURED, ms=3.5, mew=0, ls="none", label=label)
  axis.axhline(1, color="grey", lw=1, label="the bound")
  axis.set_xticks(range(len(cases)), [n.replace(", ", ",\n") for n in cases], fontsize=8)
  axis.set(yscale="log", ylabel="largest error / bound of a row")
  axis.set_title(
    "Measured, a point per head: below 1 every row of the head keeps its bound", fontsize=10
  )
  axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  return figure


def _count(n: int) -> str:
  for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
    if n % size == 0:
      return f"{n // size}{unit}"
  return f"{n:,}"
