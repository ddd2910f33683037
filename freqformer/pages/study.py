"""Shows a study: tables for a terminal, and a page with curves and Pareto fronts.

Trials that differ in nothing but their seed are summed up by mean and spread.
"""

import json
import pathlib
import statistics
import string
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from freqformer.disk import write_whole
from freqformer.pages import html
from freqformer.pages.files import metric_rows
from freqformer.pages.losses import WORK, loss_figure
from freqformer.pages.text import aligned

_COLUMNS = {
  "trial": "",
  "val_loss": ".4f",
  "val_soft_loss": ".4f",
  "val_density": ".4f",
  "attn/dense": ".3f",
  "router_entropy": ".4f",
  "step": "d",
  "flops": ".3g",
  "seconds": ".0f",
  "status": "",
}
_MEANS = {
  "mean over seeds": "",
  "n": "",
  "val_loss": ".4f",
  "+-": ".4f",
  "flops": ".3g",
  "seconds": ".0f",
}
_COSTS = ("flops", "seconds")  # that a validation loss is held against


def seed_means(rows: Sequence[dict]) -> list[dict]:
  """Returns a row for each two or more finished trials that differ in nothing but `seed`.

  Such a row has `mean_of` (trials), `n`, `trials` (how many there are, finished or not), `val_loss`
  (the mean), `+-` (its sample standard deviation), and the means of `flops` and `seconds`.
  """
  groups = {}
  for row in rows:
    shared = {key: value for key, value in row["overrides"].items() if key != "seed"}
    groups.setdefault(json.dumps(shared, sort_keys=True, default=list), []).append(row)
  found = []
  for shared, own in groups.items():
    done = [row for row in own if row["val_loss"] is not None]
    if len(done) > 1:
      losses = [row["val_loss"] for row in done]
      means = {"val_loss": statistics.mean(losses), "+-": statistics.stdev(losses)}
      for key in _COSTS:
        values = [row[key] for row in done if row.get(key) is not None]
        means[key] = statistics.mean(values) if values else None
      named = {"mean_of": [row["trial"] for row in done], "n": len(done), "trials": len(own)}
      found.append(named | means | {"overrides": json.loads(shared)})
  return sorted(found, key=lambda row: row["val_loss"])


def table(rows: Sequence[dict]) -> str:
  """Returns aligned text; trials in order of validation loss, unfinished ones last.

  `flops` and `seconds` are those of training, see `Metrics`; `attn/dense` is attention FLOPs of a
  training step over those of dense attention. Means over seeds follow, if there are any.
  """
  text = _text(ordered(rows), _COLUMNS)
  means = [_named(row) for row in seed_means(rows)]
  return f"{text}\n\n{_text(means, _MEANS)}" if means else text


def ordered(rows: Sequence[dict]) -> list[dict]:
  """Returns rows in order of validation loss, those without one last."""
  return sorted(rows, key=lambda row: (row["val_loss"] is None, row["val_loss"]))


def _named(mean: dict) -> dict:
  """Returns a row of `seed_means` with its first two cells as text."""
  count = f"{mean['n']} of {mean['trials']}"
  return mean | {"mean over seeds": _short(mean["overrides"]), "n": count}


def _short(overrides: dict) -> str:
  """Returns `lr=0.1,method=radial`: overrides by the last part of their key."""
  texts = (f"{key.rsplit('.', 1)[-1]}={value}" for key, value in overrides.items())
  return ",".join(texts) or "default"


def _text(rows: Sequence[dict], columns: dict[str, str]) -> str:
  lines = [list(columns)]
  for row in rows:
    cells = {column: row.get(column) for column in columns}
    lines.append(["" if x is None else format(x, columns[name]) for name, x in cells.items()])
  return aligned(lines)


def validations(rows: Sequence[dict], study: pathlib.Path) -> dict[str, list[dict]]:
  """Returns the validation lines of metrics.jsonl by trial, of those trials that have any."""
  found = {row["trial"]: metric_rows(study / row["trial"], "val") for row in rows}
  return {name: lines for name, lines in found.items() if lines}


def pareto(rows: Sequence[dict], cost: str) -> list[dict]:
  """Returns the rows that no other one beats in both validation loss and `cost`, cheapest first.

  Of rows that are equal in both the first one is taken; one that lacks either is never on the
  front.
  """
  known = [row for row in rows if row["val_loss"] is not None and row.get(cost) is not None]
  front = []
  for row in sorted(known, key=lambda row: (row[cost], row["val_loss"])):
    if not front or row["val_loss"] < front[-1]["val_loss"]:
      front.append(row)
  return front


