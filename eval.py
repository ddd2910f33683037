"""Samples from a checkpoint.

  python eval.py --workdir=runs/ucf101
  python eval.py --workdir=runs/ucf101 --classes=Basketball,Biking --samples=4 --seed=1 --guidance=4 --steps=50
  python eval.py --workdir=runs/ucf101 --method=dense --out=runs/ucf101/dense     the same weights, full attention
  python eval.py --workdir=runs/ucf101 --method="radial(decay=0.5)" --export_masks=masks

Averaged weights and hard routing by default. Writes <class>.mp4, grid.png, latents.npz, sampling.json and density.json
(of one sample: every step, layer and head) to --out.
"""

import json
import pathlib
import time

import jax
import numpy as np
from absl import flags, logging
from flax import nnx

from freqformer import cli
from freqformer.config import ConfigError, did_you_mean
from freqformer.cost import model_cost
from freqformer.masks import MaskRecorder, realised_density
from freqformer.restore import restore_model
from freqformer.sampling import SampleConfig, compile_steps, make_step, sample
from freqformer.video import grid, grid_png, write_mp4

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run to sample from.", required=True)
_STEP = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; default the newest.")
_OUT = flags.DEFINE_string("out", None, "Folder to write to; default <workdir>/samples.")
_CLASSES = flags.DEFINE_list("classes", None, "Class names; default all.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Samples per class.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed; sample i of a class has its own noise, whatever else is sampled.")
_STEPS = flags.DEFINE_integer("steps", None, "Denoising steps; default the config's.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale, 1 is none; default the config's.")
_METHOD = flags.DEFINE_string("method", None, "Run another attention method on the same weights.")
_RAW = flags.DEFINE_bool("raw", False, "Use the raw weights instead of their average.")
_SOFT = flags.DEFINE_bool("soft", False, "Mix all branches of the router instead of taking the likeliest.")
_EXPORT_MASKS = flags.DEFINE_string(
  "export_masks", None, "Folder for the first sample's masks; timings then include recording."
)
_FPS = flags.DEFINE_float("fps", 0, "Frame rate of the mp4s; default 25 / stride.")


def main(_):
  model, params, restored = restore_model(_WORKDIR.value, step=_STEP.value, method=_METHOD.value, raw=_RAW.value)
  config = _sample_config(restored.experiment.sample)
  names = restored.class_names
  for name in _CLASSES.value or ():
    if name not in names:
      raise ConfigError(f"class {name!r} is not in this checkpoint; {did_you_mean(name, names)}")
  chosen = [names.index(name) for name in (_CLASSES.value or names)]
  labels = np.repeat(chosen, _SAMPLES.value).astype(np.int32)
  # A sample's number depends on its class and its place within it: asking for other classes does not change it.
  indices = (labels * 10_000 + np.tile(np.arange(_SAMPLES.value), len(chosen))).astype(np.int32)

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
  out = pathlib.Path(_OUT.value or pathlib.Path(_WORKDIR.value) / "samples")
  out.mkdir(parents=True, exist_ok=True)
  videos = restored.decode(latents)
  fps = _FPS.value or 25 / restored.experiment.data.stride
  for label in chosen:
    own = videos[labels == label]
    write_mp4(out / f"{names[label]}.mp4", grid(own, columns=min(4, len(own))), fps)
  grid_png(out / "grid.png", videos, [names[i] for i in labels])
  np.savez_compressed(out / "latents.npz", latents=latents, labels=labels, indices=indices, seed=_SEED.value)
  if _EXPORT_MASKS.value is not None:
    recorder.masks().save(_EXPORT_MASKS.value)
  density = [float(np.mean([np.mean(run["density"]) for run in step])) for step in aux]
  by_head = {"axes": ["step", "layer", "head"], "density": np.round(realised_density(aux), 5).tolist()}
  (out / "density.json").write_text(json.dumps(by_head))
  cost = model_cost(model.config, shape)
  forwards = config.steps * (1 + (config.guidance != 1))
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
    "attention_flops_per_sample": cost.attention_flops * forwards,
    "total_flops_per_sample": cost.total * forwards,
    "flops_are": "the method's expected cost (of a router: its prior), not the realised one",
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


def _sample_config(base: SampleConfig) -> SampleConfig:
  """The config's sampling with the flags that were given."""
  given = {"steps": _STEPS.value, "guidance": _GUIDANCE.value, "soft": _SOFT.value or None}
  try:
    return SampleConfig(**{**vars(base), **{k: v for k, v in given.items() if v is not None}})
  except ValueError as error:
    raise ConfigError(str(error)) from error


if __name__ == "__main__":
  cli.run(main)
