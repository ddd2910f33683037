"""Tables and figures of docs/evidence.md's section on the study; its prose is written by hand.

  python -m benchmarks.pages.evidence              from the rows that there are, whatever their arms
  python -m benchmarks.pages.evidence --theory     computes the predictions anew, in two minutes

Measured rows are those of `benchmarks.study` and `benchmarks.probes`; predictions go to
results/study_theory.json.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks import rows as row_files
from benchmarks.pages import evidence_figures as figures
from benchmarks.pages import evidence_theory
from benchmarks.pages.complexity import fill, markdown
from benchmarks.rows import measured_rows
from benchmarks.trained.attention_mass import PATHS
from benchmarks.trained.study import SIZES, STAGES
from benchmarks.trained.study_summary import all_levels, arm_lines, middles, part_lines
from benchmarks.trained.study_verdict import verdicts
from freqformer.simulation import plots

ROOT = pathlib.Path(__file__).parents[2]
DOC = ROOT / "docs" / "evidence.md"
FIGURES = ROOT / "docs" / "figures"
COMMAND = "python -m benchmarks.pages.evidence"
THEORY = "study_theory"
_THEORY = row_files.RESULTS / f"{THEORY}.json"
AGAINST = "window"
_AGAINST = {"high": "octaves_prior", "vorta": "vorta"}  # in stages without a window
_SCREEN_TOKENS = 2048
CAPTIONS = {
  "regret": "regret over t, trained and predicted",
  "plane": "regret over t on the plane, trained and predicted",
  "plane_weights": "what routers weigh over t on the plane",
  "plane_left_out": "pairs over t on the plane, and the price of leaving levels out",
  "scale": "regret at high noise over tokens",
  "curves": "regret over steps, FLOPs and seconds",
  "core": "regret over t after 2,000 steps, trained and predicted",
  "core_curves": "regret over 2,000 steps, their FLOPs and seconds",
  "core_weights": "what routers weigh over t after 2,000 steps",
  "core_left_out": "pairs over t after 2,000 steps, and the price of leaving levels out",
  "weights": "what routers weigh over t",
  "mass": "where dense attention lies over t",
  "left_out": "pairs over t, and the price of leaving levels out",
  "transfer": "regret on other clips",
}
_NONE = "No rows yet."


@dataclasses.dataclass(frozen=True)
class Rows:
  """All rows of the page.

  Attributes:
    stages: of the study, by stage; one that is absent has none.
    probes: of `benchmarks.probes`.
    theory: of `evidence_theory`.
  """

  stages: Mapping[str, list[dict]]
  probes: list[dict]
  theory: list[dict]

  @classmethod
  def read(cls, folder: pathlib.Path) -> "Rows":
    """Reads the measured rows of a folder, and the stored predictions."""
    stages = {name: measured_rows(folder / f"study_{name}.json") for name in STAGES}
    return cls(stages, measured_rows(folder / "study_probes.json"), measured_rows(_THEORY))

  def of_theory(self, stage: str) -> list[dict]:
    """Returns the predictions for a stage."""
    return [row for row in self.theory if row["stage"] == stage]


def contents(found: Rows) -> tuple[dict[str, str], dict[str, Figure]]:
  """Returns what stands between the page's markers, and the figures that it shows, by name."""
  drawn = draw(found)
  shown = tables(found.stages, found.probes)
  for name, caption in CAPTIONS.items():
    image = f"![{caption}](figures/evidence_{name}.png)"
    shown[f"study figure {name}"] = image if name in drawn else _NONE
  return shown, drawn


def tables(stages: Mapping[str, list[dict]], probes: list[dict]) -> dict[str, str]:
  """Returns the page's tables by marker, of the rows that `Rows` names."""
  of_probe = {}
  for row in probes:
    of_probe.setdefault(row["probe"], []).append(row)
  of_stages = {}
  for stage in ("screen", "core", "plane", "high", "vorta"):
    rows = stages.get(stage)
    against = _AGAINST.get(stage, AGAINST)
    of_stages[f"study {stage}"] = _table(arm_lines(rows, against)) if rows else _NONE
    of_stages[f"study {stage} over t"] = _table(part_lines(rows)) if rows else _NONE
  core = all_levels(stages.get("core", []))
  long = all_levels(stages.get("long", []))
  beside = [row for row in core if row["arm"] == "dense"]
  return of_stages | {
    "study core all levels": _table(part_lines(core)) if core else _NONE,
    "study long": _table(part_lines(long + beside)) if long else _NONE,
    "study outcome": outcome(stages, probes),
    "study layers": by_setting(of_probe.get("layers", [])),
    "study windows": windows(of_probe.get("windows", [])),
    "study transfer": by_setting(of_probe.get("transfer", [])),
    "study thresholds": by_setting(of_probe.get("threshold", [])),
    "study statistics": by_setting(of_probe.get("statistics", [])),
    "study oracle": oracle(of_probe.get("oracle", [])),
    "study mass": mass(of_probe.get("mass", [])),
    "study bands": between_bands(of_probe.get("mass", [])),
    "study samples": samples(of_probe.get("samples", [])),
  }


