"""PSNR against density of all training-free methods on a dense model trained on the demo's data.

  python -m benchmarks.trained.quality [--steps=1000] [--samples=2] [--sampling_steps=12]
                                       [--workdir=runs/quality] [--again]

One dense model (configs/comparison.py with another method and number of steps) is trained, or
resumed. Every point then samples the same classes from the same noise and is compared with dense
attention's videos: PSNR and SSIM per frame, then averaged (`freqformer/evaluate/quality.py`). All
methods begin with the same dense steps, a fifth of the run, so that at equal density only masks
differ. Tiles have 16 tokens (2 x 2 x 4, 72 of them): with the model's own 64 there are only 18.
Rows are written one by one; points that have a row are not run again unless --again is given.
"""

import dataclasses
import pathlib
from operator import itemgetter

import jax
import numpy as np
from absl import flags, logging
from flax import nnx

from benchmarks.rows import RESULTS, read_rows, write_rows
from benchmarks.trained.quality_methods import WINDOWS, Probe, Setting, settings
from benchmarks.trained.runs import ROOT, Finished, aux_of_run, table, train, with_method
from freqformer.command import cli
from freqformer.data.render import render_ucf101
from freqformer.evaluate import quality
from freqformer.evaluate.draw import draw
from freqformer.evaluate.restore import Run
from freqformer.methods.base import Method
from freqformer.methods.dense import Dense
from freqformer.model.leaves import flatten
from freqformer.pages.html import panels
from freqformer.simulation.output import number

_NAME = "quality_cpu"
BLOCK = 16  # tokens of a tile
WARM_SHARE = 0.2  # dense steps of a run


class Study:
  """The trained weights and the samples that are drawn with them.

  Attributes:
    run: the trained run; `restored` is its checkpoint.
    sample: the sampler's config; a batch is one sample of every class.
    labels: int32 `[samples]`, class of each sample.
    indices: int32 `[samples]`, numbers that seed each sample's noise.
    layout: the tiles of the compared methods.
    warm: dense steps of a run.
  """

  def __init__(self, workdir: pathlib.Path, samples: int, sampling_steps: int):
    self.run = Finished(workdir)
    self.restored = self.run.restored
    classes = len(self.restored.class_names)
    self.sample = dataclasses.replace(
      self.restored.experiment.sample, batch_size=classes, steps=sampling_steps
    )
    self.labels = np.tile(np.arange(classes, dtype=np.int32), samples)
    self.indices = self.labels * 10_000 + np.repeat(np.arange(samples, dtype=np.int32), classes)
    self.layout = self.fitted(Dense()).model.config.layout(self.restored.latent_shape)
    self.warm = int(WARM_SHARE * self.sample.steps + 0.5)

  def fitted(self, method: Method) -> Run:
    """Returns the run with another method: its model, and the trained parameters in its form."""
    model = with_method(self.restored, method, block=BLOCK, tile=())
    state = nnx.state(model)
    found = flatten(self.restored.params)
    leaves = [found[name] for name in flatten(state)]
    params = jax.tree.unflatten(jax.tree.structure(state), leaves)
    return dataclasses.replace(self.restored, model=model, params=params)

  def draw(self, method: Method):
    """Samples with a method; returns what was drawn and the videos `[samples, t, y, x, 3]`."""
    run = self.fitted(method)
    drawn = draw(run, self.labels, self.indices, 0, self.sample, progress=False)
    return drawn, self.restored.decode(drawn.latents)


def point(study: Study, reference, setting: Setting) -> dict:
  """Measures one method at one density against the reference videos."""
  drawn, videos = study.draw(setting.config)
  density = drawn.density
  psnr = quality.psnr(videos, reference)
  ssim = quality.ssim(videos, reference)
  row = {
    "name": setting.name,
    "method": setting.method,
    "variant": setting.variant,
    "budget": setting.budget,
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
    "%-40s density %.3f PSNR %.2f", row["name"], row["density_after_warmup"], row["psnr"]
  )
  return row


def model_row(study: Study, drawn) -> dict:
  """Describes the trained model: its losses, and artefacts of dense attention's samples."""
  return {
    "name": "model",
    **study.run.row(),
    **study.run.artefacts(drawn.latents),
    "tokens": study.layout.n,
    "tile": list(study.layout.tile),
    "tiles": study.layout.tiles,
    "sampling_steps": study.sample.steps,
    "dense_steps": study.warm,
    "guidance": study.sample.guidance,
  }


