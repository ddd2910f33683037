"""Plots of speed-up over cuDNN and retained efficiency, over density and over tokens."""

import pathlib

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
  """Draws four panels and returns the file.

  Args:
    found: rows of one device; those with `speedup` and a correct result are drawn.
    path: of the PNG.

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
    for axis, y in zip(axes[:, column], ("speedup", "retained"), strict=True):
      for kind, words in _KINDS.items():
        points = sorted((row[x], row[y]) for row in good if _kind(row) == kind)
        if points:
          axis.plot(
            *zip(*points, strict=True),
            "o" if kind == "lists" or len(points) < 2 else "o-",
            label=words,
          )
      axis.set(
        xscale="log",
        xlabel=label,
        ylabel={"speedup": "speed-up over cuDNN", "retained": "retained"}[y],
      )
      axis.grid(alpha=0.3)
    if x == "density":
      low, high = min(row["density"] for row in good), max(row["density"] for row in good)
      axes[0, column].plot(
        (low, high), (1 / low, 1 / high), "k--", linewidth=0.8, label="1 / density"
      )
  axes[0, 0].set(yscale="log")
  axes[0, 0].legend(fontsize=8)
  rehearsal = any(row.get("rehearsal") for row in good)
  figure.suptitle(
    f"{good[0]['device']}, code {good[0]['code']}"
    + (" - REHEARSAL, no measurement" if rehearsal else "")
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  plt.close(figure)
  return path