def write_study(study, rows: Sequence[dict]) -> pathlib.Path:
  """Writes `<study>/report.html` and `losses.png`, and returns the path of the page.

  Args:
    study: an existing folder, with a folder for each trial.
    rows: of `freqformer.command.sweep.sweep`.
  """
  study = pathlib.Path(study)
  curves = validations(rows, study)
  drawn = html.absent("No trial has a validation yet.")
  if curves:
    figure = loss_figure(curves)
    figure.savefig(study / "losses.png", dpi=110)
    drawn = html.image(figure, "validation loss of all trials over steps, FLOPs and seconds")
  sections = [
    html.section(
      "Trials",
      "By validation loss; cost is attention FLOPs of a training step over dense attention's.",
      _trials(rows),
      "study.json",
    ),
    html.section(
      "Validation loss against cost",
      "Of finished trials. The line joins those that no other trial beats in both.",
      _fronts(rows),
      "study.json",
    ),
    html.section("Losses", "On held-out clips, of all trials.", drawn, "metrics.jsonl"),
  ]
  path = study / "report.html"
  write_whole(path, html.page(f"FreqFormer study: {study.resolve().name}", sections))
  return path


def _trials(rows: Sequence[dict]) -> str:
  """Shows all trials, what each one overrides, and the means over seeds."""
  found = html.table(
    _words(_COLUMNS), [[row.get(key) for key in _COLUMNS] for row in ordered(rows)]
  )
  means = [_named(row) for row in seed_means(rows)]
  if means:
    lines = [[row[key] for key in _MEANS] for row in means]
    found += html.table(_words(_MEANS), lines)
    found += "<p>+- is the sample standard deviation of the validation loss.</p>"
  overrides = [(row["trial"], json.dumps(row["overrides"], default=list)) for row in rows]
  return f"{found}<details><summary>Overrides</summary>{html.facts(overrides)}</details>"


def _words(columns: Mapping[str, str]) -> list[str]:
  return [name.replace("_", " ") for name in columns]


def _fronts(rows: Sequence[dict]) -> str:
  """Shows validation loss against FLOPs and against seconds, and names who is on a front."""
  fronts = {cost: pareto(rows, cost) for cost in _COSTS}
  named = {row["trial"]: row for front in fronts.values() for row in front}
  if not named:
    return html.absent("No trial has finished yet.")
  labels = {row["trial"]: _label(i) for i, row in enumerate(ordered(list(named.values())))}
  lines = []
  for name, label in labels.items():
    on = [WORK[cost] for cost, front in fronts.items() if named[name] in front]
    row = named[name]
    lines.append([label, name, row["val_loss"], row.get("flops"), row.get("seconds"), on])
  head = ["", "on a front", "validation loss", WORK["flops"], WORK["seconds"], "best for its"]
  drawn = html.image(_front_figure(rows, fronts, labels), "validation loss against cost")
  return drawn + html.table(head, lines)


def _label(number: int) -> str:
  """Returns A, B, ..., Z, A1, B1, ..."""
  turn, place = divmod(number, len(string.ascii_uppercase))
  return f"{string.ascii_uppercase[place]}{turn or ''}"


def _front_figure(rows: Sequence[dict], fronts: dict[str, list], labels: dict[str, str]) -> Figure:
  figure, axes = html.panels(len(fronts), 9.5, 3.2)
  for axis, (cost, front) in zip(axes, fronts.items(), strict=True):
    known = [row for row in rows if row["val_loss"] is not None and row.get(cost) is not None]
    axis.scatter(
      [row[cost] for row in known], [row["val_loss"] for row in known], s=18, color=html.GREY
    )
    axis.plot(
      [row[cost] for row in front],
      [row["val_loss"] for row in front],
      "o-",
      ms=6,
      lw=1.2,
      color=html.COLOURS[0],
      drawstyle="steps-post",  # what a budget between two trials buys is the cheaper one
    )
    for row in front:
      place = (row[cost], row["val_loss"])
      axis.annotate(labels[row["trial"]], place, xytext=(5, 4), textcoords="offset points")
    axis.set(xlabel=WORK[cost], xlim=(0, None))
    axis.locator_params("x", nbins=5)
  axes[0].set_ylabel("validation loss")
  return figure
