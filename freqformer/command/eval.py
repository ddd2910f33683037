"""Samples from a checkpoint or a pretrained model, or validates it on its own clips or others.

  python eval.py --workdir=runs/ucf101
  python eval.py --workdir=runs/ucf101 --classes=Basketball,Biking --samples=4 --guidance=4
  python eval.py --workdir=runs/ucf101 --sampler=unipc --steps=12 --guidance_interval=0.1,0.9
  python eval.py --workdir=runs/ucf101 --frames=32 --size=128x192 --rope=ntk
  python eval.py --workdir=runs/ucf101 --first_frame=photo.jpg    if it was trained with some
  python eval.py --workdir=runs/ucf101 --method=dense     the same weights, full attention
  python eval.py --workdir=runs/ucf101 --method="radial(decay=0.5)" --export_masks=masks
  python eval.py --workdir=runs/ucf101 --method=radial --schedule="dense_first=0.1"
  python eval.py --workdir=runs/ucf101 --compare="dense,adaspa,block_topk(density=0.2, coarse=none)"
  python eval.py --workdir=runs/ucf101 --validate
  python eval.py --workdir=runs/ucf101 --validate --config.data.frames=32
  python eval.py --workdir=runs/ucf101 --validate --config.data.source=folder \
    --config.data.root=clips --config.data.stride=4 --config.data.resolution=128,256
  python eval.py --pretrained=DIR --prompts=prompts.txt     docs/pretrained.md has more of these

Averaged weights and hard routing by default. Writes <class>/<index>.mp4, grid.png, latents.npz,
sampling.json and density.json (one sample's density at every step, layer and head) to --out, where
it replaces an earlier run's files. The default is <workdir>/samples, which the run's report shows,
or <workdir>/samples-<method> with --method, likewise with --frames and --size. With --compare,
every method draws the same samples from the same noise and writes <method>/*.mp4, comparison.json
and comparison.html, by default to <workdir>/compare.

With --validate nothing is sampled: the loss by part of t, the linear predictor's and the density go
to the terminal and to a JSON file in <workdir>/validation. The clips are those that the run
validates on, with any key of config.data changed as train.py takes it. Of another folder all clips
are taken, one view of each; if it is the run's own in another place, give
--config.data.val_fraction to take those alone that training left out. A class that the model does
not know by name is given the null class. Codec and normalisation stay as they were trained; that is
why `config.data.codec` cannot change.
"""

import collections
import dataclasses
import json
import pathlib

import jax
import numpy as np
from absl import flags, logging

from freqformer import disk
from freqformer.command import cli, pretrained
from freqformer.config import ConfigError
from freqformer.data.codec import LatentStatistics
from freqformer.data.sources import Split, data_keys, open_split, other_clips
from freqformer.diffusion.sampling import SampleConfig
from freqformer.diffusion.solvers import SOLVERS
from freqformer.disk import write_whole
from freqformer.evaluate import compare
from freqformer.evaluate.conditions import conditioned
from freqformer.evaluate.draw import (
  FLOPS_ARE,
  MAX_SEED,
  SAMPLES_PER_CLASS,
  draw,
  requests,
  sample_config,
  split_classes,
)
from freqformer.evaluate.first_frame import first_frame_latent
from freqformer.evaluate.resize import parse_size, resized, video_shape
from freqformer.evaluate.restore import Run, load_run
from freqformer.evaluate.samples import clip_path
from freqformer.evaluate.validate import validate
from freqformer.grid.rotary import ROPE_RULES
from freqformer.model.config import DTYPES
from freqformer.pages.compare import slug, text_table, write_comparison
from freqformer.pages.files import json_if_any
from freqformer.pages.mp4 import grid_png, write_mp4
from freqformer.pages.run import write_report
from freqformer.pages.text import aligned
from freqformer.prompts import read_prompts
from freqformer.train.experiment import home_expanded
from freqformer.train.mesh import all_devices, describe, whole_mesh
from freqformer.train.metrics import finite
from freqformer.train.validation import channel_power

