"""The hypotheses of docs/evidence.md, judged by the rows of a study.

Each is one or more claims: a number per seed, and a bound that its mean must keep. A claim holds or
fails where the t interval over seeds lies on one side of the bound, and is open otherwise, as it is
with one seed. Numbers are differences of the regret (where it is known, else of the loss) relative
to the second arm; a part of t counts where its middle lies.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from benchmarks.trained.study_summary import (
  ALL_T,
  Compared,
  Span,
  all_levels,
  counted,
  equal_flops,
  equal_steps,
  half_width,
  on_curve,
  over,
  over_parts,
  pairs,
)
from freqformer.pages.text import aligned

HOLDS = "holds"
FAILS = "fails"
OPEN = "open"
HIGH_NOISE = (0.7, 1.01)
BELOW = (0.0, 0.7)
# choice: seeds after which arms that cannot be told apart are taken as equal (H4 names three).
_ENOUGH = 3


@dataclasses.dataclass(frozen=True)
class Claim:
  """A mean over seeds that should lie on one side of a bound.

  Attributes:
    text: the number's name.
    values: per seed.
    bound: that the mean is compared with.
    above: the mean should lie above the bound; otherwise below.
    if_equal: the state after `_ENOUGH` seeds whose interval has the bound.
  """

  text: str
  values: Sequence[float]
  bound: float
  above: bool = False
  if_equal: str = OPEN

  @property
  def state(self) -> str:
    """HOLDS, FAILS or OPEN."""
    half = half_width(np.array(self.values))
    if half is None:
      return OPEN
    distance = np.mean(self.values) - self.bound
    if abs(distance) <= half:
      return self.if_equal if len(self.values) >= _ENOUGH else OPEN
    return HOLDS if (distance > 0) == self.above else FAILS

  @property
  def numbers(self) -> str:
    """The mean with its interval, the bound, and how many seeds there are."""
    if not len(self.values):
      return f"{self.text}: no rows"
    half = half_width(np.array(self.values))
    interval = "" if half is None else f" +- {half:.1%}"
    side = "above" if self.above else "below"
    seeds = counted(len(self.values), "seed")
    mean = f"{np.mean(self.values):+.1%}"
    return f"{self.text}: {mean}{interval}, should be {side} {self.bound:+.1%} ({seeds})"


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A hypothesis with its claims.

  Attributes:
    name: "H1" and so on.
    claims: all of which must hold.
    otherwise: the rule, if one fails.
  """

  name: str
  claims: tuple[Claim, ...]
  otherwise: str

  @property
  def state(self) -> str:
    """FAILS if a claim fails, else OPEN if one is open, else HOLDS."""
    states = {claim.state for claim in self.claims}
    return next(state for state in (FAILS, OPEN, HOLDS) if state in states)

  @property
  def outcome(self) -> str:
    """The state, with what follows if it fails and the number of seeds if it is open."""
    if self.state == FAILS:
      return f"fails: {self.otherwise}"
    if self.state == OPEN:
      seeds = min(len(claim.values) for claim in self.claims)
      return f"open with {counted(seeds, 'seed')}"
    return HOLDS


