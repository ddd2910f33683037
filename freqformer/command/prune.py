"""Stops trials that are worse than the median of the study's earlier ones at equal training FLOPs.

This is the median stopping rule of Golovin et al. 2017 (Google Vizier, KDD), which stops a trial
whose best value so far is strictly worse than the median, over completed trials, of their running
averages up to the same step. Here:

* equal training FLOPs take the place of equal steps: methods cost differently per step. Between two
  validations a curve is interpolated linearly;
* a curve is the best validation loss so far, of the trial as of the others, and no average: losses
  fall while a model trains, and an average would lag;
* behind its last validation a finished trial keeps its best loss, as it needs no more FLOPs for it;
  one that was pruned counts up to there only;
* no trial is stopped in the first quarter of its steps, at its end, or by fewer than three others.
"""

import pathlib

import numpy as np

from freqformer.command.trials import PRUNED, Trial, ran, resolve, result_of
from freqformer.pages.files import metric_rows, series

_WARMUP = 0.25  # choice: share of a trial's steps in which it is never stopped
_LEAST = 3  # choice: curves that make a median


class MedianRule:
  """Watches one trial while it trains.

  Attributes:
    status: "pruned at 2.5 TFLOP" once the trial is to be stopped, None before.
  """

  def __init__(self, trial: Trial):
    """Begins to watch; what the trial had validated before this process is not judged."""
    self.status: str | None = None
    self._trial = trial
    self._steps = resolve(trial.config, trial.overrides).train.steps
    self._judged = self._last_step()

  def _last_step(self) -> int:
    rows = metric_rows(self._trial.workdir, "val")
    return rows[-1]["step"] if rows else 0

  def __call__(self) -> bool:
    """Tells whether the trial is to be stopped, by the validations that it has written so far."""
    step = self._last_step()
    if self.status is None and step > self._judged:
      self._judged = step
      # At its last step a trial ends by itself.
      if _WARMUP * self._steps <= step < self._steps:
        self._judge()
    return self.status is not None

  def _judge(self):
    flops, losses = _curve(self._trial.workdir)
    if not len(flops):
      return
    others = earlier_losses(self._trial, flops[-1])
    if len(others) >= _LEAST and losses[-1] > np.median(others):
      self.status = f"{PRUNED} at {flops[-1] / 1e12:.3g} TFLOP"


def earlier_losses(trial: Trial, flops: float) -> list[float]:
  """Returns the best validation losses that other trials of the study had at these FLOPs."""
  statuses = {name: row["status"] for name, row in ran(trial.study).items()}
  found = []
  for path in sorted(trial.study.glob("*/metrics.jsonl")):
    workdir = path.parent
    finished = result_of(workdir) is not None
    over = finished or statuses.get(workdir.name, "").startswith(PRUNED)
    if over and workdir.name != trial.name:
      work, losses = _curve(workdir)
      if len(work) and work[0] <= flops and (finished or flops <= work[-1]):
        found.append(float(np.interp(flops, work, losses)))
  return found


def _curve(workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns training FLOPs and the best validation loss so far, `[n]` both."""
  flops, losses = series(metric_rows(workdir, "val"), "loss", over="flops")
  return flops, np.minimum.accumulate(losses)
