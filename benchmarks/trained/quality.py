"""PSNR against density of all training-free methods on a dense model trained on the demo's data.

  python -m benchmarks.trained.quality [--steps=1000] [--samples=2] [--sampling_steps=12] [--workdir=runs/quality]

One dense model (configs/demo.py with another method and number of steps) is trained, or taken up where it was left. Every point
then samples the same classes from the same noise and is held against dense attention's videos: PSNR and SSIM per frame, then
averaged (`freqformer/evaluate/quality.py`). All methods begin with the same dense steps, a fifth of the run, so that at equal density
only masks differ. Tiles are of 16 tokens (2 x 2 x 4, 72 of them): with the demo's own 64 there are only 18 to choose from. Rows
are written one by one; points that are there are not run again (--again does).
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
from absl import flags, logging
from flax import nnx

from benchmarks.rows import RESULTS, read_rows, write_rows
from benchmarks.trained.demo_compare import finished, run
from benchmarks.trained.quality_methods import WINDOWS, Probe, settings
from freqformer.command import cli
from freqformer.data.cache import prepare
from freqformer.data.render import render_ucf101
from freqformer.diffusion.sampling import make_step, sample
from freqformer.evaluate import quality
from freqformer.evaluate.classifier import class_accuracy
from freqformer.evaluate.draw import draw
from freqformer.evaluate.restore import load_run
from freqformer.methods.dense import Dense
from freqformer.model.dit import VideoDiT
from freqformer.pages.html import panels
from freqformer.train import metrics
from freqformer.train.checkpoint import flatten

_ROOT = pathlib.Path(__file__).parents[2]
_NAME = "quality_cpu"
BLOCK = 16
WARM_SHARE = 0.2


def train(workdir: pathlib.Path, steps: int):
  """The dense model; a killed run goes on."""
  render_ucf101(_ROOT / "data" / "demo")
  if not finished(workdir, steps):
    run(
      "train.py",
      f"--config={_ROOT / 'configs' / 'demo.py'}",
      f"--workdir={workdir}",
      "--config.seed=0",
      "--config.model.attention.method=dense",
      f"--config.train.steps={steps}",
      f"--config.train.val_every={max(1, steps // 4)}",
      "--config.train.val_batches=16",
      "--config.train.checkpoint_every=100",
    )


class Study:
  """The trained weights, and what is sampled with them."""

  def __init__(self, workdir: pathlib.Path, samples: int, sampling_steps: int):
    self.restored = load_run(workdir)
    self.params = self.restored.params
    self.config, self.shape = self.restored.model.config, self.restored.latent_shape
    classes = len(self.restored.class_names)
    self.sample = dataclasses.replace(
      self.restored.experiment.sample, batch_size=classes, steps=sampling_steps
    )
    # One batch per round of classes; every sample has noise of its own.
    self.labels = np.tile(np.arange(classes, dtype=np.int32), samples)
    self.indices = self.labels * 10_000 + np.repeat(np.arange(samples, dtype=np.int32), classes)
    self.layout = self.model(Dense()).config.layout(self.shape)
    self.warm = int(WARM_SHARE * self.sample.steps + 0.5)

  def model(self, method):
    """The model under a method that needs no name in the registry."""
    attention = dataclasses.replace(
      self.config.attention, methods=(("own", method),), method="own", block=BLOCK, tile=()
    )
    config = dataclasses.replace(self.config, attention=attention)
    return nnx.eval_shape(
      lambda: VideoDiT(config, self.shape, len(self.restored.class_names), nnx.Rngs(0))
    )

  def fitted(self, method):
    """The model under a method, and the trained parameters in its form."""
    model, found = self.model(method), flatten(self.params)
    state = nnx.state(model)
    return model, jax.tree.unflatten(
      jax.tree.structure(state), [found[name] for name in flatten(state)]
    )

  def draw(self, method):
    """What was drawn, and its videos `[samples, t, y, x, 3]`."""
    model, params = self.fitted(method)
    run = dataclasses.replace(self.restored, model=model, params=params)
    drawn = draw(run, self.labels, self.indices, 0, self.sample, progress=False)
    return drawn, self.restored.decode(drawn.latents)


def point(study: Study, reference, method: str, variant: str, budget: int, config) -> dict:
  """The row of one method at one density."""
  drawn, videos = study.draw(config)
  density = drawn.density
  psnr, ssim = quality.psnr(videos, reference), quality.ssim(videos, reference)
  row = {
    "name": point_name(method, variant, budget),
    "method": method,
    "variant": variant,
    "budget": budget,
    "density_after_warmup": float(density[study.warm :].mean()),
    "density_of_run": float(density.mean()),
    "attention_flops_over_dense": drawn.cost.attention_flops / drawn.dense.attention_flops,
    "all_flops_over_dense": drawn.cost.total / drawn.dense.total,
    "psnr": float(psnr.mean()),
    "psnr_standard_error": float(psnr.std(ddof=1) / np.sqrt(len(psnr))),
    "ssim": float(ssim.mean()),
    "psnr_by_sample": psnr.tolist(),
    "samples": len(psnr),
    "sampling_steps": study.sample.steps,
    "trained_steps": study.restored.step,
  }
  logging.info(
    "%-40s density %.3f PSNR %.2f SSIM %.4f",
    row["name"],
    row["density_after_warmup"],
    row["psnr"],
    row["ssim"],
  )
  return row


def point_name(method: str, variant: str, budget: int) -> str:
  return f"{method}{f'({variant})' if variant else ''}/{budget}"


def model_row(study: Study, workdir: pathlib.Path, drawn) -> dict:
  """What the samples come from: validation loss, and whether a classifier of real clips knows dense attention's samples."""
  val = [r for r in metrics.read(workdir / "metrics.jsonl") if r["kind"] == "val"][-1]
  data = study.restored.experiment.data
  return {
    "name": "model",
    "steps": study.restored.step,
    "val_loss": val["loss"],
    "val_buckets": val["buckets"],
    "linear_buckets": val["linear_buckets"],
    "classifier": class_accuracy(
      prepare(data, "train"), prepare(data, "val"), drawn.latents, study.labels
    ),
    "tokens": study.layout.n,
    "tile": list(study.layout.tile),
    "tiles": study.layout.tiles,
    "sampling_steps": study.sample.steps,
    "dense_steps": study.warm,
    "guidance": study.sample.guidance,
  }


