"""Warnings about a run that goes on, each said once: it may be finite and yet be lost.

Steps that are not finite are skipped and end a run by themselves (`step.SkippedSteps`).
"""

import collections
import math
import statistics
from collections.abc import Iterable

import numpy as np

from freqformer.model.config import ModelConfig
from freqformer.train.step import TrainConfig

KIND = "warning"  # of a line of metrics.jsonl
# choice: the mean of the newest lines is compared, so that one unlucky batch raises no alarm.
_FACTOR = 3.0
_NEWEST = 3
_WINDOW = 100  # lines of the median
_LEAST = 5  # lines below which there is no median
# choice: weight of a branch that leaves the others nothing, and weight of one that does nothing.
_ALL = 0.95
_NOTHING = 0.01


class Alarm:
  """Looks at the losses that a run logs.

  Attributes:
    raised: what has been warned of: "training", "validation", "router" or "branch".
  """

  def __init__(self, config: TrainConfig, rows: Iterable[dict] = ()):
    """Begins behind the lines `rows` of metrics.jsonl, of the processes before."""
    self._warm = int(config.warm_steps)
    self._losses = collections.deque(maxlen=_WINDOW)
    self.raised: set[str] = set()
    for row in rows:
      if row["kind"] == KIND:
        self.raised.add(row["about"])
      elif row["kind"] == "train":
        self._note(row.get("loss"))

  def _note(self, loss: float | None):
    if loss is not None and math.isfinite(loss):
      self._losses.append(loss)

  def trained(self, step: int, loss: float) -> dict[str, str] | None:
    """Notes a training loss; returns a warning, `about` and `text`, if it has exploded."""
    self._note(loss)
    losses = list(self._losses)
    before = losses[:-_NEWEST]
    if step <= self._warm or len(before) < _LEAST:
      return None
    median = statistics.median(before)
    newest = statistics.fmean(losses[-_NEWEST:])
    if newest <= _FACTOR * median:
      return None
    return self._raise(
      "training",
      f"the training loss has exploded: {newest:.4g} before step {step}, where its median is "
      f"{median:.4g}. Lower train.lr or train.clip, or look at the data; train.keep_best keeps the "
      "checkpoint that validates best.",
    )

  def validated(self, step: int, loss: float, linear: float) -> dict[str, str] | None:
    """Returns a warning if a validation loss is behind that of the best linear prediction."""
    if step <= self._warm or loss <= linear:
      return None
    return self._raise(
      "validation",
      f"validation at step {step} is worse than the best linear prediction: {loss:.4g} against "
      f"{linear:.4g}. The model has learned nothing yet, or has exploded: then lower train.lr.",
    )

  def routed(self, step: int, probs, model: ModelConfig) -> dict[str, str] | None:
    """Returns a warning if a layer's heads all take one branch at every t, or no head takes one.

    Layers without a router, whose heads are fixed or measured, are not looked at.

    Args:
      probs: mean weights `[layers, quarters of t, heads, branches]` of layers that have branches.
      model: says which layers these are, and which have a router.
    """
    layers, known = _with_router(model)
    if step <= self._warm or not layers:
      return None
    probs = np.asarray(probs)[list(layers.values())]
    # Of gates, which are weights of their own, the share.
    share = probs / np.maximum(np.sum(probs, -1, keepdims=True), _NOTHING)
    alone = share.min((1, 2)) >= _ALL  # [layers, branches]
    unused = (probs.max((0, 1, 2)) < _NOTHING) & known
    if alone.any():
      found = ", ".join(
        f"{model.branches[branch]} in layer {layer}"
        for layer, taken in zip(layers, alone, strict=True)
        for branch in np.flatnonzero(taken)
      )
      return self._raise(
        "router",
        f"the router has collapsed at step {step}: at every t, all heads give {_ALL:.0%} of their "
        f"weight or more to {found}. Raise its temperature or lower its penalty; or fix these "
        "heads, which costs less.",
      )
    if unused.any():
      names = ", ".join(model.branches[i] for i in np.flatnonzero(unused))
      return self._raise(
        "branch",
        f"no head gives {_NOTHING:.0%} of its weight to {names} at step {step}, in any layer and "
        "at any t: nothing trains it any more. Leave it out, or raise its prior or the router's "
        "temperature.",
      )
    return None

  def _raise(self, about: str, text: str) -> dict[str, str] | None:
    if about in self.raised:
      return None
    self.raised.add(about)
    return {"about": about, "text": text}


def _with_router(model: ModelConfig) -> tuple[dict[int, int], np.ndarray]:
  """Returns layers with a router, by number, and which of `model.branches` they choose from.

  A layer's value is its place among all that have branches.
  """
  layers = {}
  known = np.zeros(len(model.branches), bool)
  first = 0
  place = 0
  for count, method in model.runs():
    if method.routed:
      layers |= {first + i: place + i for i in range(count)}
      known |= np.isin(model.branches, method.branches)
    first += count
    place += count if method.branches else 0
  return layers, known