_WORKDIR = cli.define_path("workdir", None, "Folder of the run to sample from.")
_PRETRAINED = cli.define_path("pretrained", None, "Folder of a downloaded model, in its place.")
_STEP = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; default the newest.")
_OUT = cli.define_path("out", None, "Folder to write to; default one in <workdir>.")
_CLASSES = flags.DEFINE_string("classes", None, "Class names, separated by commas; default all.")
_PROMPTS = flags.DEFINE_string(
  "prompts", None, "Texts, separated by ';', for a run with data.embedder; default some clips'."
)
_PROMPTS_FILE = cli.define_path("prompts_file", None, "File of such texts, one in each line.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Samples per class or prompt.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples' noise.", 0, MAX_SEED)
_STEPS = flags.DEFINE_integer("steps", None, "Denoising steps; default the config's.")
_GUIDANCE = flags.DEFINE_float(
  "guidance", None, "Guidance scale; 1 is none, 0 the null class alone; default the config's."
)
_SAMPLER = flags.DEFINE_string(
  "sampler", None, f"One of {', '.join(SOLVERS)}; default the config's."
)
_INTERVAL = flags.DEFINE_list("guidance_interval", None, "Lowest and highest t that are guided.")
_RESCALE = flags.DEFINE_float(
  "guidance_rescale", None, "Share of guidance whose spread is restored; default the config's."
)
_NEGATIVE = flags.DEFINE_string(
  "negative", "", "Prompt that guidance leads away from, with --pretrained."
)
_GUIDANCE_LOW = flags.DEFINE_float(
  "guidance_low", None, "Guidance at low noise of a model with two transformers (Wan 2.2 A14B)."
)
_SHIFT = flags.DEFINE_float("shift", None, "Shift of the noise levels, with --pretrained.")
_LEARNED = cli.define_path(
  "learned", None, "File of a method's learned leaves (configs/wan.py), with --pretrained."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", None, list(DTYPES), "Of matrices and activations, with --pretrained; bfloat16 on a GPU."
)
_BLOCK = flags.DEFINE_integer("block", 128, "Rows of a tile, with --pretrained.", lower_bound=1)
_HONEST = flags.DEFINE_bool(
  "honest",
  True,
  "With --pretrained and --compare: also draw the first method in smaller tiles, the floor of any "
  "difference, and measure how far each method's attention is from dense.",
)
_FRAMES = flags.DEFINE_integer("frames", None, "Frames of a video; default as trained.")
_SIZE = flags.DEFINE_string("size", None, "ROWSxCOLS of a video in pixels; default as trained.")
_ROPE = flags.DEFINE_string(
  "rope", "trained", f"Positions on longer axes: {' or '.join(ROPE_RULES)}."
)
_FIRST_FRAME = cli.define_path("first_frame", None, "Picture that every video begins with.")
_METHOD = flags.DEFINE_string("method", None, "Run another attention method on the same weights.")
_SCHEDULE = flags.DEFINE_string(
  "schedule", None, "Dense evaluations and layers, e.g. dense_first=0.1; default the config's."
)
_RAW = flags.DEFINE_bool("raw", False, "Use the raw weights instead of their average.")
_SOFT = flags.DEFINE_bool("soft", False, "Mix all branches of the router, not the likeliest alone.")
_EXPORT_MASKS = cli.define_path("export_masks", None, "Folder for the first sample's masks.")
_COMPARE = flags.DEFINE_string("compare", None, "Methods to compare, the reference first.")
_METRICS = flags.DEFINE_list("metrics", ["psnr", "ssim"], f"Some of {', '.join(compare.METRICS)}.")
_LPIPS = cli.define_path("lpips_weights", None, "Weights (.npz) of LPIPS, for --compare.")
_CONTEXT = flags.DEFINE_integer(
  "context", 1, "Devices that share the tokens of each sample.", lower_bound=1
)
_FPS = flags.DEFINE_float(
  "fps", 0, "Frame rate of the mp4s; default: the trained one.", lower_bound=0
)
_VALIDATE = flags.DEFINE_bool("validate", False, "Report losses on clips instead of sampling.")
_CLIPS = flags.DEFINE_integer("clips", 0, "Most clips of --validate; 0 takes all.", lower_bound=0)
# Not in --help, which need not list a source's keys.
_DATA = {
  key: flags.DEFINE_string(f"config.data.{key}", None, "See train.py.", module_name=__package__)
  for key in data_keys()
}
_OF_VALIDATION = ("clips", *(flag.name for flag in _DATA.values()))
_OF_SAMPLES = (
  "classes",
  "prompts",
  "prompts_file",
  "samples",
  "seed",
  "steps",
  "guidance",
  "sampler",
  "guidance_interval",
  "guidance_rescale",
  "frames",
  "size",
  "rope",
  "first_frame",
  "schedule",
  "export_masks",
  "compare",
  "metrics",
  "lpips_weights",
  "fps",
)
_OF_PRETRAINED = ("negative", "guidance_low", "shift", "dtype", "block", "honest", "learned")
# Of runs alone: what a downloaded model has no use for.
_OF_RUNS = (
  *_OF_VALIDATION,
  "checkpoint",
  "classes",
  "prompts_file",
  "samples",
  "sampler",
  "guidance_interval",
  "guidance_rescale",
  "rope",
  "first_frame",
  "raw",
  "soft",
  "export_masks",
  "validate",
)
_LISTED = 4  # unknown classes that are printed; the file has all


