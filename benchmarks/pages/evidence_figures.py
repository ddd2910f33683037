"""Figures of docs/evidence.md: trained arms are drawn solid, theory dashed."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.trained.study_summary import by_part, measure, middles, over, over_parts
from benchmarks.trained.study_verdict import HIGH_NOISE, routing_of

# Variants of an arm have its colour and another line.
STYLES = {
  "octaves": ("C0", "-"),
  "octaves_prior": ("C9", "-"),
  "octaves_hard": ("C0", ":"),
  "octaves_mid": ("C0", "-."),
  "octaves_until": ("C9", "--"),
  "octaves_either": ("C9", ":"),
  "window": ("C1", "-"),
  "freqformer": ("C2", "-"),
  "freqformer_time": ("C2", ":"),
  "freqformer_fixed": ("C2", "-."),
  "freqformer_slope": ("C2", (0, (1, 3))),
  "dense": ("black", "-"),
  "low4": ("C3", "-"),
  "low4_prior": ("C3", ":"),
  "low4_late": ("C3", "--"),
  "low4_budget": ("C3", "-."),
  "low2": ("C4", "-"),
  "block_topk": ("C5", "-"),
  "octaves4_prior": ("C9", "-"),
  "low8_prior": ("C3", "-"),
  "vorta": ("C6", "-"),
  "freqformer_random": ("C2", "--"),
  "joint": ("C8", "-"),
  "joint_and_low": ("C8", "--"),
  "topk_pooled": ("C7", "-"),
  "topk_gated": ("C7", ":"),
  "octaves_gates": ("C0", "--"),
}
PYRAMIDS = ("octaves", "octaves_prior", "octaves4_prior")  # whose weights are drawn level by level
_OTHER = ("grey", "-")
_NOISE = "t (1 is noise)"
# choice: less than training shows; predictions at high noise fall to a tenth of it.
_LEAST_REGRET = 1e-3


def by_name(rows: Iterable[dict]) -> dict[str, list[dict]]:
  """Returns rows by arm, in the order of `STYLES`, then as they come."""
  found = {arm: [] for arm in STYLES}
  for row in rows:
    found.setdefault(row["arm"], []).append(row)
  return {arm: own for arm, own in found.items() if own}


def regret(rows: list[dict], predicted: list[dict]) -> Figure:
  """Draws regret over t: trained, a line per arm and thin ones per seed; beside it, predicted.

  A prediction is theory's excess of one layer times the Bayes risk of that part of t. Theory sees
  lists alone, which an arm shares with its `_prior`.
  """
  arms = {row["arm"].removesuffix("_prior") for row in rows}
  figure, (trained, theory) = _panels(2, share=True)
  for arm, own in by_name(rows).items():
    parts = [by_part(row, row["final"]) for row in own]
    places = middles(own[0], len(parts[0]))
    _thin_and_mean(trained, arm, [places] * len(parts), parts)
  bayes = np.mean([row["final"]["bayes_buckets"] for row in rows], 0)
  places = middles(rows[0], len(bayes))
  for row in predicted:
    if "excess" in row and row["arm"].removesuffix("_prior") in arms:
      color, _ = STYLES[row["arm"]]
      values = np.array(row["excess"]) / 100 * bayes
      # Of two arms that see the same means, the first line shows on both sides of the second.
      width = 3 if row["arm"] == "low2" else 1.4
      theory.plot(row["times"], values, color=color, ls="--", lw=width, label=row["arm"])
  for axis in (trained, theory):
    axis.plot(places, bayes, color="grey", lw=3, alpha=0.3, label="Bayes risk")
    axis.set(yscale="log", xlabel=_NOISE)
  trained.set_ylim(bottom=_LEAST_REGRET)
  trained.set(ylabel=f"{measure(rows[0])}: squared error of v", title=f"trained, {_seeds(rows)}")
  theory.set(title="theory: one layer, best linear weights")
  _legends(trained, theory)
  return figure


def curves(rows: list[dict]) -> Figure:
  """Draws regret over steps, training FLOPs and seconds."""
  figure, axes = _panels(3, share=True)
  units = {"step": "steps", "flops": "training FLOPs", "seconds": "training seconds (shared CPU)"}
  for axis, (key, label) in zip(axes, units.items(), strict=True):
    for arm, own in by_name(rows).items():
      x = [[point[key] for point in row["curve"]] for row in own]
      y = [[over(row, point) for point in row["curve"]] for row in own]
      _thin_and_mean(axis, arm, x, y)
    axis.set(yscale="log", xlabel=label)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
  axes[0].set(ylabel=f"{measure(rows[0])}, mean over t")
  _legends(axes[-1])
  figure.suptitle(_seeds(rows), fontsize=10)
  return figure


def weights(rows: list[dict], probes: list[dict], predicted: list[dict]) -> Figure | None:
  """Draws what routers weigh over t, beside theory: levels of octaves, windows, low bands.

  Returns:
    The figure; None if no row has a routing.
  """
  routed = [(row, routing_of(row, probes)) for row in rows]
  routed = [(row, found) for row, found in routed if found is not None]
  first = [row | {"first": [shares[0] for shares in found]} for row, found in routed]
  one_level = [row for row in first if row["arm"].startswith("low")]
  bands = [row for row in first if row["arm"].startswith("freqformer")]
  pyramids = {arm: [(row, found) for row, found in routed if row["arm"] == arm] for arm in PYRAMIDS}
  pyramids = {arm: own for arm, own in pyramids.items() if own}
  count = len(pyramids) + bool(one_level) + bool(bands)
  if not count:
    return None
  figure, axes = _panels(count)
  panels = iter(axes)
  for arm, own in pyramids.items():
    axis = next(panels)
    _draw_levels(axis, own, predicted)
    axis.set(title=f"{arm}: weights of the levels")
  if one_level:
    axis = next(panels)
    _draw_first(axis, one_level)
    for row in predicted:
      if "mass" in row:
        inside = [shares[0] for shares in row["mass"]]
        axis.plot(row["times"], inside, "--", color="grey", label="theory")
    axis.set(title="weight of the window beside a low level")
  if bands:
    axis = next(panels)
    _draw_first(axis, bands)
    axis.set(title="freqformer: probability of the low band")
  for axis in axes:
    axis.set(xlabel=_NOISE, ylim=(0, 1))
  axes[0].set(ylabel="mean over layers and heads")
  _legends(*axes)
  return figure


def _draw_first(axis: Axes, rows: list[dict]):
  """Draws each arm's share of the first branch."""
  for arm, own in by_name(rows).items():
    places = middles(own[0], len(own[0]["first"]))
    _thin_and_mean(axis, arm, [places] * len(own), [row["first"] for row in own])