def probe_row(study: Study, budget: int) -> dict:
  """Measures errors of single attention outputs along a dense run (`Probe`), mean over layers."""
  count = study.sample.batch_size
  run = study.fitted(Probe(budget))
  aux = aux_of_run(run, study.labels[:count], study.indices[:count], study.sample)

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
  """Compares AdaSpa with random and sliding tiles at equal budgets: paired differences in dB."""
  points = [r for r in rows if "psnr_by_sample" in r]
  found = []
  for ours in (r for r in points if r["method"] == "adaspa" and not r["variant"]):
    for other in points:
      if other["budget"] == ours["budget"] and other["method"] in ("random", "sliding_tile"):
        gain = np.subtract(ours["psnr_by_sample"], other["psnr_by_sample"])
        error = float(gain.std(ddof=1) / np.sqrt(len(gain)))
        found.append(
          {
            "other": other["name"],
            "densities": [ours["density_after_warmup"], other["density_after_warmup"]],
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


def text(rows: list[dict]) -> str:
  """Formats the points, the verdict and the probes as text."""
  points = [r for r in rows if "psnr_by_sample" in r]
  columns = {
    "point": itemgetter("name"),
    "density": number("density_after_warmup", ".3f"),
    "of run": number("density_of_run", ".3f"),
    "attention": number("attention_flops_over_dense", ".3f"),
    "PSNR": number("psnr", ".2f"),
    "+-": number("psnr_standard_error", ".2f"),
    "SSIM": number("ssim", ".4f"),
  }
  lines = [table(sorted(points, key=lambda r: (r["budget"], -r["psnr"])), columns)]
  for f in verdict(rows)["adaspa_over"]:
    lines.append(f"AdaSpa over {f['other']} {f['gain_db']:+.2f} dB +- {f['standard_error']:.2f}")
  for r in (r for r in rows if "adds_up" in r):
    shown = [
      f"{n}: {e:.4f} x {a:.2f}"
      for n, e, a in zip(r["candidates"], r["error"], r["adds_up"], strict=True)
    ]
    lines.append(
      f"{r['name']}  |e|^2 / |out|^2 x how steps add up  {';  '.join(shown)};  "
      f"mass kept {r['mass_kept']:.3f}"
    )
  return "\n".join(lines)


def best_of_budgets(points: list[dict]) -> tuple[list[dict], list[dict]]:
  """Splits one method's points into the best PSNR of each budget, by density, and the others."""
  best = {r["budget"]: r for r in sorted(points, key=lambda r: r["psnr"])}
  others = [r for r in points if best[r["budget"]] is not r]
  return sorted(best.values(), key=lambda r: r["density_after_warmup"]), others


def plot(rows: list[dict], path: pathlib.Path) -> pathlib.Path:
  """Draws PSNR and SSIM against density; a line joins each method's best points, one per budget."""
  curves = {}
  for r in (r for r in rows if "psnr_by_sample" in r):
    variant = r["variant"] if r["method"] in ("random", "adaspa") else ""
    curves.setdefault((r["method"], variant), []).append(r)
  figure, axes = panels(2, 11, 4.2)
  for i, ((method, variant), points) in enumerate(sorted(curves.items())):
    best, others = best_of_budgets(points)
    for axis, key in zip(axes, ("psnr", "ssim"), strict=True):
      axis.errorbar(
        [r["density_after_warmup"] for r in best],
        [r[key] for r in best],
        [r["psnr_standard_error"] for r in best] if key == "psnr" else None,
        fmt="o",
        ms=4,
        lw=1.2,
        color=f"C{i}",
        ls="--" if method == "random" else "-",
        label=f"{method} {variant}".strip(),
      )
      x = [r["density_after_warmup"] for r in others]
      axis.plot(x, [r[key] for r in others], "o", ms=4, mfc="none", color=f"C{i}")
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
  steps = _STEPS.value
  workdir = (pathlib.Path(_WORKDIR.value) / f"dense-seed0-steps{steps}").absolute()
  render_ucf101(ROOT / "data" / "comparison")
  train(
    "comparison.py",
    workdir,
    steps,
    seed=0,
    model__attention__method="dense",
    train__val_every=max(1, steps // 4),
    train__checkpoint_every=100,
  )
  study = Study(workdir, _SAMPLES.value, _SAMPLING.value)
  options = f"--steps={steps} --samples={_SAMPLES.value} --sampling_steps={_SAMPLING.value}"
  command = f"python -m benchmarks.trained.quality {options}"
  path = RESULTS / f"{_NAME}.json"
  there = set() if _AGAIN.value else {r["name"] for r in read_rows(path) if r["command"] == command}
  points = settings(study.layout, study.warm, study.sample.steps)
  if todo := [setting for setting in points if setting.name not in there]:
    drawn, reference = study.draw(Dense())
    write_rows(_NAME, [model_row(study, drawn)], command)
  for setting in todo:
    write_rows(_NAME, [point(study, reference, setting)], command)
  for budget in (k for k in WINDOWS if f"probe/{k}" not in there):
    write_rows(_NAME, [probe_row(study, budget)], command)
  rows = read_rows(path)
  write_rows(_NAME, [verdict(rows)], command)
  print(text(rows))
  print(plot(rows, RESULTS / f"{_NAME}.png"))


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string("workdir", str(ROOT / "runs" / "quality"), "Folder of the run.")
  _STEPS = flags.DEFINE_integer("steps", 1000, "Optimisation steps of the dense model.")
  _SAMPLES = flags.DEFINE_integer("samples", 2, "Samples per class.", lower_bound=1)
  _SAMPLING = flags.DEFINE_integer("sampling_steps", 12, "Denoising steps.", lower_bound=5)
  _AGAIN = flags.DEFINE_bool("again", False, "Measure points anew that have a row.")
  cli.run(main)