def probe_row(study: Study, budget: int) -> dict:
  """Errors of single attention outputs along a dense run, mean over layers: at each step, and how steps add up (`Probe`)."""
  model, params = study.fitted(Probe(budget))
  step, tables = make_step(nnx.graphdef(model), study.sample), model.tables(study.shape)
  count = study.sample.batch_size
  _, aux = sample(
    step,
    params,
    model,
    study.labels[:count],
    study.indices[:count],
    0,
    tables,
    study.shape,
    study.sample,
    False,
  )

  def layers(name):
    return np.stack([a[0][name].mean(0) for a in aux])  # [steps, candidates]

  return {
    "name": f"probe/{budget}",
    "budget": budget,
    "candidates": list(Probe.names),
    "error_by_step": layers("error").tolist(),
    "error": layers("error").mean(0).tolist(),
    "adds_up": layers("adds_up")[-1].tolist(),
    "mass_kept": float(np.mean([a[0]["recall"] for a in aux])),
    "share_of_tiles": budget / study.layout.tiles,
    "sampling_steps": study.sample.steps,
  }


def verdict(rows: list[dict]) -> dict:
  """AdaSpa against random and sliding tiles at every equal budget: paired differences over samples, dB."""
  points = [r for r in rows if "psnr_by_sample" in r]
  found = []
  for ours in (r for r in points if r["method"] == "adaspa" and not r["variant"]):
    for other in points:
      if other["budget"] == ours["budget"] and other["method"] in ("random", "sliding_tile"):
        gain = np.subtract(ours["psnr_by_sample"], other["psnr_by_sample"])
        error = float(gain.std(ddof=1) / np.sqrt(len(gain)))
        densities = [ours["density_after_warmup"], other["density_after_warmup"]]
        found.append(
          {
            "other": other["name"],
            "densities": densities,
            "gain_db": float(gain.mean()),
            "standard_error": error,
          }
        )
  return {
    "name": "summary",
    "adaspa_over": found,
    "goal": "AdaSpa above random block masks and above sliding_tile at equal density",
    "met": bool(found) and all(f["gain_db"] > 0 for f in found),
  }


def table(rows: list[dict]) -> str:
  """The points for people, and the verdict."""
  lines = [
    f"{'point':44} {'density':>8} {'of run':>7} {'attention':>9} {'PSNR':>7} {'+-':>5} {'SSIM':>7}"
  ]
  points = [r for r in rows if "psnr_by_sample" in r]
  for r in sorted(points, key=lambda r: (r["budget"], -r["psnr"])):
    lines.append(
      f"{r['name']:44} {r['density_after_warmup']:8.3f} {r['density_of_run']:7.3f} {r['attention_flops_over_dense']:9.3f} "
      f"{r['psnr']:7.2f} {r['psnr_standard_error']:5.2f} {r['ssim']:7.4f}"
    )
  for f in verdict(rows)["adaspa_over"]:
    lines.append(
      f"AdaSpa over {f['other']:32} {f['gain_db']:+6.2f} dB +- {f['standard_error']:.2f}"
    )
  for r in (r for r in rows if "adds_up" in r):
    shown = [
      f"{n}: {e:.4f} x {a:.2f}"
      for n, e, a in zip(r["candidates"], r["error"], r["adds_up"], strict=True)
    ]
    lines.append(
      f"{r['name']:10} |e|^2 / |out|^2 x how steps add up  {';  '.join(shown)};  mass kept {r['mass_kept']:.3f}"
    )
  return "\n".join(lines)


