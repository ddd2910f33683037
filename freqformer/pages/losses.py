"""Draws validation loss over what it took: steps, FLOPs and seconds of training."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from freqformer.pages.html import panels

_WORK = {"step": "steps", "flops": "training FLOPs", "seconds": "seconds of training"}


def loss_figure(curves: Mapping[str, Sequence[Mapping]]) -> Figure:
  """Returns a panel per kind of work, with one curve per label.

  Methods that are equal in steps are seldom equal in FLOPs or seconds.

  Args:
    curves: lines of metrics.jsonl by label. Lines that lack a kind of work, which earlier versions
      wrote, are left out of its panel.
  """
  figure, axes = panels(len(_WORK), 9.5, 2.7)
  for axis, (key, name) in zip(axes, _WORK.items(), strict=True):
    for label, rows in curves.items():
      points = np.array([(row[key], row["loss"]) for row in rows if key in row]).reshape(-1, 2)
      axis.plot(*points.T, "o-", ms=3, lw=1.2, label=label)
    axis.set(xlabel=name, xlim=(0, None))
    axis.locator_params("x", nbins=5)
  axes[0].set_ylabel("validation loss")
  figure.legend(
    *axes[0].get_legend_handles_labels(),
    loc="outside upper center",
    ncols=2,
    frameon=False,
    fontsize=8,
  )
  return figure
