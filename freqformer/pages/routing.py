"""Draws which branch each head takes, by timestep."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from freqformer.evaluate.record_masks import heat
from freqformer.pages.files import read_json
from freqformer.pages.html import COLOURS, image, legend, panels, table
from freqformer.pages.losses import time_labels

_MAX_NAMES = 64  # rows of a heatmap that can each carry a name
_KINDS = {"probs": "soft: mean probability", "choice": "hard: share of clips"}


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
    axis.set(xlabel="t (1 is noise)", title=f"all heads, {title}", ylim=(0, 1))
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
  """Draws a panel per kind and quarter of t: a row per head, by its name, a column per branch."""
  layers, buckets, heads, branches = np.shape(found["probs"])
  rows = layers * heads
  ticks = range(0, rows, -(-rows // _MAX_NAMES))
  names = [f"layer {row // heads}.head {row % heads}" for row in ticks]
  figure, axes = panels(2 * buckets, 10, min(14, 1.7 + 0.15 * rows))
  for i, axis in enumerate(axes):
    key = list(_KINDS)[i // buckets]
    values = np.asarray(found[key])[:, i % buckets].reshape(rows, branches)
    shown = heat(axis, values, heads)
    axis.set_xticks(range(branches), found["branches"], rotation=90, fontsize=8)
    axis.set_yticks(ticks, names if i == 0 else [], fontsize=7)
    axis.set_ylabel("")
    low, high = found["bucket_edges"][i % buckets : i % buckets + 2]
    kind = f"{key_title(key)}\n" if i % buckets == 0 else "\n"
    axis.set_title(f"{kind}t {low:.3g} – {high:.3g}", fontsize=8, loc="left")
  figure.colorbar(shown, ax=list(axes), fraction=0.02, pad=0.01)
  return figure


def key_title(key: str) -> str:
  """Returns `soft` or `hard`."""
  return _KINDS[key].split(":")[0]