def verdicts(stages: Mapping[str, list[dict]], probes: Iterable[dict] = ()) -> list[Verdict]:
  """Judges H1 to H31.

  Args:
    stages: rows by stage; one that is absent has none.
    probes: rows of `benchmarks.probes`, whose routing stands in for rows that lack it.
  """
  plain = stages.get("screen", [])
  copies = stages.get("copies", [])
  plane = stages.get("plane", [])
  core = stages.get("core", [])
  return [
    Verdict(
      "H1", _against_window(plain, "octaves"), "the pyramid has no reason to exist on such data"
    ),
    Verdict(
      "H2",
      tuple(
        Claim(f"{arm} v freqformer", relative(plain, arm, "freqformer"), 0.005, above=True)
        for arm in ("low2", "low4")
      ),
      "the hard choice is no longer the default",
    ),
    Verdict("H3", (_of_dense_of_four_times(plain, "octaves"),), "README's first table says so"),
    Verdict("H4", _against_low(plain, "octaves", "low4"), "low4, the cheaper one, is the default"),
    Verdict(
      "H5",
      (
        Claim(
          "freqformer v freqformer_time", relative(plain, "freqformer", "freqformer_time"), -0.003
        ),
      ),
      "the statistics go",
    ),
    Verdict(
      "H6",
      (
        Claim(
          "low heads of freqformer_slope, t > .7 less t < .7",
          _more_low_heads(plain, probes),
          0,
          above=True,
        ),
      ),
      '"global early" is the prior\'s',
    ),
    Verdict(
      "H7",
      (
        Claim(
          "copies: octaves_mid v octaves_prior",
          relative(copies, "octaves_mid", "octaves_prior"),
          -0.005,
        ),
      ),
      "the mid tiles go",
    ),
    Verdict("H8", _left_out(plain, "octaves"), "the threshold is 0"),
    Verdict(
      "H9",
      (Claim("octaves_prior v octaves", relative(plain, "octaves_prior", "octaves"), -0.05),),
      "weights begin uniform",
    ),
    Verdict("H10", _against_window(plain, "octaves_prior"), "as H1"),
    Verdict("H11", _against_low(plain, "octaves_prior", "low4_prior"), "as H4"),
    Verdict("H12", _left_out(plain, "octaves_prior"), "the threshold is 0"),
    Verdict("H13", _against_window(plane, "octaves4_prior", equal_steps), "as H1"),
    Verdict("H14", _against_low(plane, "octaves4_prior", "low8_prior"), "one low level suffices"),
    Verdict("H15", _left_out(plane, "octaves4_prior"), "the threshold is 0"),
    Verdict(
      "H16",
      (
        Claim(
          "freqformer v freqformer_random",
          relative(plain, "freqformer", "freqformer_random"),
          -0.005,
        ),
      ),
      "the bands matter, not who has them",
    ),
    Verdict(
      "H17",
      (
        Claim(
          "octaves_prior v vorta",
          relative(plain + stages.get("vorta", []), "octaves_prior", "vorta"),
          0,
        ),
      ),
      "README says so",
    ),
    Verdict(
      "H18",
      (Claim("low2 v joint", relative(plain, "low2", "joint"), 0, if_equal=FAILS),),
      "levels need no queries of their own",
    ),
    Verdict("H19", _against_window(core, "octaves_prior"), "a window catches up"),
    Verdict("H20", _against_low(core, "octaves_prior", "low4_prior"), "one low level is enough"),
    Verdict(
      "H21",
      (
        Claim(
          "low4_prior v freqformer", relative(core, "low4_prior", "freqformer"), 0.005, above=True
        ),
      ),
      "the hard choice stays off",
    ),
    Verdict("H22", (_of_dense_of_four_times(core, "low4_prior"),), "README's first table says so"),
    Verdict(
      "H23",
      (Claim("low4_prior v dense, equal steps", relative(core, "low4_prior", "dense"), 0.01),),
      "README's first table says so",
    ),
    Verdict(
      "H24",
      (Claim("octaves_prior v octaves", relative(core, "octaves_prior", "octaves"), -0.05),),
      "a tilted start speeds learning up, no more",
    ),
    Verdict("H25", _left_out(core, "low4_prior")[:1], "the threshold is 0"),
    Verdict("H26", (_of_all_levels(core, "low4_late"),), "training does not mend what it costs"),
    Verdict(
      "H27",
      (_of_all_levels(core, "low4_budget"), _left_out(core, "low4_budget")[1]),
      "no half of the pairs is saved at high noise, or not for that price",
    ),
    Verdict(
      "H28", (_of_fewer_steps(stages.get("long", []), core),), "README's first table says so"
    ),
    Verdict(
      "H29",
      (_loss_without_the_finest(core), _pairs_without_the_finest(core)),
      "no half of the pairs is saved at high noise, or not for that price",
    ),
    Verdict(
      "H30", (_loss_without_the_finest(stages.get("high", [])),), "as H29, at high noise alone"
    ),
    Verdict(
      "H31",
      (_loss_of_leaving_out(core, "octaves_either"), _left_out(core, "octaves_either")[1]),
      "as H29",
    ),
  ]


def relative(
  rows: list[dict], arm: str, against: str, compared: Compared = equal_steps
) -> list[float]:
  """Returns the difference of two arms over the second one's value, by seed."""
  found = pairs(rows, arm, against, compared)
  return (found[:, 0] / found[:, 1] - 1).tolist()


def _within(compared: Callable, span: Span) -> Compared:
  """Returns a comparison over a part of t."""
  return lambda row, other: compared(row, other, span)


def _against_window(
  rows: list[dict], arm: str, compared: Callable = equal_flops
) -> tuple[Claim, Claim]:
  """Returns the claims of H1, H10 and H13."""
  high, below = (
    relative(rows, arm, "window", _within(compared, span)) for span in (HIGH_NOISE, BELOW)
  )
  equal = "equal FLOPs" if compared is equal_flops else "equal steps"
  return (
    Claim(f"{arm} v window, t > .7, {equal}", high, -0.3),
    Claim("t < .7", below, 0, if_equal=HOLDS),
  )


def _against_low(rows: list[dict], arm: str, low: str) -> tuple[Claim]:
  """Returns the claim of H4, H11 and H14."""
  found = relative(rows, arm, low, _within(equal_steps, BELOW))
  return (Claim(f"{arm} v {low}, t < .7", found, 0, if_equal=FAILS),)


def _of_dense_of_four_times(rows: list[dict], arm: str) -> Claim:
  """Returns the claim of H3 and H22."""
  found = relative(rows, arm, "dense", _quarter_of_steps)
  return Claim(f"{arm} v dense of four times the steps", found, 0.01)


