"""Plots. One rule for all: simulated is blue and hollow, measured is orange and solid, and the legend says which is which."""

import pathlib

import matplotlib
import matplotlib.ticker
from matplotlib.figure import Figure

SIMULATED, MEASURED = "#3b6fb6", "#e07b20"
_LINES = ("-", "--", ":", "-.")
_MARKS = "osD^vPX*<>"


def _save(figure: Figure, path):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # No date and no hash in the file: the same rows give the same bytes.
  with matplotlib.rc_context({"svg.hashsalt": "freqformer"}):
    figure.savefig(path, bbox_inches="tight", dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def _axes(count, width, height=3.6):
  figure = Figure(figsize=(width, height), layout="constrained")
  return figure, figure.subplots(1, count, squeeze=False)[0]


def scaling_plot(rows: list[dict], path, title: str | None = None):
  """Seconds, device memory traffic and FLOPs per byte of one forward over tokens: a line per method, all simulated."""
  figure, axes = _axes(3, 13)
  names = list(dict.fromkeys(r["method"] for r in rows))
  panels = (("seconds", "seconds per forward"), ("hbm_bytes", "device memory, bytes"), ("flops_per_byte", "FLOPs per byte"))
  for axis, (key, label) in zip(axes, panels, strict=True):
    for i, name in enumerate(names):
      own = sorted((r["tokens"], r[key]) for r in rows if r["method"] == name)
      x, y = zip(*own, strict=True)
      style = {"ls": _LINES[i % 4], "marker": _MARKS[i % 10], "mfc": "none", "ms": 5, "lw": 1.2}
      axis.plot(x, y, color=SIMULATED, alpha=1 - 0.07 * i, label=f"{name[:32]}: simulated", **style)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
    axis.set_xticks(sorted({r["tokens"] for r in rows}), [_count(n) for n in sorted({r["tokens"] for r in rows})])
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  axes[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
  figure.suptitle(title or f"{rows[0]['model']} on {rows[0]['gpu']}: simulated, nothing measured", fontsize=10)
  _save(figure, path)


def validation_plot(rows: list[dict], path):
  """Simulated against measured seconds of every calibration row: orange where fitted, crosses where predicted."""
  figure, (axis,) = _axes(1, 5.4, 4.6)
  for fitted, mark, label in ((True, "o", "fitted to"), (False, "X", "predicted, not fitted")):
    own = [r for r in rows if r["fitted"] == fitted]
    style = {"color": MEASURED, "mfc": "none" if fitted else MEASURED, "ls": "none", "ms": 7}
    axis.plot(
      [r["measured_seconds"] for r in own],
      [r["seconds"] for r in own],
      mark,
      label=f"{label} (x measured, y simulated)",
      **style,
    )
  ends = [f(r["measured_seconds"] for r in rows) for f in (min, max)]
  axis.plot(ends, ends, color=SIMULATED, lw=1, label="simulated = measured")
  axis.fill_between(ends, [0.85 * e for e in ends], [1.15 * e for e in ends], color=SIMULATED, alpha=0.12, label="within 15 %")
  axis.set(xscale="log", yscale="log", xlabel="measured seconds", ylabel="simulated seconds")
  axis.legend(frameon=False, fontsize=8)
  _save(figure, path)


def bars(rows: list[dict], path, title: str):
  """Where one forward's time goes: stacked simulated seconds per method."""
  figure, (axis,) = _axes(1, 8.5, 0.9 + 0.42 * len(rows))
  left = [0.0] * len(rows)
  labels = [r["method"][:32] for r in rows]
  parts = ("attention_seconds", "around_seconds", "matmul_seconds", "elementwise_seconds")
  for i, part in enumerate(parts):
    values = [r[part] for r in rows]
    name = part.replace("_seconds", "").replace("around", "around attention") + " (simulated)"
    axis.barh(labels, values, left=left, color=SIMULATED, alpha=1 - 0.23 * i, label=name, edgecolor="white")
    left = [a + b for a, b in zip(left, values, strict=True)]
  axis.invert_yaxis()
  axis.set(xlabel="seconds per forward", title=title)
  axis.legend(frameon=False, fontsize=8)
  _save(figure, path)


def errors_plot(rows: list[dict], path):
  """Measured error of compression over its bound, per head: a point below 1 keeps the bound. All measured."""
  figure, (axis,) = _axes(1, 7, 3.4)
  names = list(dict.fromkeys(r["case"] for r in rows))
  for i, name in enumerate(names):
    own = [r for r in rows if r["case"] == name and r["bound"] > 0]
    kinds = list(dict.fromkeys(r["kind"] for r in own))
    for j, kind in enumerate(kinds):
      ratios = [r["error"] / r["bound"] for r in own if r["kind"] == kind]
      x = [i + 0.12 * (j - len(kinds) / 2)] * len(ratios)
      axis.plot(x, ratios, _MARKS[j], color=MEASURED, ms=4, ls="none", label=f"{kind} (measured)" if i == 0 else None)
  axis.axhline(1, color=SIMULATED, lw=1, label="bound")
  axis.set_xticks(range(len(names)), [n.replace(", ", ",\n") for n in names], fontsize=8)
  axis.set(yscale="log", ylabel="error / its bound")
  axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
  _save(figure, path)


def _count(n: int) -> str:
  for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
    if n % size == 0:
      return f"{n // size}{unit}"
  return f"{n:,}"