def best_of_budgets(points: list[dict]) -> tuple[list[dict], list[dict]]:
  """Of one method's points that of highest PSNR per budget (e.g. of two windows of as many tiles), by density; the others."""
  best = {r["budget"]: r for r in sorted(points, key=lambda r: r["psnr"])}
  return sorted(best.values(), key=lambda r: r["density_after_warmup"]), [
    r for r in points if best[r["budget"]] is not r
  ]


def plot(rows: list[dict], path: pathlib.Path) -> pathlib.Path:
  """PSNR and SSIM against density after the warm-up; a line joins each method's best points, one per budget."""
  points = [r for r in rows if "psnr_by_sample" in r]
  figure, axes = panels(2, 11, 4.2)
  curves = sorted(
    {(r["method"], r["variant"] if r["method"] in ("random", "adaspa") else "") for r in points}
  )
  for i, (method, variant) in enumerate(curves):
    own = [
      r
      for r in points
      if r["method"] == method and (variant == r["variant"] or method not in ("random", "adaspa"))
    ]
    style = dict(
      color=f"C{i}", ls="--" if method == "random" else "-", label=f"{method} {variant}".strip()
    )
    own, others = best_of_budgets(own)
    x = [r["density_after_warmup"] for r in own]
    axes[0].errorbar(
      x,
      [r["psnr"] for r in own],
      [r["psnr_standard_error"] for r in own],
      fmt="o",
      ms=4,
      lw=1.2,
      **style,
    )
    axes[1].plot(x, [r["ssim"] for r in own], "o", ms=4, lw=1.2, **style)
    for axis, key in zip(axes, ("psnr", "ssim"), strict=True):
      axis.plot(
        [r["density_after_warmup"] for r in others],
        [r[key] for r in others],
        "o",
        ms=4,
        mfc="none",
        color=f"C{i}",
      )
  for axis, label in zip(axes, ("PSNR against dense, dB", "SSIM against dense"), strict=True):
    axis.set(xlabel="density after the dense steps", ylabel=label)
    axis.grid(alpha=0.3)
  axes[1].legend(
    fontsize=8, frameon=False, title="hollow: not the best of its budget", title_fontsize=8
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  return path


def main(_):
  workdir = (pathlib.Path(_WORKDIR.value) / f"dense-seed0-steps{_STEPS.value}").absolute()
  train(workdir, _STEPS.value)
  study = Study(workdir, _SAMPLES.value, _SAMPLING.value)
  options = f"--steps={_STEPS.value} --samples={_SAMPLES.value} --sampling_steps={_SAMPLING.value}"
  command = f"python -m benchmarks.trained.quality {options}"
  path = RESULTS / f"{_NAME}.json"
  there = set() if _AGAIN.value else {r["name"] for r in read_rows(path) if r["command"] == command}
  todo = [
    s
    for s in settings(study.layout, study.warm, study.sample.steps)
    if point_name(*s[:3]) not in there
  ]
  if todo:
    drawn, reference = study.draw(Dense())
    write_rows(_NAME, [model_row(study, workdir, drawn)], command)
  for setting in todo:
    write_rows(_NAME, [point(study, reference, *setting)], command)
  for budget in (k for k in WINDOWS if f"probe/{k}" not in there):
    write_rows(_NAME, [probe_row(study, budget)], command)
  rows = read_rows(path)
  write_rows(_NAME, [verdict(rows)], command)
  print(table(rows))
  print(json.dumps(next(r for r in rows if r["name"] == "model")["classifier"]))
  print(plot(rows, RESULTS / f"{_NAME}.png"))


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", str(_ROOT / "runs" / "quality"), "Folder of the run.")
  _STEPS = flags.DEFINE_integer("steps", 1000, "Optimisation steps of the dense model.")
  _SAMPLES = flags.DEFINE_integer("samples", 2, "Samples per class.", lower_bound=1)
  _SAMPLING = flags.DEFINE_integer("sampling_steps", 12, "Denoising steps.", lower_bound=5)
  _AGAIN = flags.DEFINE_bool("again", False, "Measure points anew that have a row.")
  cli.run(main)
