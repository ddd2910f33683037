"""Measures a run's samples against real clips, with the floor and controls beside each figure.

  python -m freqformer.evaluate --workdir=runs/demo --n=256
  python -m freqformer.evaluate --workdir=runs/ucf101 --n=2048 --metrics=fvd,kvd,psd,flicker,judge
  python -m freqformer.evaluate --workdir=runs/ucf101 --n=2048 --backbone=i3d --weights=FILE
  python -m freqformer.evaluate --workdir=runs/demo --samples=samples --metrics=judge,kvd
  python -m freqformer.evaluate --workdir=runs/pans --samples=samples --metrics=motion
  python -m freqformer.evaluate --workdir=runs/ucf101 --features=samples.npy,real.npy \
    --backbone=videomae --metrics=fvd,kvd

Draws --n samples, spread over the classes, into <workdir>/evaluation: samples/<class>/<index>.mp4
and latents; started again after a kill it goes on, and with a greater --n it adds to them. With
--samples those of eval.py are taken. Rows go to <workdir>/evaluation.json; a row replaces its
namesake of the same samples.

  fvd, kvd   Fréchet and kernel distance of features. motionnet, the default, is our small convnet:
             its distances are fvd_motionnet, kvd_motionnet, and comparable with no published FVD.
             fvd_i3d is FVD as StyleGAN-V computes it; it needs torch and its file, --weights.
  psd        root mean square error of the power spectrum over bands of space and time, dB.
  flicker    energy above half the temporal Nyquist frequency; 1 is real.
  judge      share of samples whose class is named from motion and shape alone, without colour.
  motion     share of samples that move as their class says, where classes are directions.

Every figure has `floor`, real clips against other real clips, and controls made of real clips.
`mean` and `spread` of all of them are at equal counts, over --halvings of the real clips; `value`
takes all samples and all real clips. Real clips are decoded from their latents, as samples are, so
that the codec's own loss is in no figure.
"""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
from absl import flags, logging

from freqformer import disk
from freqformer.command import cli
from freqformer.config import ConfigError, did_you_mean
from freqformer.data.codec import LatentStatistics
from freqformer.data.sources import Split, open_split
from freqformer.disk import write_whole
from freqformer.evaluate import measure
from freqformer.evaluate.backbones import Backbone, backbone
from freqformer.evaluate.conditions import of_clips, some_clips
from freqformer.evaluate.draw import MAX_SEED, sample_config
from freqformer.evaluate.measure import Clips
from freqformer.evaluate.restore import Run, load_run
from freqformer.evaluate.samples import clip_path, draw_missing, read_drawn, spread_requests
from freqformer.pages.compare import slug
from freqformer.pages.mp4 import write_mp4
from freqformer.pages.run import write_report
from freqformer.pages.text import aligned
from freqformer.train.mesh import describe, whole_mesh
from freqformer.train.metrics import finite

METRICS = (*measure.NAMES, "judge", "motion")

_WORKDIR = cli.define_path("workdir", None, "Folder of the run.", required=True)
_METRICS = flags.DEFINE_list("metrics", ["kvd", "psd", "flicker", "judge"], ", ".join(METRICS))
_N = flags.DEFINE_integer("n", 256, "Samples to draw, over all classes.", lower_bound=1)
_SAMPLES = cli.define_path("samples", None, "Folder in <workdir> of eval.py's samples instead.")
_OUT = cli.define_path("out", None, "Folder of what is drawn; default <workdir>/evaluation.")
_REAL = flags.DEFINE_enum("real", "train", ["train", "val"], "Split to compare with.")
_BACKBONE = flags.DEFINE_string("backbone", "motionnet", "Network of fvd and kvd.")
_WEIGHTS = cli.define_path("weights", None, "File of the backbone's weights.")
_FEATURES = flags.DEFINE_list("features", None, "Two .npy [n, f], of samples and of real clips.")
_JUDGE_CLIPS = flags.DEFINE_integer(
  "judge_clips", 2000, "Most training clips that the judge is fitted to.", lower_bound=4
)
_HALVINGS = flags.DEFINE_integer("halvings", 4, "Random halvings of real clips.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of noise and of halvings.", 0, MAX_SEED)
_STEP = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; default the newest.")
_STEPS = flags.DEFINE_integer("steps", None, "Denoising steps; default the config's.")
_GUIDANCE = flags.DEFINE_float(
  "guidance", None, "Guidance scale; 1 is none, 0 the null class alone; default the config's."
)
_METHOD = flags.DEFINE_string("method", None, "Run another attention method on the same weights.")
_RAW = flags.DEFINE_bool("raw", False, "Use the raw weights instead of their average.")


