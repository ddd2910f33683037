"""Shows several runs side by side: costs, losses over each other, samples, how configs differ."""

import json
import pathlib
from collections.abc import Sequence

from flax.traverse_util import flatten_dict

from freqformer.config import ConfigError
from freqformer.disk import write_whole
from freqformer.pages.files import json_if_any, metric_rows
from freqformer.pages.html import absent, image, page, section, table, video
from freqformer.pages.losses import loss_figure
from freqformer.pages.videos import by_class, real_file, sample_files
from freqformer.train.experiment import of_record
from freqformer.train.resume import settings

# choice: videos of a page, see `freqformer.pages.videos`.
_MAX_VIDEOS = 36
_CELL = 60  # characters of a setting
_TABLE = {
  "method": "method",
  "params": "parameters",
  "step": "step",
  "val_loss": "validation loss",
  "val_soft_loss": "soft routing",
  "regret": "regret",
  "density": "density",
  "training_flops": "training FLOPs",
  "training_of_dense": "of dense, a step",
  "sampling_of_dense": "of dense, a sample",
  "seconds": "training, s",
  "seconds_per_sample": "a sample, s",
  "device": "device",
}


def write_runs(workdirs: Sequence, out) -> pathlib.Path:
  """Writes a page of several runs to the file `out` and returns its path.

  Raises:
    ConfigError: there are fewer than two, or one is no folder of a run.
  """
  workdirs = [pathlib.Path(workdir) for workdir in workdirs]
  if len(workdirs) < 2:
    raise ConfigError(f"--compare needs two runs at least, got {len(workdirs)}.")
  for workdir in workdirs:
    if not (workdir / "metrics.jsonl").exists():
      raise ConfigError(f"{workdir} is no folder of a run: it has no metrics.jsonl.")
  runs = _named(workdirs)
  sections = [
    section(
      "Samples",
      "By class: a sample of each run, and a real training clip.",
      _samples(runs),
      "samples/ and real/",
    ),
    section(
      "Losses",
      "On held-out clips, as each run evaluates. Training is thin and smoothed; losses compare "
      "where data and sizes are the same.",
      _losses(runs),
      "metrics.jsonl",
    ),
    section(
      "Figures",
      "FLOPs are counted, and of dense attention in the same model; seconds are the machine's.",
      _figures(runs),
      "run.json, metrics.jsonl, cost.json and samples/sampling.json",
    ),
    section("Configs", "Settings that differ.", _differences(runs), "config.json"),
  ]
  out = pathlib.Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  write_whole(out, page("FreqFormer runs side by side", sections))
  return out


def _named(workdirs: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
  """Returns the runs by the name of their folder, or by their path where names are equal."""
  names = [workdir.resolve().name for workdir in workdirs]
  unique = len(set(names)) == len(names)
  found = dict(zip(names if unique else map(str, workdirs), workdirs, strict=True))
  if len(found) < len(workdirs):
    raise ConfigError("--compare names a run twice; name different ones.")
  return found


def _samples(runs: dict[str, pathlib.Path]) -> str:
  files = {name: sample_files(workdir) for name, workdir in runs.items()}
  classes = sorted({own for found in files.values() for own in found})
  if not classes:
    return absent("None of these runs has samples (written by eval.py).")
  shown = classes[: max(1, _MAX_VIDEOS // (len(runs) + 1))]
  cards = {}
  for own in shown:
    clips = [real_file(workdir, own) for workdir in runs.values()]
    cards[own] = [video(found[own][0], name) for name, found in files.items() if own in found]
    cards[own] += [video(clip, "real") for clip in clips if clip is not None][:1]
  text = by_class(cards, {})
  if len(shown) < len(classes):
    text += f"<p>{len(classes) - len(shown)} further classes are in the runs' folders.</p>"
  return text


def _losses(runs: dict[str, pathlib.Path]) -> str:
  curves = {name: metric_rows(workdir, "val") for name, workdir in runs.items()}
  training = {name: metric_rows(workdir, "train") for name, workdir in runs.items()}
  return image(loss_figure(curves, training), "loss of all runs over steps, FLOPs and seconds")


def figures(workdir: pathlib.Path) -> dict:
  """Returns the numbers of a run that its row shows; what it lacks is None."""
  run = json_if_any(workdir, "run.json")
  cost = json_if_any(workdir, "cost.json")
  last = {kind: (metric_rows(workdir, kind) or [{}])[-1] for kind in ("train", "val", "val_soft")}
  found = {
    "method": run.get("method"),
    "params": run.get("params"),
    "device": run.get("device"),
    "step": last["train"].get("step"),
    "val_loss": last["val"].get("loss"),
    "val_soft_loss": last["val_soft"].get("loss"),
    "regret": last["val"].get("regret"),
    "density": last["val"].get("density"),
    "training_flops": last["train"].get("flops"),
    "seconds": last["train"].get("seconds"),
  }
  for stage in ("training", "sampling"):
    own = cost.get(stage, {})
    if own:
      ratio = own["own"]["total_flops"] / own["dense"]["total_flops"]
      found[f"{stage}_of_dense"] = ratio
  sampling = json_if_any(workdir, "samples/sampling.json")
  return found | {"seconds_per_sample": sampling.get("seconds_per_sample")}


def _figures(runs: dict[str, pathlib.Path]) -> str:
  rows = []
  for name, workdir in runs.items():
    found = figures(workdir)
    rows.append([name, *map(found.get, _TABLE)])
  return table(["run", *_TABLE.values()], rows)


def _settings(workdir: pathlib.Path) -> dict:
  """Returns a run's settings by dotted key, with defaults where this code can read the config."""
  config = json_if_any(workdir, "config.json")
  try:
    return settings(of_record(config))
  except ConfigError:  # of another revision: as it was written
    return flatten_dict(config, sep=".")


def _shortened(value: str | None) -> str | None:
  """Returns the beginning of a long value, such as the power of every frequency."""
  return value if value is None or len(value) <= _CELL else f"{value[:_CELL]} …"


def _differences(runs: dict[str, pathlib.Path]) -> str:
  found = [_settings(workdir) for workdir in runs.values()]
  rows = []
  for key in dict.fromkeys(key for own in found for key in own):
    values = [json.dumps(own[key]) if key in own else None for own in found]
    if len(set(values)) > 1:
      rows.append([key, *map(_shortened, values)])
  return table(["key", *runs], rows) if rows else "<p>None.</p>"
