"""The table of a study: paired differences of arms against one of them."""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from freqformer.pages.text import aligned

CONFIDENCE = 0.95


def measure(row: dict) -> str:
  """Returns what a row is judged by: the regret where it is known, else the loss."""
  return "regret" if "regret" in row["final"] else "loss"


def at_flops(row: dict, flops: float) -> float | None:
  """Returns a row's regret or loss after so many training FLOPs; None outside its curve.

  Between two points of the curve it is linear in the logarithm of the FLOPs.
  """
  place = [math.log(point["flops"]) for point in row["curve"]]
  values = [point[measure(row)] for point in row["curve"]]
  wanted = math.log(flops)
  if not place[0] - 1e-9 <= wanted <= place[-1] + 1e-9:
    return None
  return float(np.interp(wanted, place, values))


def equal_steps(row: dict, other: dict) -> tuple[float, float] | None:
  """Returns both rows' final values; None if they are of different numbers of steps."""
  if row["steps"] != other["steps"]:
    return None
  return row["final"][measure(row)], other["final"][measure(other)]


def equal_flops(row: dict, other: dict) -> tuple[float, float] | None:
  """Returns both rows' values at the FLOPs of the cheaper one; None if a curve begins later."""
  flops = min(row["training_flops"], other["training_flops"])
  pair = (at_flops(row, flops), at_flops(other, flops))
  return None if None in pair else pair


def difference(
  rows: list[dict], arm: str, against: str, compared: Callable[[dict, dict], tuple | None]
) -> dict | None:
  """Returns the mean paired difference of two arms over seeds, with its t interval.

  Returns:
    `mean` of arm minus `against`, `half` the width of the interval to either side (None of one
    seed), `relative`, the mean over the mean of `against`, and `seeds`, how many were paired. None
    if there is no pair.
  """
  by_seed = {(row["arm"], row["seed"]): row for row in rows}
  pairs = []
  for (name, seed), row in by_seed.items():
    other = by_seed.get((against, seed))
    if name == arm and other is not None:
      pairs.append(compared(row, other))
  pairs = np.array([pair for pair in pairs if pair is not None])
  if not len(pairs):
    return None
  gaps = pairs[:, 0] - pairs[:, 1]
  half = None
  if len(gaps) > 1:
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)
    half = float(quantile * gaps.std(ddof=1) / math.sqrt(len(gaps)))
  return {
    "mean": float(gaps.mean()),
    "half": half,
    "relative": float(gaps.mean() / pairs[:, 1].mean()),
    "seeds": len(gaps),
  }


def summary(rows: list[dict], against: str) -> str:
  """Returns the table of all arms, the best one first, and their values per part of t."""
  arms = {}
  for row in rows:
    arms.setdefault(row["arm"], []).append(row)
  key = measure(rows[0])
  mean = {arm: float(np.mean([row["final"][key] for row in own])) for arm, own in arms.items()}
  order = sorted(arms, key=mean.get)
  lines = [("arm", key, "seeds", "equal steps", "equal FLOPs", "TFLOP", "seconds", "density")]
  for arm in order:
    own = arms[arm]
    lines.append(
      (
        arm,
        f"{mean[arm]:.4f}",
        str(len(own)),
        _text(difference(rows, arm, against, equal_steps)) if arm != against else "-",
        _text(difference(rows, arm, against, equal_flops)) if arm != against else "-",
        f"{np.mean([row['training_flops'] for row in own]) / 1e12:.3g}",
        f"{np.mean([row['training_seconds'] for row in own]):.0f}",
        f"{np.mean([row['final']['density'] for row in own]):.3f}",
      )
    )
  count = len(rows[0]["final"]["buckets"])
  name = "buckets" if key == "loss" else "regret_buckets"
  parts = [(f"{key} at t", *(f"{(i + 0.5) / count:.3g}" for i in range(count)))]
  for arm in order:
    values = np.mean([row["final"][name] for row in arms[arm]], 0)
    parts.append((arm, *(f"{value:.4f}" for value in values)))
  note = (
    f"Differences are against {against}, means over seeds with {CONFIDENCE:.0%} t intervals; equal "
    "FLOPs are those of the cheaper run of each pair. Below 0 is better."
  )
  return "\n".join([aligned(lines), "", aligned(parts), "", note])


def _text(found: dict | None) -> str:
  if found is None:
    return "none"
  half = "" if found["half"] is None else f" +-{found['half']:.4f}"
  return f"{found['mean']:+.4f}{half} ({found['relative']:+.1%}, {found['seeds']} seeds)"