def main(_):
  if (_WORKDIR.value is None) == (_PRETRAINED.value is None):
    raise ConfigError(
      "give --workdir, the folder of a run, or --pretrained, that of a downloaded model."
    )
  for name in _OF_PRETRAINED if _WORKDIR.value else _OF_RUNS:
    if flags.FLAGS[name].present:
      rule = "needs --pretrained" if _WORKDIR.value else "cannot be given with --pretrained"
      raise ConfigError(f"--{name} {rule}.")
  for name in _OF_SAMPLES if _VALIDATE.value else _OF_VALIDATION:
    if flags.FLAGS[name].present:
      rule = "cannot be given with" if _VALIDATE.value else "needs"
      raise ConfigError(f"--{name} {rule} --validate, which reports losses and draws no sample.")
  mesh = whole_mesh(_CONTEXT.value)
  logging.info("%s", describe(mesh))
  space = disk.space_for("what eval.py writes", _OUT.value or _WORKDIR.value or ".")
  with space, jax.set_mesh(mesh):
    if _PRETRAINED.value is not None:
      _sample_pretrained()
    elif _VALIDATE.value:
      _validate()
    elif _COMPARE.value is not None:
      _compare_methods()
    else:
      _sample_one_method()


def _sample_one_method():
  """Writes samples of the trained method, or of `--method`."""
  for name in ("metrics", "lpips_weights"):
    if flags.FLAGS[name].present:
      raise ConfigError(f"--{name} compares videos; give --compare the methods as well.")
  run = load_run(
    _WORKDIR.value, step=_STEP.value, method=_METHOD.value, raw=_RAW.value, schedule=_SCHEDULE.value
  )
  run = _resized(conditioned(run, _prompts()))
  labels, indices, config = _requests(run)
  picture = _FIRST_FRAME.value
  first_frame = None if picture is None else first_frame_latent(run, picture)
  frames = f"frames={_FRAMES.value}" if _FRAMES.value else None
  words = [slug(word) for word in (_METHOD.value, _SCHEDULE.value, frames, _SIZE.value) if word]
  out = _folder("-".join(["samples", *words]))
  masks = _EXPORT_MASKS.value
  if masks:
    pathlib.Path(masks).mkdir(parents=True, exist_ok=True)
  drawn = draw(
    run,
    run.inputs(labels),
    indices,
    _SEED.value,
    config,
    first_frame=first_frame,
    want_masks=bool(masks),
  )

  # ---- videos ---------------------------------------------------------------------------------
  names = run.class_names
  if (out / "sampling.json").exists():  # of an earlier run, maybe of other classes or prompts
    for name in [*names, *json_if_any(out, "sampling.json").get("prompts", {})]:
      for path in (out / name).glob("*.mp4"):
        path.unlink()
  videos = run.decode(drawn.latents)
  for video, label, index in zip(videos, labels, indices, strict=True):
    write_mp4(clip_path(out, names[label], index), video, _FPS.value or run.fps)
  grid_png(out / "grid.png", videos, [names[label] for label in labels])

  # ---- numbers --------------------------------------------------------------------------------
  np.savez_compressed(
    out / "latents.npz", latents=drawn.latents, labels=labels, indices=indices, seed=_SEED.value
  )
  if masks:
    drawn.masks.save(masks)
  density = {"axes": ["step", "layer", "head"], "density": np.round(drawn.density, 5).tolist()}
  write_whole(out / "density.json", json.dumps(density))
  result = _facts(run, len(labels), config) | {
    "method": run.model.config.attention.method,
    **drawn.figures(),
  }
  write_whole(out / "sampling.json", json.dumps(result, indent=2))
  logging.info(
    "%d samples in %s: compile %.1f s, run %.1f s (%.2f s each), mean attention density %.3f",
    len(labels),
    out,
    drawn.compile_seconds,
    drawn.run_seconds,
    result["seconds_per_sample"],
    drawn.density.mean(),
  )
  _update_report(out)


