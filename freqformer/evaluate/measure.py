"""Measures samples against real clips: a value, its floor, its controls, and the protocol.

A metric describes each clip by some numbers and compares two sets of descriptions. So every figure
has its company: real clips against others (the floor), and controls that were real clips (noise in
their colours, their frames shuffled, one of their frames). These and the samples are compared with
the same halves of the real clips, at the same counts, over several random halvings; a distance
whose bias depends on the count must not be read beside one at another count.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from freqformer.config import ConfigError
from freqformer.data.fields import FieldsConfig
from freqformer.data.sources import Split
from freqformer.evaluate import motion, quality, recognise, spectrum
from freqformer.evaluate.backbones import Backbone
from freqformer.evaluate.frechet import frechet, kernel, least_samples
from freqformer.evaluate.recognise import CONTROLS
from freqformer.evaluate.restore import Run

NAMES = ("fvd", "kvd", "psd", "flicker")
BATCH = 16  # videos that are decoded together


@dataclasses.dataclass(frozen=True)
class Clips:
  """Videos that are decoded when they are needed, a batch at a time.

  Attributes:
    latents: `[n, t, y, x, c]`, normalised.
    labels: int `[n]`.
    groups: int `[n]`; two views of one clip have the same, and are never compared.
    decode: latents -> uint8 `[b, frames, rows, cols, 3]`.
  """

  latents: np.ndarray
  labels: np.ndarray
  groups: np.ndarray
  decode: Callable[[np.ndarray], np.ndarray]

  def __len__(self) -> int:
    return len(self.latents)

  def batches(self) -> Iterator[np.ndarray]:
    """Yields the videos in order, at most BATCH at once."""
    for start in range(0, len(self), BATCH):
      yield self.decode(self.latents[start : start + BATCH])

  def videos(self) -> np.ndarray:
    """Returns all of them, uint8 `[n, frames, rows, cols, 3]`."""
    return np.concatenate(list(self.batches()))


@dataclasses.dataclass(frozen=True)
class Metric:
  """A comparison of two sets of clips.

  Attributes:
    name: e.g. "fvd_motionnet".
    unit: of the value, "" for none.
    describe: videos uint8 `[b, t, y, x, 3]` -> `[b, ...]`; metrics may share one.
    compare: descriptions of clips and of real ones -> the value.
    least: descriptions that either side needs.
    details: the same arguments -> further fields of a row.
    backbone: whose features are compared, if any.
  """

  name: str
  unit: str
  describe: Callable[[np.ndarray], np.ndarray]
  compare: Callable[[np.ndarray, np.ndarray], float]
  least: int = 1
  details: Callable[[np.ndarray, np.ndarray], dict] | None = None
  backbone: Backbone | None = None


def metric(name: str, network: Backbone, features: int) -> Metric:
  """Returns one of NAMES; `features` is the number that the network gives."""
  if name == "fvd":
    least = least_samples(features)
    return Metric(f"fvd_{network.name}", "", network.features, frechet, least, backbone=network)
  if name == "kvd":
    return Metric(f"kvd_{network.name}", "", network.features, kernel, 2, backbone=network)
  if name == "psd":
    return Metric("psd", "dB", spectrum.band_power, spectrum.error, details=_bands)
  return Metric("flicker", "", quality.flicker_energy, _ratio)


def _bands(power: np.ndarray, real: np.ndarray) -> dict:
  rows = np.round(spectrum.error_by_band(power, real), 2).tolist()
  return {
    "time_bands": spectrum.TIME_BANDS,
    "space_bands": spectrum.SPACE_BANDS,
    "db_by_time_and_space": [[None if math.isnan(x) else x for x in row] for row in rows],
  }


def _ratio(energy: np.ndarray, real: np.ndarray) -> float:
  return float(energy.mean() / real.mean())


def describe(metrics: Sequence[Metric], clips: Clips, change=None, title: str = "") -> list:
  """Returns each metric's descriptions of clips, `[n, ...]`, from one pass over the videos.

  Args:
    metrics: those that share `describe` share the array.
    change: a control, `f(videos, seed) -> videos`, made of each batch.
    title: of the bar.
  """
  found = {metric.describe: [] for metric in metrics}
  batches = -(-len(clips) // BATCH)
  for number, videos in enumerate(tqdm(clips.batches(), title, batches, leave=False)):
    shown = videos if change is None else change(videos, number)
    for function, parts in found.items():
      parts.append(function(shown))
  arrays = {function: np.concatenate(parts) for function, parts in found.items()}
  return [arrays[metric.describe] for metric in metrics]


def measure(
  metrics: Sequence[Metric], samples: Clips, real: Clips, splits: int = 4, seed: int = 0
) -> list[dict]:
  """Returns a row per metric, plain JSON without its protocol.

  `value` compares all samples with all real clips. `mean` and `spread` (standard deviation) are
  over halvings of the real clips, at `counts`; so are `floor` and `controls`.

  Raises:
    ConfigError: a metric needs more clips than there are (says how many); before any is decoded.
  """
  halves = list(halvings(real.groups, splits, seed))
  count = min(len(samples), *(len(half) for pair in halves for half in pair))
  for each in metrics:
    check_counts(each, len(samples), len(real), count)
  of_samples = describe(metrics, samples, title="samples")
  of_real = describe(metrics, real, title="real clips")
  of_controls = {
    name: describe(metrics, real, change, name.replace("_", " "))
    for name, change in CONTROLS.items()
  }
  rows = []
  for i, each in enumerate(metrics):
    rows.append(
      {
        "name": each.name,
        "unit": each.unit,
        **compared(
          each,
          of_samples[i],
          of_real[i],
          {name: found[i] for name, found in of_controls.items()},
          halves,
          count,
          seed,
        ),
      }
    )
  return rows


def compared(
  metric: Metric,
  samples: np.ndarray,
  real: np.ndarray,
  controls: dict[str, np.ndarray],
  halves: Sequence[tuple[np.ndarray, np.ndarray]],
  count: int,
  seed: int,
) -> dict:
  """Returns the figures of one metric from its descriptions.

  Args:
    samples: `[n, ...]`.
    real: `[m, ...]`.
    controls: of the same real clips, `[m, ...]` each.
    halves: pairs of places among the real clips.
    count: that is compared with the first of each pair.
    seed: of the choice of samples.
  """
  rng = np.random.default_rng(seed)
  found = {name: [] for name in ("samples", "floor", *controls)}
  for first, second in halves:
    chosen = second[:count]
    some = samples[rng.permutation(len(samples))[:count]]
    found["samples"].append(metric.compare(some, real[first]))
    found["floor"].append(metric.compare(real[chosen], real[first]))
    for name, described in controls.items():
      found[name].append(metric.compare(described[chosen], real[first]))
  spreads = {name: _mean_and_spread(values) for name, values in found.items()}
  return {
    "value": metric.compare(samples, real),
    **spreads.pop("samples"),
    "floor": spreads.pop("floor"),
    "controls": spreads,
    "counts": {
      "samples": len(samples),
      "real": len(real),
      "compared": count,
      "with": min(len(first) for first, _ in halves),
      "halvings": len(halves),
    },
    **(metric.details(samples, real) if metric.details else {}),
  }


def _mean_and_spread(values: Sequence[float]) -> dict[str, float]:
  return {"mean": float(np.mean(values)), "spread": float(np.std(values))}


def check_counts(metric: Metric, samples: int, real: int, count: int):
  """Refuses a metric with too few clips.

  Args:
    samples: their number.
    real: number of real clips.
    count: of half of them, or of all samples if those are fewer.

  Raises:
    ConfigError: says how many are needed.
  """
  if count < metric.least:
    raise ConfigError(
      f"{metric.name} needs at least {metric.least} samples and twice as many real clips (halves "
      f"of them are its floor); there are {samples} samples and {real} real clips. Give --n more, "
      "--real=train, or take kvd, which needs few."
    )


def halvings(groups: np.ndarray, splits: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields pairs of places that share no group, as equal as whole groups allow."""
  names = np.unique(groups)
  for split in range(splits):
    rng = np.random.default_rng([seed, split])
    first = np.isin(groups, rng.permutation(names)[: len(names) // 2])
    yield tuple(rng.permutation(np.flatnonzero(side)) for side in (first, ~first))


# ---- judged by class -----------------------------------------------------------------------------


def judge_row(
  samples: Clips, train: Clips, real: Clips, class_names: Sequence[str], seed: int
) -> dict:
  """Returns the row of the judge: the share of samples whose class it names.

  Args:
    samples: labelled by the classes that were asked for.
    train: clips that the judge is fitted to.
    real: clips that it has not seen.
    class_names: index = label.
    seed: of the judge's views and controls.

  Raises:
    ConfigError: see `recognise.fit`.
  """
  judge = recognise.fit(train.videos(), train.labels, class_names, seed)
  report = judge.report(samples.videos(), samples.labels, real.videos(), real.labels)
  return {
    **report,
    "name": f"judge_{report['backbone'].split()[0]}",
    "unit": "share named",
    "value": report["samples"]["named"],
    "floor": {"mean": report["real"]["named"]},
    "controls": {name: {"mean": share} for name, share in report["controls"].items()},
    "counts": {"samples": len(samples), "fitted": len(train), "real": len(real)},
  }


def motion_row(samples: Clips, real: Clips, run: Run) -> dict:
  """Returns the row of motion: the share of samples that follow their class, and of real clips.

  Raises:
    ConfigError: no class of the run says where to.
  """
  data = run.experiment.data
  if isinstance(data, FieldsConfig):
    found = [motion.judge_fields(data, clips.latents, clips.labels) for clips in (samples, real)]
  else:
    # Frames of one latent share its errors, which do not move; two latents apart little is left.
    lag = min(2 * data.codec.factor[0], data.frames - 1)
    found = [
      motion.judge_directions(clips.videos(), clips.labels, run.class_names, lag)
      for clips in (samples, real)
    ]
  value, floor = map(_following, found)
  if value is None:
    raise ConfigError(
      "--metrics=motion judges classes that are directions or velocities; none of this run's is "
      f"(e.g. {run.class_names[0]!r}). Take judge, which learns the classes' motion."
    )
  return {
    "name": "motion",
    "unit": "share following",
    "value": value,
    "floor": {"mean": floor},
    "controls": {},
    "counts": {"samples": len(samples), "real": len(real)},
    "by_class": found[0],
    "real_by_class": found[1],
  }


def _following(rows: list[dict]) -> float | None:
  """Returns the share that follows, over the classes that say where to; None if none does."""
  judged = [row for row in rows if row["follows"] is not None]
  if not judged:
    return None
  return float(np.average([r["follows"] for r in judged], weights=[r["samples"] for r in judged]))


# ---- in and out ----------------------------------------------------------------------------------


def clips_of(split: Split, most: int, run: Run) -> Clips:
  """Returns at most `most` clips, spread evenly over a split; views of a clip are of one group."""
  places = np.linspace(0, len(split) - 1, min(most, len(split))).round().astype(int)
  items = [split[int(place)] for place in places]
  manifest = getattr(split, "manifest", None)  # random fields have none: each is a clip
  groups = np.arange(len(split))
  if manifest is not None:
    views = [len(clip["views"]) for clip in manifest["clips"]]
    groups = np.repeat(np.arange(len(views)), views)
  labels = np.array([item["label"] for item in items])
  return Clips(np.stack([item["latent"] for item in items]), labels, groups[places], run.decode)


def table(rows: list[dict]) -> list[list[str]]:
  """Returns a head and lines for people: value, and at equal counts samples, floor and controls."""
  controls = list(dict.fromkeys(name for row in rows for name in row["controls"]))
  lines = [["metric", "value", "at equal counts", "real", *controls]]
  for row in rows:
    lines.append(
      [
        row["name"],
        f"{row['value']:.4g} {row['unit']}",
        _with_spread(row),
        _with_spread(row["floor"]),
        *(_with_spread(row["controls"].get(name, {})) for name in controls),
      ]
    )
  return lines


def _with_spread(found: dict) -> str:
  if "mean" not in found:
    return "-"
  spread = f" ± {found['spread']:.2g}" if "spread" in found else ""
  return f"{found['mean']:.4g}{spread}"