def main(_):
  wanted = list(dict.fromkeys(_METRICS.value))
  for name in wanted:
    if name not in METRICS:
      raise ConfigError(f"--metrics={name!r} is unknown; {did_you_mean(name, METRICS)}")
  mesh = whole_mesh()
  logging.info("%s", describe(mesh))
  workdir = pathlib.Path(_WORKDIR.value)
  intact = "what is drawn already stays"
  space = disk.space_for("the evaluation", _OUT.value or workdir, intact=lambda: intact)
  with space, jax.set_mesh(mesh):
    if _FEATURES.value is not None:
      rows = _of_features(wanted)
    else:
      rows = _of_videos(workdir, wanted)
    _keep(rows, workdir / "evaluation.json")
  print(aligned(measure.table(rows)))
  print(f"written: {workdir / 'evaluation.json'}")
  write_report(workdir)


def _keep(rows: list[dict], path: pathlib.Path):
  """Writes rows beside those of earlier calls, in the place of their namesakes."""
  earlier = json.loads(path.read_text()) if path.exists() else []
  if not isinstance(earlier, list):
    earlier = []  # of a version that knew no rows
  merged = {(row["name"], row["protocol"].get("drawn")): row for row in [*earlier, *rows]}
  write_whole(path, json.dumps(finite(list(merged.values())), indent=1) + "\n")


# ---- features of another network -----------------------------------------------------------------


