"""Plots of speed-up over cuDNN and retained efficiency, over density and over tokens."""

import pathlib

import numpy as np

_KINDS = {
  "lists": "random lists",
  "freqformer": "FreqFormer, mid 5 %",
  "fixed4k": "FreqFormer, 4K keys",
  "window": "3-D window",
}


def _kind(row: dict) -> str | None:
  """Returns the curve that a row belongs to; variants (unsorted, other tiles) belong to none."""
  prefix = row["name"].split("/")[0]
  if prefix.startswith("lists_"):
    return "lists" if prefix.count("_") == 1 else None
  return prefix if prefix in _KINDS else None


def draw(found: list[dict], path: pathlib.Path) -> pathlib.Path:
  """Draws four panels of the correct rows of one device with `speedup`; returns the PNG's path.

  Raises:
    ValueError: if no row can be drawn.
  """
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  good = [
    row
    for row in found
    if "speedup" in row and row.get("correct") and row.get("direction") == "forward" and _kind(row)
  ]
  if not good:
    raise ValueError("no correct row with a speed-up to draw; run the benchmark first.")
  figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
  for column, (x, label) in enumerate((("density", "density"), ("n", "tokens"))):
    for row, (y, name) in enumerate((("speedup", "speed-up over cuDNN"), ("retained", "retained"))):
      axis = axes[row, column]
      for kind, words in _KINDS.items():
        points = sorted((each[x], each[y]) for each in good if _kind(each) == kind)
        # Lists differ in more than the axis shows: no line between them.
        style = "o" if kind == "lists" or len(points) < 2 else "o-"
        if points:
          axis.plot(*zip(*points, strict=True), style, label=words)
      axis.set(xscale="log", xlabel=label, ylabel=name)
      axis.grid(alpha=0.3)
  densities = sorted(each["density"] for each in good)
  ends = np.array([densities[0], densities[-1]])
  axes[0, 0].plot(ends, 1 / ends, "k--", linewidth=0.8, label="1 / density")
  axes[0, 0].set(yscale="log")
  axes[0, 0].legend(fontsize=8)
  title = f"{good[0]['device']}, code {good[0]['code']}"
  rehearsal = any(each.get("rehearsal") for each in good)
  figure.suptitle(title + (" - REHEARSAL, no measurement" if rehearsal else ""))
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  plt.close(figure)
  return path
