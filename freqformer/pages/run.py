"""Writes one HTML file that shows a run: samples, losses, routing, cost. It needs no network.

Each section reads some files of the run and names them. A section whose file is absent says so, and
the others are shown.
"""

import html
import json
import pathlib
from collections.abc import Callable

from absl import logging

from freqformer.config import ConfigError
from freqformer.disk import write_whole
from freqformer.pages import cost, evaluation, losses, routing, videos
from freqformer.pages.files import Absent, read_json
from freqformer.pages.html import absent, facts, page, section
from freqformer.train.resume import change_text

_FACTS = {
  "method": "attention method",
  "device": "device",
  "git": "git revision",
  "params": "parameters",
  "tokens": "tokens per clip",
  "tiles": "tiles",
  "grid": "grid, t × y × x tokens",
  "tile": "tile, t × y × x tokens",
}
_PARTS = {"train": "training with validation, samples and reports"}


def _facts(workdir: pathlib.Path) -> str:
  """Shows run.json."""
  run = {"seconds": {}, "versions": {}, "changes": [], **read_json(workdir, "run.json")}
  rows = []
  if run.get("finished") is False:
    rows.append(("state", "training has not finished"))
  rows += [(name, run[key]) for key, name in _FACTS.items() if key in run]
  if "best" in run:
    best = run["best"]
    rows.append(("best checkpoint", f"step {best['step']}, validation loss {best['val_loss']:.4g}"))
  for name, value in run["seconds"].items():
    rows.append((f"{_PARTS.get(name, name)}, seconds", float(value)))
  if run["versions"]:
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items())))
  for change in run["changes"]:
    rows.append((f"config changed at step {change['step']}", change_text(change["keys"])))
  return facts(rows)


def _config(workdir: pathlib.Path) -> str:
  """Shows config.json, folded."""
  text = html.escape(json.dumps(read_json(workdir, "config.json"), indent=2))
  return f"<details><summary>Show the full config</summary><pre>{text}</pre></details>"


# By title: the files that a section shows, a sentence, and the function that makes its HTML from
# the run's folder.
SECTIONS: dict[str, tuple[str, str, Callable[[pathlib.Path], str]]] = {
  "Samples": (
    "samples/ and real/",
    "Generated, and a real clip of the class or caption, which went through the same codec.",
    videos.samples,
  ),
  "Samples over training": (
    f"{videos.TRAINING}/",
    "The same noise at every validation, drawn with the averaged weights in few steps.",
    videos.in_training,
  ),
  "Losses": (
    "metrics.jsonl",
    "The velocity error on held-out clips and in training, over steps, FLOPs and seconds.",
    losses.losses,
  ),
  "Loss by timestep": (
    "metrics.jsonl",
    "A model no better than the linear predictor has learned only channel statistics.",
    losses.by_timestep,
  ),
  "Routing": (
    "routing.json",
    "Which branch each head takes, or what its levels weigh, by timestep: t near 1 is noise. Hard: "
    "the likeliest branch alone, which is what samples run unless levels are mixed.",
    routing.routing,
  ),
  "Cost and seconds": (
    "cost.json, metrics.jsonl, samples/sampling.json and seconds.json",
    "What the run costs over the same model with dense attention. FLOPs are counted, seconds were "
    "measured where they are shown.",
    cost.cost,
  ),
  "Evaluation": (
    "evaluation.json and validation/",
    "Measured on samples and on clips. The floor is real clips against others; controls are real "
    "clips that were spoilt. Seams (differences across attention's tiles over elsewhere) "
    "and flicker (fast changes over those of validation clips) are 1 in real clips.",
    evaluation.evaluation,
  ),
  "Facts": ("run.json", "What ran, on what, and how long each part took.", _facts),
  "Config": ("config.json", "Every setting of the run.", _config),
}


def _show(workdir: pathlib.Path, title: str) -> str:
  """Returns a section; if its function fails, the reason is shown in its place."""
  source, intro, body = SECTIONS[title]
  try:
    inner = body(workdir)
  except Absent as reason:
    inner = absent(f"Not shown: {reason}")
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    logging.exception("the report's section %r cannot be drawn", title)
    inner = absent(f"Not shown: {source} has another form than expected ({error!r}).")
  except OSError as error:  # a file that another process replaces at this moment, for example
    logging.warning("the report's section %r cannot be drawn: %s", title, error)
    inner = absent(f"Not shown: a file cannot be read ({error}).")
  return section(title, intro, inner, source)


def write_report(workdir) -> pathlib.Path:
  """Writes `<workdir>/report.html` from what the run has written so far and returns its path.

  Raises:
    ConfigError: `workdir` is no folder.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise ConfigError(f"{workdir} is no folder; give --workdir the folder of a run.")
  title = f"FreqFormer run: {workdir.resolve().name}"
  path = workdir / "report.html"
  sections = [_show(workdir, name) for name in SECTIONS]
  write_whole(path, page(title, sections))  # a reader never meets half a page
  return path