def _draw_levels(axis: Axes, routed: list[tuple[dict, list]], predicted: list[dict]):
  """Draws octaves' weights of each level, of rows with their routing, and the Wiener mass."""
  row, first = routed[0]
  places = middles(row, len(first))
  for level in range(len(first[0])):
    values = [[shares[level] for shares in found] for _, found in routed]
    style = {"color": f"C{level}", "marker": "o", "ms": 3}
    axis.plot(places, np.mean(values, 0), label=f"cells of {2**level}: learned", **style)
    for line in values:
      axis.plot(places, line, color=f"C{level}", lw=0.5, alpha=0.5)
  for row in predicted:
    for level, mass in enumerate(zip(*row.get("mass", ()), strict=True)):
      axis.plot(row["times"], mass, "--", color=f"C{level}", label=f"cells of {2**level}: theory")


def mass(probes: list[dict]) -> Figure | None:
  """Draws the shells' shares of dense attention over t, a panel per layer and thin lines per head.

  The Wiener kernel is dashed, uniform attention dotted.

  Returns:
    The figure; None if no row is of that probe.
  """
  found = [row for row in probes if row["probe"] == "mass"]
  if not found:
    return None
  first = found[0]["results"]
  learned = np.array([row["results"]["trained"]["mass"] for row in found])
  by_layer = learned.transpose(1, 4, 0, 2, 3)  # [layers, shells, seeds, heads, parts of t]
  figure, axes = _panels(len(by_layer), share=True, width=3)
  places = middles(found[0], by_layer.shape[-1])
  for number, (axis, of_shells) in enumerate(zip(axes, by_layer, strict=True), 1):
    for shell, name in enumerate(shell_names(first["uniform"]["farthest"])):
      color = f"C{shell}"
      heads = of_shells[shell].reshape(-1, len(places))
      axis.plot(places, heads.mean(0), color=color, marker="o", ms=3, label=f"{name} tokens")
      for line in heads:
        axis.plot(places, line, color=color, lw=0.5, alpha=0.5)
      theory = [shares[shell] for shares in first["wiener"]["mass"]]
      axis.plot(places, theory, "--", color=color, lw=1)
      axis.axhline(first["uniform"]["mass"][shell], color=color, lw=0.8, ls=":")
    axis.set(xlabel=_NOISE, title=f"layer {number}")
  axes[0].set(ylabel="share of attention")
  axes[0].set_ylim(bottom=0)
  _legends(axes[-1])
  figure.suptitle("dense; dashed: Wiener kernel, dotted: uniform", fontsize=10)
  return figure


