"""Samples from a checkpoint.

  python eval.py --workdir=runs/ucf101
  python eval.py --workdir=runs/ucf101 --classes=Basketball,Biking --samples=4 --seed=1 --guidance=4 --steps=50
  python eval.py --workdir=runs/ucf101 --method=dense     the same weights, full attention: in samples-dense
  python eval.py --workdir=runs/ucf101 --method="radial(decay=0.5)" --export_masks=masks
  python eval.py --workdir=runs/ucf101 --compare="dense,adaspa,block_topk(density=0.2, coarse=none)"

Averaged weights and hard routing by default. Writes <class>.mp4, grid.png, latents.npz, sampling.json and density.json
(of one sample: every step, layer and head) to --out, in place of what an earlier run left there. By default that is
<workdir>/samples, or with --method <workdir>/samples-<method>: the run's own samples, which its report shows, stay.
With --compare, every method draws the same samples from the same noise: <method>/*.mp4, comparison.json and comparison.html,
by default in <workdir>/compare.
"""

import dataclasses
import json
import pathlib
import time

import jax
import numpy as np
from absl import flags, logging
from flax import nnx

from freqformer.command import cli
from freqformer.config import ConfigError, did_you_mean
from freqformer.cost import sampling_cost
from freqformer.diffusion.sampling import SampleConfig, compile_steps, make_step, sample
from freqformer.evaluate import compare
from freqformer.evaluate.record_masks import MaskRecorder, realised_density
from freqformer.evaluate.restore import restore_model
from freqformer.pages.compare import slug, write_comparison
from freqformer.pages.mp4 import check_folder, grid, grid_png, write_mp4

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run to sample from.", required=True)
_STEP = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; default the newest.")
_OUT = flags.DEFINE_string(
  "out", None, "Folder to write to; default <workdir>/samples, or samples-<method>, or compare."
)
_CLASSES = flags.DEFINE_list("classes", None, "Class names; default all.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Samples per class.", lower_bound=1)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed; sample i of a class has its own noise, whatever else is sampled."
)
_STEPS = flags.DEFINE_integer("steps", None, "Denoising steps; default the config's.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale, 1 is none; default the config's.")
_METHOD = flags.DEFINE_string("method", None, "Run another attention method on the same weights.")
_RAW = flags.DEFINE_bool("raw", False, "Use the raw weights instead of their average.")
_SOFT = flags.DEFINE_bool(
  "soft", False, "Mix all branches of the router instead of taking the likeliest."
)
_EXPORT_MASKS = flags.DEFINE_string(
  "export_masks", None, "Folder for the first sample's masks; timings then include recording."
)
_COMPARE = flags.DEFINE_string(
  "compare", None, "Methods side by side on the same weights and noise, the reference first."
)
_METRICS = flags.DEFINE_list(
  "metrics", ["psnr", "ssim"], f"Of --compare: some of {', '.join(compare.METRICS)}."
)
_LPIPS = flags.DEFINE_string(
  "lpips_weights", None, "Weights (.npz) of LPIPS; adds it to --compare. Nothing is downloaded."
)
_FPS = flags.DEFINE_float("fps", 0, "Frame rate of the mp4s; default 25 / stride.", lower_bound=0)


def main(_):
  if _COMPARE.value is not None:
    return side_by_side()
  for name in ("metrics", "lpips_weights"):
    if flags.FLAGS[name].present:
      raise ConfigError(
        f"--{name} compares videos; give the methods to compare in --compare as well."
      )
  model, params, restored = restore_model(
    _WORKDIR.value, step=_STEP.value, method=_METHOD.value, raw=_RAW.value
  )
  config, names = _sample_config(restored.experiment.sample), restored.class_names
  chosen, labels, indices = _asked_for(names)
  out = _folder("samples" if _METHOD.value is None else f"samples-{slug(_METHOD.value)}")
  if _EXPORT_MASKS.value is not None:
    check_folder(_EXPORT_MASKS.value)

  # ---- compile, then run: timed apart -------------------------------------------------------------------------------
  shape, graphdef = restored.latent_shape, nnx.graphdef(model)
  config = SampleConfig(**{**vars(config), "batch_size": min(config.batch_size, len(labels))})
  tables = model.tables(shape)
  clock = time.monotonic()
  step = make_step(graphdef, config, want_masks=_EXPORT_MASKS.value is not None)
  step, recorder = compile_steps(step, params, model, tables, shape, config), MaskRecorder()
  compile_seconds, clock = time.monotonic() - clock, time.monotonic()
  step = step if _EXPORT_MASKS.value is None else recorder.wrap(step, config.steps)
  latents, aux = sample(step, params, model, labels, indices, _SEED.value, tables, shape, config)
  run_seconds = time.monotonic() - clock

  # ---- decode and write ---------------------------------------------------------------------------------------------
  out.mkdir(parents=True, exist_ok=True)
  videos = restored.decode(latents)
  for name in (
    names if (out / "sampling.json").exists() else ()
  ):  # an earlier run's, maybe of another method
    (out / f"{name}.mp4").unlink(missing_ok=True)
  fps = _FPS.value or 25 / restored.experiment.data.stride
  for label in chosen:
    own = videos[labels == label]
    write_mp4(out / f"{names[label]}.mp4", grid(own, columns=min(4, len(own))), fps)
  grid_png(out / "grid.png", videos, [names[i] for i in labels])
  np.savez_compressed(
    out / "latents.npz", latents=latents, labels=labels, indices=indices, seed=_SEED.value
  )
  if _EXPORT_MASKS.value is not None:
    recorder.masks().save(_EXPORT_MASKS.value)
  density = [float(np.mean([np.mean(run["density"]) for run in step])) for step in aux]
  by_head = {
    "axes": ["step", "layer", "head"],
    "density": np.round(realised_density(aux), 5).tolist(),
  }
  (out / "density.json").write_text(json.dumps(by_head))
  cost = sampling_cost(model.config, shape, model.schedule(config.steps), config.guidance != 1)
  result = {
    "checkpoint": restored.step,
    "method": model.config.attention.method,
    "samples": len(labels),
    "steps": config.steps,
    "guidance": config.guidance,
    "seed": _SEED.value,
    "soft": config.soft,
    "weights": "raw" if _RAW.value else "ema",
    "compile_seconds": compile_seconds,
    "run_seconds": run_seconds,
    "seconds_per_sample": run_seconds / len(labels),
    "attention_flops_per_sample": cost.attention_flops,
    "total_flops_per_sample": cost.total,
    "flops_are": compare.FLOPS_ARE,
    "density_by_step": density,
    "device": jax.devices()[0].device_kind,
  }
  (out / "sampling.json").write_text(json.dumps(result, indent=2))
  logging.info(
    "%d samples in %s: compile %.1f s, run %.1f s (%.2f s each), mean attention density %.3f",
    len(labels),
    out,
    compile_seconds,
    run_seconds,
    run_seconds / len(labels),
    np.mean(density),
  )


