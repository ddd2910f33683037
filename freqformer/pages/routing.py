"""Draws which branch each head takes, by timestep."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from freqformer.evaluate.record_masks import heat
from freqformer.pages.files import read_json
from freqformer.pages.html import COLOURS, image, legend, panels, table
from freqformer.pages.losses import time_labels

_MAX_NAMES = 64  # rows of a heatmap that can each carry a name
_KINDS = {"probs": "soft: mean weight", "choice": "hard: share of clips"}


def routing(workdir: pathlib.Path) -> str:
  """Shows routing.json: heads by quarter of t, soft and hard, then the mean over heads."""
  found = read_json(workdir, "routing.json", "train.py, at a validation, of a method with a router")
  names = found["branches"]
  labels = time_labels(found["bucket_edges"])
  figure, axes = panels(len(_KINDS), 8.5, 2.6)
  for axis, (key, title) in zip(axes, _KINDS.items(), strict=True):
    share = np.mean(found[key], (0, 2))  # [buckets, branches]
    below = np.zeros(len(share))
    for branch, name in enumerate(names):
      colour = COLOURS[branch % len(COLOURS)]
      axis.bar(labels, share[:, branch], 0.7, bottom=below, label=name, color=colour)
      below = below + share[:, branch]
    axis.set(xlabel="t (1 is noise)", title=f"all heads, {title}")
    axis.set_ylim(0, max(1, below.max()))  # gates of levels may sum to more
  legend(axes[1])
  pictures = image(heatmap(found), "branch of each head by timestep, soft and hard")
  rows = []
  for key, title in _KINDS.items():
    shares = np.mean(found[key], (0, 2))
    rows += [(title, f"t {t}", *map(float, own)) for t, own in zip(labels, shares, strict=True)]
  return (
    pictures
    + image(figure, "allocation over timesteps")
    + table(["mean over heads", "", *names], rows)
  )


def heatmap(found: dict) -> Figure:
  """Draws a row per head, by its name, and a column per branch of every quarter of t.

  Soft and hard are next to each other on one axis: matplotlib takes a tenth of a second per axis.
  """
  layers, buckets, heads, branches = np.shape(found["probs"])
  rows = layers * heads
  gap = np.full((rows, 1), np.nan)
  columns = []
  names = []
  figure, (axis,) = panels(1, 10, min(14, 1.8 + 0.15 * rows))

  def above(column: float, points: float, text: str, **style):
    place = dict(xycoords=("data", "axes fraction"), textcoords="offset points")
    axis.annotate(text, (column, 1), (0, points), **place, **style)

  for key, title in _KINDS.items():
    above(len(names) - 0.5, 20, title, fontsize=9, weight="bold")
    for bucket, label in enumerate(time_labels(found["bucket_edges"])):
      above(len(names) - 0.5, 5, f"t {label}", fontsize=8)
      columns += [np.asarray(found[key])[:, bucket].reshape(rows, branches), gap]
      names += [*found["branches"], ""]
    columns.append(gap)
    names.append("")
  shown = heat(axis, np.concatenate(columns[:-2], 1), heads)
  at = [i for i, name in enumerate(names) if name]
  axis.set_xticks(at, [names[i] for i in at], rotation=90, fontsize=8)
  ticks = range(0, rows, -(-rows // _MAX_NAMES))
  axis.set_yticks(ticks, [f"layer {i // heads}.head {i % heads}" for i in ticks], fontsize=7)
  axis.set_ylabel("")
  axis.tick_params(length=0)
  axis.spines[:].set_visible(False)
  figure.colorbar(shown, ax=axis, fraction=0.02, pad=0.01)
  return figure