def _of_features(wanted: list[str]) -> list[dict]:
  """Returns the rows of two given arrays of features."""
  if len(_FEATURES.value) != 2 or set(wanted) - {"fvd", "kvd"}:
    raise ConfigError(
      "--features takes two files, samples.npy,real.npy, and serves --metrics=fvd,kvd only; give "
      "--backbone the name of the network that made them."
    )
  arrays = []
  for name in map(os.path.expanduser, _FEATURES.value):
    try:
      array = np.load(name)
    except (OSError, ValueError) as error:
      raise ConfigError(f"--features: {name} cannot be read as .npy ({error}).") from error
    if array.ndim != 2:
      raise ConfigError(f"--features: {name} must be [clips, features], is {list(array.shape)}.")
    arrays.append(array)
  samples, real = arrays
  network = Backbone(_BACKBONE.value, features=None, hash="unknown", input="unknown")
  halves = list(measure.halvings(np.arange(len(real)), _HALVINGS.value, _SEED.value))
  count = min(len(samples), len(real) // 2)
  rows = []
  for name in wanted:
    metric = measure.metric(name, network, samples.shape[1])
    measure.check_counts(metric, len(samples), len(real), count)
    found = measure.compared(metric, samples, real, {}, halves, count, _SEED.value)
    protocol = {"drawn": ",".join(_FEATURES.value), "backbone": network.name, "seed": _SEED.value}
    rows.append({"name": metric.name, "unit": metric.unit, **found, "protocol": protocol})
  return rows


# ---- videos --------------------------------------------------------------------------------------


def _of_videos(workdir: pathlib.Path, wanted: list[str]) -> list[dict]:
  """Draws or reads samples and returns the rows of all metrics."""
  network = None
  if {"fvd", "kvd"} & set(wanted):
    network = backbone(_BACKBONE.value, _WEIGHTS.value)
  run = load_run(workdir, step=_STEP.value, method=_METHOD.value, raw=_RAW.value)
  data = run.experiment.data
  classless = {"judge", "motion"} & set(wanted) if data.condition != "class" else ()
  if classless:
    raise ConfigError(
      f"--metrics={min(classless)} asks samples for their class, and this run has data.condition="
      f"{data.condition!r}; give --metrics=kvd,psd,flicker."
    )
  statistics = LatentStatistics.from_json(run.record["statistics"])
  splits = {name: open_split(data, name, statistics) for name in ("train", "val")}
  # Refused before anything is drawn.
  if network is not None and _SAMPLES.value is None:
    _check_before(wanted, network, splits[_REAL.value], run)
  samples, drawn = _samples(workdir, run, splits["val"])
  protocol = {
    **drawn,
    "checkpoint": run.step,
    "method": run.model.config.attention.method,
    "real": f"decoded latents of split {_REAL.value}",
    "data": data.facts(),
    "data_hash": splits[_REAL.value].hash[:12],
    "samples": len(samples),
  }
  rows = []
  plain = [name for name in wanted if name in measure.NAMES]
  if plain:
    real = measure.clips_of(splits[_REAL.value], 2 * len(samples), run)
    features = _feature_count(network, real) if network else 0
    metrics = [measure.metric(name, network, features) for name in plain]
    found = measure.measure(metrics, samples, real, _HALVINGS.value, _SEED.value)
    for metric, row in zip(metrics, found, strict=True):
      used = {}
      if metric.backbone is not None:
        used = {
          "backbone": network.name,
          "backbone_sha256": network.hash,
          "backbone_input": network.input,
        }
      rows.append(row | {"protocol": protocol | used})
  if "judge" in wanted:
    train = measure.clips_of(splits["train"], _JUDGE_CLIPS.value, run)
    real = measure.clips_of(splits["val"], _JUDGE_CLIPS.value, run)
    row = measure.judge_row(samples, train, real, run.class_names, _SEED.value)
    rows.append(row | {"protocol": protocol})
  if "motion" in wanted:
    real = measure.clips_of(splits["val"], len(samples), run)
    rows.append(measure.motion_row(samples, real, run) | {"protocol": protocol})
  return rows


def _check_before(wanted: list[str], network: Backbone, real: Split, run: Run):
  """Refuses distances that have too few clips, before anything is drawn."""
  features = _feature_count(network, measure.clips_of(real, 1, run))
  count = min(_N.value, len(real) // 2)
  for name in {"fvd", "kvd"} & set(wanted):
    measure.check_counts(measure.metric(name, network, features), _N.value, len(real), count)


def _feature_count(network: Backbone, clips: Clips) -> int:
  return network.features(clips.decode(clips.latents[:1])).shape[1]


def _samples(workdir: pathlib.Path, run: Run, val: Split) -> tuple[Clips, dict]:
  """Returns samples, drawn or read, and the part of the protocol that says how.

  Of a run conditioned on embeddings they are drawn for those of validation clips.
  """
  if _SAMPLES.value is not None:
    latents, labels = read_drawn(workdir / _SAMPLES.value)
    return _clips(latents, labels, run), {"drawn": _SAMPLES.value}
  default = "evaluation" if _METHOD.value is None else f"evaluation-{slug(_METHOD.value)}"
  out = pathlib.Path(_OUT.value or workdir / default)
  embedded = run.experiment.data.condition == "embedding"
  if embedded:
    run = dataclasses.replace(run, conditions=of_clips(val, some_clips(val, _N.value)))
  labels, indices = spread_requests(run, _N.value)
  config = sample_config(run, len(labels), steps=_STEPS.value, guidance=_GUIDANCE.value)
  settings = dataclasses.asdict(config)
  del settings["batch_size"]  # changes no sample
  settings |= {
    "seed": _SEED.value,
    "checkpoint": run.step,
    "method": run.model.config.attention.method if _METHOD.value is None else _METHOD.value,
    "weights": "raw" if _RAW.value else "ema",
  }
  if embedded:
    settings["clips"] = val.hash[:12]

  def keep(latents, labels, indices):
    paths = [
      clip_path(out / "samples", run.class_names[label], index)
      for label, index in zip(labels, indices, strict=True)
    ]
    if all(path.exists() for path in paths):
      return
    for path, video in zip(paths, run.decode(latents), strict=True):
      write_mp4(path, video, run.fps)

  latents = draw_missing(run, out, labels, indices, settings, config, keep)
  logging.info("%d samples in %s", len(latents), out)
  return _clips(latents, labels, run), {"drawn": os.path.relpath(out, workdir), **settings}


def _clips(latents: np.ndarray, labels: np.ndarray, run: Run) -> Clips:
  return Clips(latents, labels, np.arange(len(latents)), run.decode)


if __name__ == "__main__":
  cli.run(main)