def outcome(stages: Mapping[str, list[dict]], probes: list[dict]) -> str:
  """Returns what the rows say of each hypothesis."""
  lines = []
  for verdict in verdicts(stages, probes):
    numbers = "; ".join(claim.numbers for claim in verdict.claims)
    lines.append((verdict.name, numbers, verdict.outcome))
  return markdown(("", "measured", "outcome"), lines)


def by_setting(probes: list[dict]) -> str:
  """Returns regret and density, of all scored pairs, per arm and setting: means over seeds."""
  if not probes:
    return _NONE
  settings = list(probes[0]["results"])
  lines = []
  for arm, own in figures.by_name(probes).items():
    cells = []
    for name in settings:
      judged = [row["results"][name] for row in own]
      regret = np.mean([found.get("regret", found["loss"]) for found in judged])
      density = np.mean([found["density"] for found in judged])
      cells.append(f"{regret:.4f} ({density:.2g})")
    lines.append((arm, str(len(own)), *cells))
  return markdown(("regret (density)", "seeds", *settings), lines)


def windows(probes: list[dict]) -> str:
  """Returns regret over t of dense runs, as they are and in windows, seed by seed."""
  if not probes:
    return _NONE
  lines = []
  for row in probes:
    for setting, found in row["results"].items():
      values = (found["regret"], *found["regret_buckets"])
      name = f"seed {row['seed']}, {setting}"
      lines.append((name, f"{found['density']:.2g}", *(f"{value:.3f}" for value in values)))
  places = (f"{place:.2f}" for place in middles(probes[0], len(values) - 1))
  return markdown(("regret at t", "density", "all", *places), lines)


def oracle(probes: list[dict]) -> str:
  """Returns what heads gain by another branch, and what a branch matters, layer by layer.

  The gain is per part of t, the mean over heads, and of the head that gains most. What a branch
  matters is the regret of a head's worst branch less that of its best, the mean over heads and t.
  """
  if not probes:
    return _NONE
  lines = []
  for arm, own in figures.by_name(probes).items():
    heads = [row["results"]["heads"] for row in own]
    regret = np.mean([found["regret_buckets"] for found in heads], 0)
    gain = np.mean([found["gain"] for found in heads], 0)
    best = np.mean([found["best_gain"] for found in heads])
    cells = (f"{g:+.4f} of {r:.4f}" for g, r in zip(gain, regret, strict=True))
    forced = np.array([found["forced"] for found in heads])  # [seeds, layers, heads, branches, t]
    matters = np.ptp(forced.mean(-1), axis=3).mean((0, 2))
    layers = ", ".join(f"{value:.4f}" for value in matters)
    lines.append((arm, str(len(own)), *cells, f"{best:+.4f}", layers))
  parts = (f"gain, quarter {number}" for number in range(1, len(regret) + 1))
  head = ("one head forced", "seeds", *parts, "best head, all t", "worst less best, by layer")
  return markdown(head, lines)


def mass(probes: list[dict]) -> str:
  """Returns the percent of dense attention in each shell, layer by layer: means over heads."""
  if not probes:
    return _NONE
  uniform = probes[0]["results"]["uniform"]
  found = _layers_and_theory(probes, "mass")
  found["uniform"] = [uniform["mass"]] * len(found["Wiener"])
  lines = [(name, *map(_percents, over_t)) for name, over_t in found.items()]
  names = " / ".join(figures.shell_names(uniform["farthest"]))
  return _over_t(f"% at {names} tokens, t =", probes, lines)


def between_bands(probes: list[dict]) -> str:
  """Returns the share of energy that stays in its band, and its part in the high band."""
  if not probes:
    return _NONE
  low = PATHS.index("low to low")
  high = PATHS.index("high to high")
  lines = []
  for name, over_t in _layers_and_theory(probes, "bands").items():
    cells = (f"{100 * (s[low] + s[high]):.0f} ({100 * s[high]:.0f})" for s in over_t)
    lines.append((name, *cells))
  return _over_t("% in its band (high), t =", probes, lines)


