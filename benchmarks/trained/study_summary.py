"""The table of a study: paired differences of arms against one of them."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from freqformer.pages.text import aligned

CONFIDENCE = 0.95
ALL_T = (0.0, 1.0)
Span = tuple[float, float]  # of t


def measure(row: dict) -> str:
  """Returns what a row is judged by: the regret where it is known, else the loss."""
  return "regret" if "regret" in row["final"] else "loss"


def middles(row: dict, parts: int) -> np.ndarray:
  """Returns the middles of `parts` equal parts of the range of t that a row was judged in."""
  low, high = row["overrides"].get("train.time_range", ALL_T)
  return low + (high - low) * (np.arange(parts) + 0.5) / parts


def by_part(row: dict, judged: dict) -> list[float]:
  """Returns regret or loss per part of t of a row's `final` or of a point of its curve."""
  return judged["regret_buckets" if measure(row) == "regret" else "buckets"]


def over(row: dict, judged: dict, span: Span = ALL_T) -> float:
  """Returns mean regret or loss over the parts of t whose middle lies in `span`."""
  if span == ALL_T:
    return judged[measure(row)]
  return over_parts(row, by_part(row, judged), span)


def over_parts(row: dict, values: Sequence[float], span: Span) -> float:
  """Returns the mean of a row's values per part of t over the parts whose middle is in `span`."""
  places = middles(row, len(values))
  return float(np.array(values)[(span[0] <= places) & (places < span[1])].mean())


def on_curve(row: dict, axis: str, wanted: float, span: Span = ALL_T) -> float | None:
  """Returns a row's regret or loss at a place of its curve; None outside it.

  Between two points of the curve it is linear in the logarithm of the place.

  Args:
    row: of the study.
    axis: "flops" or "step".
    wanted: training FLOPs or steps.
    span: of t, as in `over`.
  """
  place = [math.log(point[axis]) for point in row["curve"]]
  values = [over(row, point, span) for point in row["curve"]]
  wanted = math.log(wanted)
  if not place[0] - 1e-9 <= wanted <= place[-1] + 1e-9:
    return None
  return float(np.interp(wanted, place, values))


def equal_steps(row: dict, other: dict, span: Span = ALL_T) -> tuple[float, float] | None:
  """Returns both rows' final values; None if they are of different numbers of steps."""
  if row["steps"] != other["steps"]:
    return None
  return over(row, row["final"], span), over(other, other["final"], span)


def equal_flops(row: dict, other: dict, span: Span = ALL_T) -> tuple[float, float] | None:
  """Returns both rows' values at the FLOPs of the cheaper one; None if a curve begins later."""
  flops = min(row["training_flops"], other["training_flops"])
  pair = (on_curve(row, "flops", flops, span), on_curve(other, "flops", flops, span))
  return None if None in pair else pair


Compared = Callable[[dict, dict], tuple[float, float] | None]


def pairs(rows: list[dict], arm: str, against: str, compared: Compared) -> np.ndarray:
  """Returns the compared values of two arms by seed, float64 `[seeds, 2]`, without absent ones."""
  by_seed = {(row["arm"], row["seed"]): row for row in rows}
  found = []
  for (name, seed), row in by_seed.items():
    other = by_seed.get((against, seed))
    pair = compared(row, other) if name == arm and other is not None else None
    found += [] if pair is None else [pair]
  return np.array(found, np.float64).reshape(-1, 2)


def half_width(values: np.ndarray) -> float | None:
  """Returns half the width of the t interval of a mean, None of a single value."""
  if len(values) < 2:
    return None
  quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
  return float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


def difference(rows: list[dict], arm: str, against: str, compared: Compared) -> dict | None:
  """Returns the mean paired difference of two arms over seeds, with its t interval.

  Returns:
    `mean` of arm minus `against`, `half` the width of the interval to either side (None of one
    seed), `relative`, the mean over the mean of `against`, and `seeds`, how many were paired. None
    if there is no pair.
  """
  found = pairs(rows, arm, against, compared)
  if not len(found):
    return None
  gaps = found[:, 0] - found[:, 1]
  return {
    "mean": float(gaps.mean()),
    "half": half_width(gaps),
    "relative": float(gaps.mean() / found[:, 1].mean()),
    "seeds": len(gaps),
  }


def all_levels(rows: list[dict]) -> list[dict]:
  """Returns rows of pyramids as judged with all levels, and others as they are.

  A pyramid that was trained to leave out levels is among the others.
  """
  found = []
  for row in rows:
    trained_to = "model.attention.octaves.threshold_from" in row["overrides"]
    weighed = row["arm"].startswith(("octaves", "low")) and not trained_to
    found.append(row | {"final": row["final_soft"]} if weighed else row)
  return found


def by_arm(rows: list[dict]) -> dict[str, list[dict]]:
  """Returns the rows of every arm, the arm with the least regret (or loss) first."""
  arms = {}
  for row in rows:
    arms.setdefault(row["arm"], []).append(row)

  def mean(arm: str) -> float:
    return float(np.mean([over(row, row["final"]) for row in arms[arm]]))

  return {arm: arms[arm] for arm in sorted(arms, key=mean)}


def arm_lines(rows: list[dict], against: str) -> list[tuple[str, ...]]:
  """Returns head and lines of a table of the arms, each against one of them."""
  key = measure(rows[0])
  lines = [("arm", key, "seeds", "equal steps", "equal FLOPs", "TFLOP", "seconds", "density")]
  for arm, own in by_arm(rows).items():
    compared = ("-", "-")
    if arm != against:
      compared = (
        _text(difference(rows, arm, against, equal_steps)),
        _text(difference(rows, arm, against, equal_flops)),
      )
    lines.append(
      (
        arm,
        f"{np.mean([row['final'][key] for row in own]):.4f}",
        str(len(own)),
        *compared,
        f"{np.mean([row['training_flops'] for row in own]) / 1e12:.3g}",
        f"{np.mean([row['training_seconds'] for row in own]):.0f}",
        f"{np.mean([row['final']['density'] for row in own]):.3g}",
      )
    )
  return lines


def part_lines(rows: list[dict]) -> list[tuple[str, ...]]:
  """Returns head and lines of a table of the arms' values per part of t."""
  count = len(by_part(rows[0], rows[0]["final"]))
  places = (f"{place:.2f}" for place in middles(rows[0], count))
  lines = [(f"{measure(rows[0])} at t", "all", *places)]
  for arm, own in by_arm(rows).items():
    mean = np.mean([over(row, row["final"]) for row in own])
    values = [mean, *np.mean([by_part(row, row["final"]) for row in own], 0)]
    lines.append((arm, *(f"{value:.4f}" for value in values)))
  return lines


def summary(rows: list[dict], against: str) -> str:
  """Returns the table of all arms, the best one first, and their values per part of t."""
  note = (
    f"Differences are against {against}, means over seeds with {CONFIDENCE:.0%} t intervals; equal "
    "FLOPs are those of the cheaper run of each pair. Below 0 is better."
  )
  return "\n".join([aligned(arm_lines(rows, against)), "", aligned(part_lines(rows)), "", note])


def _text(found: dict | None) -> str:
  if found is None:
    return "none"
  half = "" if found["half"] is None else f" +-{found['half']:.4f}"
  seeds = counted(found["seeds"], "seed")
  return f"{found['mean']:+.4f}{half} ({found['relative']:+.1%}, {seeds})"


def counted(number: int, noun: str) -> str:
  """Returns "1 seed", "2 seeds"."""
  return f"{number} {noun}{'s' * (number != 1)}"