def shell_names(farthest: Sequence[int]) -> list[str]:
  """Returns each shell's distances in tokens, as "2-3", of their last ones."""
  nearest = [0, *(last + 1 for last in farthest[:-1])]
  return [f"{a}-{b}" if a < b else str(a) for a, b in zip(nearest, farthest, strict=True)]


def scale(
  sizes: dict[int, list[dict]], predicted: dict[int, list[dict]], arms: Sequence[str]
) -> Figure | None:
  """Draws regret at high noise over tokens, trained and predicted; None if there is no row.

  Args:
    sizes: rows by number of tokens.
    predicted: theory's rows by number of tokens.
    arms: that are drawn. Theory sees lists alone, which `octaves` and `octaves_prior` share.
  """
  if not any(sizes.values()):
    return None
  figure, (axis,) = _panels(1, width=6)
  for arm in arms:
    color, line = STYLES[arm]
    trained = {
      tokens: [over(row, row["final"], HIGH_NOISE) for row in rows if row["arm"] == arm]
      for tokens, rows in sizes.items()
    }
    trained = {tokens: values for tokens, values in trained.items() if values}
    for tokens, values in trained.items():
      axis.plot([tokens] * len(values), values, "_", color=color, ms=10)
    means = [np.mean(values) for values in trained.values()]
    axis.plot(list(trained), means, color=color, ls=line, marker="o", ms=3, label=arm)
    expected = {
      tokens: _expected(sizes[tokens], rows, arm) for tokens, rows in predicted.items() if rows
    }
    expected = {tokens: value for tokens, value in expected.items() if value is not None}
    style = {"color": color, "ls": "--", "lw": 1.4}
    axis.plot(list(expected), list(expected.values()), label=f"{arm}, theory", **style)
  ticks = list(sizes)
  axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="regret at t > .7")
  axis.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks], minor=False)
  axis.xaxis.set_minor_locator(NullLocator())
  axis.set(title="the same windows, more tokens")
  _legends(axis)
  return figure


def _expected(rows: list[dict], predicted: list[dict], arm: str) -> float | None:
  """Returns theory's regret of an arm at high noise; None if nothing is predicted or was run."""
  own = [
    row for row in predicted if row["arm"].removesuffix("_prior") == arm.removesuffix("_prior")
  ]
  if not own or not rows:
    return None
  bayes = np.mean([row["final"]["bayes_buckets"] for row in rows], 0)
  return over_parts(rows[0], np.array(own[0]["excess"]) / 100 * bayes, HIGH_NOISE)


def left_out(rows: list[dict], probes: list[dict]) -> Figure | None:
  """Draws pairs over t of what evaluation runs and of all levels, and what leaving out costs.

  The regret's change is drawn for every threshold that was probed, the trained one's from the rows.

  Returns:
    The figure; None without rows of octaves.
  """
  own = by_name(row for row in rows if "density_buckets" in row.get("final_soft", {}))
  own = {arm: found for arm, found in own.items() if arm.startswith(("octaves", "low"))}
  if not own:
    return None
  figure, (density, change) = _panels(2)
  for arm, found in own.items():
    places = middles(found[0], len(found[0]["final"]["density_buckets"]))
    run = [row["final"]["density_buckets"] for row in found]
    _thin_and_mean(density, arm, [places] * len(run), run)
    color, _ = STYLES.get(arm, _OTHER)
    whole = np.mean([row["final_soft"]["density_buckets"] for row in found], 0)
    density.plot(places, whole, color=color, ls="--", lw=1)
    ratio = [
      100 * (np.divide(by_part(row, row["final"]), by_part(row, row["final_soft"])) - 1)
      for row in found
    ]
    _thin_and_mean(change, arm, [places] * len(ratio), ratio)
  for arm in PYRAMIDS:
    swept = [row for row in probes if row["probe"] == "threshold" and row["arm"] == arm]
    _draw_thresholds(change, swept)
  density.set(yscale="log", ylabel="pairs / n^2", title="run; dashed: all levels")
  change.set(ylabel=f"change of {measure(rows[0])}, %", title="levels left out, against all levels")
  change.axhline(0.5, color="grey", lw=0.8, ls="--")
  for axis in (density, change):
    axis.set(xlabel=_NOISE)
  _legends(density, change)
  return figure