def _sample_pretrained():
  """Writes videos of a downloaded model, and a page."""
  if _COMPARE.value is not None and _METHOD.value is not None:
    raise ConfigError("--method goes with one method; name it in --compare, the reference first.")
  methods = [_METHOD.value] if _METHOD.value else []
  metrics = {}
  if _COMPARE.value is not None:
    methods = compare.split_methods(_COMPARE.value)
    metrics = compare.metric_functions(_METRICS.value, _LPIPS.value)
  if _PRETRAINED.value.startswith("random:") and flags.FLAGS["metrics"].present:
    raise ConfigError("--metrics judges videos; random weights have speed alone: leave it out.")
  pretrained.run(
    pretrained.Request(
      folder=_PRETRAINED.value,
      prompts=_PROMPTS.value,
      methods=methods,
      out=_OUT.value,
      negative=_NEGATIVE.value,
      frames=_FRAMES.value,
      size=None if _SIZE.value is None else parse_size(_SIZE.value),
      steps=_STEPS.value,
      guidance=_GUIDANCE.value,
      guidance_low=_GUIDANCE_LOW.value,
      shift=_SHIFT.value,
      seed=_SEED.value,
      schedule=_SCHEDULE.value,
      fps=_FPS.value,
      metrics=metrics,
      block=_BLOCK.value,
      dtype=_DTYPE.value,
      honest=_HONEST.value,
      learned=_LEARNED.value,
    )
  )


def _compare_methods():
  """Writes samples of every method of `--compare` and a page that shows them side by side."""
  for flag in (_METHOD, _EXPORT_MASKS, _FIRST_FRAME):
    if flag.value is not None:
      raise ConfigError(
        f"--{flag.name} goes with one method; run it without --compare, or name the method in "
        "--compare."
      )
  # Compile seconds shall mean compiling, also the second time.
  jax.config.update("jax_compilation_cache_dir", None)
  metrics = compare.metric_functions(_METRICS.value, _LPIPS.value)
  methods = compare.split_methods(_COMPARE.value)
  run = load_run(_WORKDIR.value, step=_STEP.value, raw=_RAW.value)
  run = _resized(conditioned(run, _prompts()))
  labels, indices, config = _requests(run)
  evaluations = len(config.guided())
  found = compare.candidates(
    _WORKDIR.value, methods, evaluations, run.step, _RAW.value, _SCHEDULE.value
  )
  found = {method: _resized(own) for method, own in found.items()}
  out = _folder("compare")
  rows, videos = compare.compare(found, run.inputs(labels), indices, _SEED.value, config, metrics)
  result = _facts(run, len(labels), config) | {"rows": rows}
  captions = [
    f"{run.class_names[label]} {index % SAMPLES_PER_CLASS}"
    for label, index in zip(labels, indices, strict=True)
  ]
  page = write_comparison(out, result, videos, captions, _FPS.value or run.fps)
  print(text_table(rows))
  print(f"page: {page}")