def _of_fewer_steps(long: list[dict], core: list[dict]) -> Claim:
  """Returns the claim of H28: the default, with all levels, against dense attention at a quarter.

  Args:
    long: rows of the default.
    core: rows of dense attention.
  """

  def compared(row: dict, other: dict) -> tuple[float, float] | None:
    if row["steps"] != 4 * other["steps"]:
      return None
    return over(row, row["final"]), over(other, other["final"])

  dense = [row for row in core if row["arm"] == "dense"]
  found = relative(all_levels(long) + dense, "low4_prior", "dense", compared)
  return Claim("low4_prior of four times the steps v dense", found, 0.01)


def _quarter_of_steps(row: dict, other: dict) -> tuple[float, float] | None:
  """Returns a row's value at a quarter of another row's steps, and that one's last value.

  Both are read off curves, which have the same draws. With a constant learning rate every point of
  a curve is a run of fewer steps.
  """
  pair = (on_curve(row, "step", other["steps"] / 4), on_curve(other, "step", other["steps"]))
  return None if None in pair else pair


def routing_of(row: dict, probes: Iterable[dict]) -> list[list[float]] | None:
  """Returns a row's `weights` per part of t and branch, or those of a probe of the same run."""
  if "weights" in row["final"]:
    return row["final"]["weights"]
  for probe in probes:
    same = (probe["arm"], probe["seed"], probe["digest"]) == (
      row["arm"],
      row["seed"],
      row["digest"],
    )
    if same and probe["probe"] == "transfer":
      return probe["results"]["as trained"].get("weights")
  return None


def _more_low_heads(rows: list[dict], probes: Iterable[dict]) -> list[float]:
  found = []
  for row in rows:
    weights = routing_of(row, probes) if row["arm"] == "freqformer_slope" else None
    if weights is not None:
      low = [shares[0] for shares in weights]
      found.append(over_parts(row, low, HIGH_NOISE) - over_parts(row, low, BELOW))
  return found


def _left_out(rows: list[dict], arm: str) -> tuple[Claim, Claim]:
  """Returns the claims of H8, H12, H15: evaluation as it is against all levels, weights alike."""
  regret = []
  share = []
  for row in rows:
    if row["arm"] == arm:
      final = row["final"]
      soft = row["final_soft"]
      regret.append(over(row, final, ALL_T) / over(row, soft, ALL_T) - 1)
      run = over_parts(row, final["density_buckets"], HIGH_NOISE)
      share.append(run / over_parts(row, soft["density_buckets"], HIGH_NOISE))
  return (
    Claim(f"{arm}, regret of leaving out v all levels", regret, 0.005),
    Claim("pairs at t > .7 over those of all levels", share, 0.5),
  )


def _of_all_levels(rows: list[dict], arm: str) -> Claim:
  """Returns the claim of H26 and H27: an arm as it runs against `low4_prior` with all levels."""

  def compared(row: dict, other: dict) -> tuple[float, float]:
    return over(row, row["final"], ALL_T), over(other, other["final_soft"], ALL_T)

  return Claim(
    f"{arm} v all levels of low4_prior", relative(rows, arm, "low4_prior", compared), 0.05
  )


def _loss_without_the_finest(rows: list[dict]) -> Claim:
  """Returns the claim of H29 and H30: an arm without its finest level at t > .7, by the loss."""

  def compared(row: dict, other: dict) -> tuple[float, float]:
    return row["final"]["loss"], other["final_soft"]["loss"]

  found = relative(rows, "octaves_until", "octaves_prior", compared)
  return Claim("octaves_until, loss v all levels of octaves_prior", found, 0.005)


def _loss_of_leaving_out(rows: list[dict], arm: str) -> Claim:
  """Returns the claim of H31: an arm's loss as evaluation runs it against all levels."""
  found = [
    row["final"]["loss"] / row["final_soft"]["loss"] - 1 for row in rows if row["arm"] == arm
  ]
  return Claim(f"{arm}, loss of leaving out v all levels", found, 0.005)


def _pairs_without_the_finest(rows: list[dict]) -> Claim:
  """Returns the claim of H29: pairs of the same two arms at t > .7."""

  def compared(row: dict, other: dict) -> tuple[float, float]:
    judged = (row, row["final"]), (other, other["final_soft"])
    return tuple(over_parts(of, found["density_buckets"], HIGH_NOISE) for of, found in judged)

  found = pairs(rows, "octaves_until", "octaves_prior", compared)
  shares = (found[:, 0] / found[:, 1]).tolist()
  return Claim("pairs at t > .7 over those of all levels", shares, 0.5)


def text(found: list[Verdict]) -> str:
  """Returns the verdicts for people, a line per claim."""
  lines = [("", "outcome", "numbers")]
  for verdict in found:
    head = (verdict.name, verdict.outcome)
    for claim in verdict.claims:
      lines.append((*head, claim.numbers))
      head = ("", "")
  return aligned(lines)