def _draw_thresholds(axis: Axes, probes: list[dict]):
  """Draws the change of an arm's regret at the thresholds that were probed above 0."""
  if not probes:
    return
  arm = probes[0]["arm"]
  _, line = STYLES[arm]
  names = [name for name in probes[0]["results"] if name != "0"]
  for number, name in enumerate(names):
    ratio = [
      100 * (np.divide(_parts(row["results"][name]), _parts(row["results"]["0"])) - 1)
      for row in probes
    ]
    places = middles(probes[0], len(ratio[0]))
    grey = str(0.75 * (1 - number / len(names)))
    style = {"color": grey, "lw": 1, "ls": line, "marker": "_"}
    axis.plot(places, np.mean(ratio, 0), label=f"{arm}, below {name}", **style)


def _parts(judged: dict) -> list[float]:
  return judged.get("regret_buckets", judged["buckets"])


def transfer(probes: list[dict]) -> Figure | None:
  """Draws regret of runs that are evaluated on other grids and motions; None if there is none."""
  found = [row for row in probes if row["probe"] == "transfer"]
  if not found:
    return None
  figure, (axis,) = _panels(1, width=7)
  names = list(found[0]["results"])
  groups = by_name(found)
  for number, (arm, own) in enumerate(groups.items()):
    color, line = STYLES.get(arm, _OTHER)
    values = [[_overall(row["results"][name]) for name in names] for row in own]
    place = np.arange(len(names)) + 0.6 * ((number + 0.5) / len(groups) - 0.5)
    filled = color if line == "-" else "none"
    axis.plot(place, np.mean(values, 0), "o", color=color, mfc=filled, label=arm)
    for seed in values:
      axis.plot(place, seed, "_", color=color, ms=8)
  axis.set_xticks(range(len(names)), names)
  axis.set(ylabel="regret, mean over t", title=f"without retraining, {_seeds(found)}")
  axis.set_ylim(bottom=0)
  _legends(axis)
  return figure


def _overall(judged: dict) -> float:
  return judged.get("regret", judged["loss"])


# ---- parts of figures ----------------------------------------------------------------------------


def _panels(count: int, share: bool = False, width: float = 4.2) -> tuple[Figure, Sequence[Axes]]:
  figure = Figure(figsize=(width * count + 1, 3.8), layout="constrained")
  axes = np.atleast_1d(figure.subplots(1, count, sharey=share))
  for axis in axes:
    axis.grid(alpha=0.2)
  return figure, axes


def _thin_and_mean(axis: Axes, arm: str, x: Sequence, y: Sequence):
  """Draws a thin line per seed and, through their mean, a thick one with the arm's name."""
  color, line = STYLES.get(arm, _OTHER)
  for one_x, one_y in zip(x, y, strict=True):
    axis.plot(one_x, one_y, color=color, ls=line, lw=0.5, alpha=0.5)
  axis.plot(np.mean(x, 0), np.mean(y, 0), color=color, ls=line, lw=1.6, label=arm)


def _legends(*axes: Axes):
  for axis in axes:
    outside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if axis is axes[-1] else {}
    axis.legend(frameon=False, fontsize=7, **outside)


def _seeds(rows: list[dict]) -> str:
  """Returns how many seeds the arms have, for a title."""
  counts = {len(own) for own in by_name(rows).values()}
  least = min(counts)
  most = max(counts)
  text = str(least) if least == most else f"{least} to {most}"
  return f"{text} seed{'s' * (most > 1)} per arm"