def _validate():
  """Prints and writes losses on the run's validation clips, or on those of `--config.data`."""
  given = home_expanded({k: flag.value for k, flag in _DATA.items() if flag.value is not None})
  run = load_run(_WORKDIR.value, step=_STEP.value, method=_METHOD.value, raw=_RAW.value)
  data, name = other_clips(run.experiment.data, given)
  # Refused before clips are encoded.
  run.model.config.resolved(data.latent_shape)
  out = _folder("validation")
  split = open_split(data, name, LatentStatistics.from_json(run.record["statistics"]))
  found = validate(run, split, soft=_SOFT.value, clips=_CLIPS.value)
  layout = run.model.config.layout(split.latent_shape)
  rates, left_out = _used(split)
  result = {
    "checkpoint": run.step,
    "parameters": "raw" if _RAW.value else "ema",
    "method": run.model.config.attention.method,
    "soft": _SOFT.value,
    "data": dataclasses.asdict(data),
    "split": name,
    "rates": rates,
    "left_out": left_out,
    "latent_shape": split.latent_shape,
    "grid": layout.grid,
    "tile": layout.tile,
    "power": channel_power(split).tolist(),
    "time_range": run.experiment.train.time_range,
    **found,
  }
  words = [f"{key}={text}" for key, text in given.items()] or ["own"]
  words += [_METHOD.value] if _METHOD.value else []
  words += [word for word, flag in (("raw", _RAW), ("soft", _SOFT)) if flag.value]
  path = out / f"{slug(','.join(words))}.json"
  write_whole(path, json.dumps(finite(result), indent=2))
  print(_losses(result, data.facts()))
  print(f"written: {path}")
  _update_report(out)


def _used(split: Split) -> tuple[dict[str, int], int]:
  """Returns views by frames per second, as text, and the number of unusable clips.

  Random fields have neither.
  """
  manifest = getattr(split, "manifest", None)
  if manifest is None:
    return {}, 0
  views = (view for clip in manifest["clips"] for view in clip["views"])
  rates = collections.Counter(f"{view['fps']:g}" for view in views)
  return dict(rates), len(manifest["skipped"])