def _layers_and_theory(probes: list[dict], name: str) -> dict[str, Sequence]:
  """Returns what a filter does, `[parts of t, shares]`: of heads and seeds the mean."""

  def by_layer(setting: str) -> np.ndarray:
    return np.mean([row["results"][setting][name] for row in probes], (0, 2))

  return {
    **{f"layer {number}": shares for number, shares in enumerate(by_layer("trained"), 1)},
    "untrained": by_layer("untrained").mean(0),
    "Wiener": probes[0]["results"]["wiener"][name],
  }


def _over_t(title: str, probes: list[dict], lines: list[tuple]) -> str:
  """Returns a table with a column per part of t."""
  places = middles(probes[0], len(lines[0]) - 1)
  return markdown((title, *(f"{place:.2f}" for place in places)), lines)


def _percents(shares: Sequence[float]) -> str:
  return " / ".join(f"{100 * share:.0f}" for share in shares)


def samples(probes: list[dict]) -> str:
  """Returns seams and flicker of samples, and of samples by the exact velocity."""
  if not probes:
    return _NONE
  lines = []
  groups = figures.by_name(probes)
  found = [(arm, own, "model") for arm, own in groups.items()]
  exact = [row for row in probes if "exact" in row["results"]]
  found += [("exact velocity", exact, "exact")] if exact else []
  for name, own, key in found:
    results = [row["results"][key] for row in own]
    seeds = "-" if key == "exact" else str(len(own))
    lines.append(
      (
        name,
        seeds,
        _triple([r["seam_ratio"] for r in results]),
        _triple([r["seam_ratio_twice"] for r in results]),
        f"{np.mean([r['flicker'] for r in results]):.2f}",
      )
    )
  return markdown(("samples", "seeds", "seams (t, y, x)", "of twice the tile", "flicker"), lines)


def _triple(values: list[list[float | None]]) -> str:
  """Returns means of a ratio per axis; "nan" where a grid has no border that could be measured."""
  return ", ".join(f"{value:.2f}" for value in np.mean(np.array(values, np.float64), 0))


def _table(lines: Sequence[Sequence[str]]) -> str:
  return markdown(lines[0], lines[1:])


def draw(found: Rows) -> dict[str, Figure]:
  """Returns the figures that there are rows for, by name."""
  drawn = {"transfer": figures.transfer(found.probes), "mass": figures.mass(found.probes)}
  if screen := found.stages.get("screen"):
    theory = found.of_theory("screen")
    drawn |= {
      "regret": figures.regret(screen, theory),
      "curves": figures.curves(screen),
      "weights": figures.weights(screen, found.probes, theory),
      "left_out": figures.left_out(screen, found.probes),
    }
  if core := found.stages.get("core"):
    theory = found.of_theory("screen")  # the same grid and lists
    drawn |= {
      "core": figures.regret(core, theory),
      "core_curves": figures.curves(core),
      "core_weights": figures.weights(core, [], theory),
      "core_left_out": figures.left_out(core, []),
    }
  if plane := found.stages.get("plane"):
    theory = found.of_theory("plane")
    drawn |= {
      "plane": figures.regret(plane, theory),
      "plane_weights": figures.weights(plane, [], theory),
      "plane_left_out": figures.left_out(plane, []),
    }
  by_size = {tokens: f"scale_{tokens}" for tokens in SIZES} | {_SCREEN_TOKENS: "screen"}
  by_size = dict(sorted(by_size.items()))
  drawn["scale"] = figures.scale(
    {tokens: found.stages.get(stage, []) for tokens, stage in by_size.items()},
    {tokens: found.of_theory(stage) for tokens, stage in by_size.items()},
    ("octaves_prior", "window"),
  )
  return {name: figure for name, figure in drawn.items() if figure is not None}


def main(argv: Sequence[str] | None = None) -> None:
  """Fills the page and draws its figures."""
  parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
  parser.add_argument("--theory", action="store_true", help="compute the predictions anew")
  parser.add_argument("--rows", help="folder of the measured rows", default=row_files.RESULTS)
  parser.add_argument("--page", help="file to fill", default=DOC)
  parser.add_argument("--figures", help="folder of the figures", default=FIGURES)
  args = parser.parse_args(argv)
  if args.theory or not measured_rows(_THEORY):
    row_files.write_rows(THEORY, evidence_theory.rows(), f"{COMMAND} --theory")
  shown, drawn = contents(Rows.read(pathlib.Path(args.rows)))
  page = pathlib.Path(args.page)
  page.write_text(fill(page.read_text(), shown))
  for name, figure in drawn.items():
    plots.save(figure, pathlib.Path(args.figures) / f"evidence_{name}.png")


if __name__ == "__main__":
  main()