def side_by_side():
  """--compare: every method draws the same samples."""
  for flag in (_METHOD, _EXPORT_MASKS):
    if flag.value is not None:
      raise ConfigError(
        f"--{flag.name} goes with one method; run it without --compare, or name the method in --compare."
      )
  # Compile seconds shall mean compiling, also the second time.
  jax.config.update("jax_compilation_cache_dir", None)
  metrics = compare.metric_functions(_METRICS.value, _LPIPS.value)
  methods = compare.split_methods(_COMPARE.value)
  _, _, restored = restore_model(_WORKDIR.value, step=_STEP.value, raw=_RAW.value)
  config = _sample_config(restored.experiment.sample)
  _, labels, indices = _asked_for(restored.class_names)
  out = _folder("compare")
  config = dataclasses.replace(config, batch_size=min(config.batch_size, len(labels)))
  found = compare.candidates(_WORKDIR.value, methods, config, restored.step, _RAW.value)
  rows, videos = compare.compare(found, labels, indices, _SEED.value, config, metrics)
  result = {
    "checkpoint": restored.step,
    "samples": len(labels),
    **dataclasses.asdict(config),
    "seed": _SEED.value,
    "weights": "raw" if _RAW.value else "ema",
    "device": jax.devices()[0].device_kind,
    "flops_are": compare.FLOPS_ARE,
    "density_is": "scored pairs / n^2 as run, of one sample",
    "rows": rows,
  }
  captions = [
    f"{restored.class_names[label]} {index % 10_000}"
    for label, index in zip(labels, indices, strict=True)
  ]
  fps = _FPS.value or 25 / restored.experiment.data.stride
  page = write_comparison(out, result, videos, captions, fps)
  print(compare.table(rows))
  print(f"page: {page}")


def _asked_for(names: list[str]):
  """The classes asked for, and label and number of every sample."""
  for name in _CLASSES.value or ():
    if name not in names:
      raise ConfigError(f"class {name!r} is not in this checkpoint; {did_you_mean(name, names)}")
  if not _CLASSES.value and len(names) > 16:
    logging.info("all %d classes are sampled; --classes=%s,%s takes some", len(names), *names[:2])
  chosen = [names.index(name) for name in (_CLASSES.value or names)]
  labels = np.repeat(chosen, _SAMPLES.value).astype(np.int32)
  # A sample's number depends on its class and its place within it: asking for other classes does not change it.
  indices = (labels * 10_000 + np.tile(np.arange(_SAMPLES.value), len(chosen))).astype(np.int32)
  return chosen, labels, indices


def _folder(default: str) -> pathlib.Path:
  """--out, or a folder of the run; checked before anything is sampled."""
  return check_folder(_OUT.value or pathlib.Path(_WORKDIR.value) / default)


def _sample_config(base: SampleConfig) -> SampleConfig:
  """The config's sampling with the flags that were given."""
  given = {"steps": _STEPS.value, "guidance": _GUIDANCE.value, "soft": _SOFT.value or None}
  try:
    return SampleConfig(**{**vars(base), **{k: v for k, v in given.items() if v is not None}})
  except ValueError as error:
    raise ConfigError(str(error)) from error


if __name__ == "__main__":
  cli.run(main)