def _losses(result: dict, facts: dict[str, str]) -> str:
  """Returns the text of a validation: what was validated on, and a line per part of t."""
  of = {"all": "all of the folder", "val": "of the validation split"}[result["split"]]
  facts = dict(facts)
  facts["clips"] = f"{result['clips']}, {of}"
  if result["left_out"]:
    facts["clips"] += f"; {result['left_out']} could not be used"
  if len(result["rates"]) > 1:
    rates = (f"{fps}: {n}" for fps, n in result["rates"].items())
    facts["views by frames a second"] = ", ".join(rates)
  if "null_class" in result:
    unknown = result["null_class"]
    more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
    names = ", ".join(unknown[:_LISTED])
    facts["null class"] = f"for {names}{more}: the model has no such class"
  power = result["power"]
  facts["power"] = f"{np.mean(power):.2f} a channel, at most {max(power):.2f}; in training 1"
  tokens = "x".join(map(str, result["grid"]))
  tile = "x".join(map(str, result["tile"]))
  facts["tokens"] = f"{tokens} in tiles of {tile}"
  weights = f"{result['parameters']} weights"
  facts["model"] = f"step {result['checkpoint']}, {weights}, {result['method']}"
  columns = {"loss": "buckets", "linear": "linear_buckets", "density": "density_buckets"}
  if "regret" in result:
    columns |= {"regret": "regret_buckets", "Bayes risk": "bayes_buckets"}
  edges = np.linspace(*result["time_range"], len(result["buckets"]) + 1)
  parts = [f"{low:.2f} to {high:.2f}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
  lines = [["t", *parts, "mean"]]
  for title, key in columns.items():
    lines.append([title, *(f"{x:.4f}" for x in (*result[key], np.mean(result[key])))])
  return "\n\n".join((aligned(list(facts.items())), aligned(list(zip(*lines, strict=True)))))


def _prompts() -> list[str] | None:
  """Returns the texts of --prompts or --prompts_file, None if neither is given."""
  if _PROMPTS_FILE.value is None:
    return None if _PROMPTS.value is None else _PROMPTS.value.split(";")
  if _PROMPTS.value is not None:
    raise ConfigError("--prompts and --prompts_file say the same; give one of them.")
  return read_prompts(_PROMPTS_FILE.value)


def _requests(run: Run) -> tuple[np.ndarray, np.ndarray, SampleConfig]:
  """Returns label and number of each sample that is asked for, and how they are sampled."""
  names = run.class_names
  if run.conditions is not None and _CLASSES.value is not None:
    raise ConfigError("--classes: this run is conditioned on embeddings; give --prompts instead.")
  if run.conditions is None and not _CLASSES.value and len(names) > 16:
    logging.info("all %d classes are sampled; --classes=%s,%s takes some", len(names), *names[:2])
  classes = None if _CLASSES.value is None else split_classes(_CLASSES.value, names)
  labels, indices = requests(run, classes, _SAMPLES.value)
  given = {
    "steps": _STEPS.value,
    "guidance": _GUIDANCE.value,
    "soft": _SOFT.value or None,
    "sampler": _SAMPLER.value,
    "guidance_interval": _interval(),
    "guidance_rescale": _RESCALE.value,
  }
  return labels, indices, sample_config(run, len(labels), **given)


def _interval() -> tuple[float, ...] | None:
  """Returns the numbers of --guidance_interval."""
  if _INTERVAL.value is None:
    return None
  try:
    return tuple(float(text) for text in _INTERVAL.value)
  except ValueError as error:
    text = ",".join(_INTERVAL.value)
    raise ConfigError(f"--guidance_interval={text} must be two numbers, e.g. 0.1,0.9.") from error


def _resized(run: Run) -> Run:
  """Returns the run at --frames and --size."""
  size = None if _SIZE.value is None else parse_size(_SIZE.value)
  return resized(run, _FRAMES.value, size, _ROPE.value)


def _facts(run: Run, count: int, config: SampleConfig) -> dict:
  """Returns what was sampled and how, and what its training took, as plain JSON."""
  totals = run.record.get("totals") or {}  # of earlier versions unknown
  prompts = {}
  if run.conditions is not None:
    texts = zip(run.conditions.names, run.conditions.texts, strict=True)
    prompts = {"prompts": dict(texts)}
  return {
    "checkpoint": run.step,
    "samples": count,
    **prompts,
    **dataclasses.asdict(config),
    "schedule": dataclasses.asdict(run.model.config.attention.schedule),
    "video_shape": video_shape(run),
    "latent_shape": run.latent_shape,
    "rope": _ROPE.value,
    "first_frame": _FIRST_FRAME.value,
    "seed": _SEED.value,
    "weights": "raw" if _RAW.value else "ema",
    **{f"training_{name}": value for name, value in totals.items()},
    "device": all_devices()[0].device_kind,
    "flops_are": FLOPS_ARE,
    "density_is": "scored pairs / n^2 as run, of one sample",
  }


def _update_report(out: pathlib.Path):
  """Writes the run's report anew if the run has what was written."""
  workdir = pathlib.Path(_WORKDIR.value)
  if out.resolve().is_relative_to(workdir.resolve()):
    logging.info("report: %s", write_report(workdir))


def _folder(default: str) -> pathlib.Path:
  """Makes and returns --out or a folder of the run, before anything is sampled."""
  out = pathlib.Path(_OUT.value or pathlib.Path(_WORKDIR.value) / default)
  out.mkdir(parents=True, exist_ok=True)
  return out


if __name__ == "__main__":
  cli.run(main)
