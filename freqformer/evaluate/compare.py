"""Compares methods on one checkpoint: the same weights, the same noise; the first is the reference.

  python eval.py --workdir=runs/demo --compare="dense,adaspa,block_topk(density=0.2, coarse=none)"

Each method samples the same (seed, index) pairs. Quality is that of the decoded videos against the
reference's (`freqformer/evaluate/quality.py`). FLOPs are the method's own cost over the phases of
the run (`FLOPS_ARE`), density is what ran. Seconds are those of this machine with whatever else it
was doing.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from absl import logging

from freqformer.config import ConfigError, did_you_mean, split_outside_brackets
from freqformer.diffusion.sampling import SampleConfig
from freqformer.evaluate import quality
from freqformer.evaluate.draw import Drawn, draw
from freqformer.evaluate.lpips import load_lpips
from freqformer.evaluate.restore import Run, load_run

METRICS = ("psnr", "ssim", "lpips")
# Compares videos with a reference, both uint8 `[b, t, y, x, 3]`: one number per video, `[b]`.
Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]


def split_methods(text: str) -> list[str]:
  """Returns the methods of `--compare`, separated by commas outside brackets.

  Raises:
    ConfigError: there are fewer than two methods, or one of them twice.
  """
  methods = split_outside_brackets(text)
  if len(methods) < 2 or len(set(methods)) < len(methods):
    raise ConfigError(
      f"--compare={text!r} must name at least two different methods, the reference first, e.g. "
      "--compare=dense,adaspa."
    )
  return methods


def metric_functions(names: Iterable[str], lpips_weights=None) -> dict[str, Metric]:
  """Returns the metrics by name.

  Args:
    names: some of `METRICS`.
    lpips_weights: file of LPIPS's weights, which also asks for LPIPS; or None.

  Raises:
    ConfigError: a name is unknown, or LPIPS has no weights.
  """
  names = list(names)
  for name in names:
    if name not in METRICS:
      raise ConfigError(f"metric {name!r} is unknown; {did_you_mean(name, METRICS)}")
  if "lpips" in names and not lpips_weights:
    raise ConfigError(
      "lpips needs its weights: give --lpips_weights=FILE (freqformer/evaluate/lpips.py says how "
      "to write it; nothing is downloaded), or leave it out of --metrics."
    )
  known = {"psnr": quality.psnr, "ssim": quality.ssim}
  if lpips_weights:
    known["lpips"] = load_lpips(lpips_weights)
    names.append("lpips")
  return {name: known[name] for name in names}


def candidates(
  workdir, methods: Iterable[str], steps: int, checkpoint: int | None = None, raw: bool = False
) -> dict[str, Run]:
  """Loads the run under each method and checks its schedule, before anything is sampled.

  Args:
    workdir: the run's folder.
    methods: names, each maybe with fields: "radial(decay=0.5)".
    steps: denoising steps.
    checkpoint: training step of the checkpoint; None takes the newest.
    raw: take the raw weights instead of their average.

  Raises:
    ConfigError: the checkpoint lacks a method's parameters (named), or a schedule does not fit.
  """
  found = {}
  for method in methods:
    found[method] = load_run(workdir, step=checkpoint, method=method, raw=raw)
    found[method].model.schedule(steps)
  return found


def compare(
  found: Mapping[str, Run],
  labels: np.ndarray,
  indices: np.ndarray,
  seed: int,
  config: SampleConfig,
  metrics: Mapping[str, Metric],
) -> tuple[list[dict], dict[str, np.ndarray]]:
  """Samples with every candidate and compares the videos with the first one's.

  Returns:
    rows: one per candidate, plain JSON.
    videos: per candidate uint8 `[b, t, y, x, 3]`.
  """
  drawn = {}
  videos = {}
  for method, run in found.items():
    logging.info("%s", method)
    drawn[method] = draw(run, labels, indices, seed, config)
    videos[method] = run.decode(drawn[method].latents)
  judged = judge(videos, metrics)
  return [row(method, drawn[method], judged.get(method)) for method in drawn], videos


def judge(
  videos: Mapping[str, np.ndarray], metrics: Mapping[str, Metric]
) -> dict[str, dict[str, np.ndarray]]:
  """Compares every method's videos with the first method's: `{method: {metric: [b]}}`.

  The reference is left out.
  """
  (_, reference), *others = videos.items()
  return {
    method: {name: metric(own, reference) for name, metric in metrics.items()}
    for method, own in others
  }


def row(method: str, drawn: Drawn, judged: Mapping[str, np.ndarray] | None) -> dict:
  """Returns one method's figures as plain JSON.

  Args:
    method: its name.
    drawn: its samples.
    judged: metrics `[b]` by name; None for the reference. Equal videos have a PSNR of "inf".
  """
  return {
    "method": method,
    "quality": judged and {name: _plain(np.mean(x)) for name, x in judged.items()},
    "quality_by_sample": judged and {name: [*map(_plain, x)] for name, x in judged.items()},
    "compile_seconds": drawn.compile_seconds,
    "run_seconds": drawn.run_seconds,
    "seconds_per_sample": drawn.run_seconds / len(drawn.latents),
    "attention_flops_per_sample": drawn.cost.attention_flops,
    "total_flops_per_sample": drawn.cost.total,
    "attention_flops_over_dense": drawn.cost.attention_flops / drawn.dense.attention_flops,
    "total_flops_over_dense": drawn.cost.total / drawn.dense.total,
    "density": float(drawn.density.mean()),
    "density_by_step": drawn.density.mean((1, 2)).tolist(),
    "density_by_step_layer_head": np.round(drawn.density, 5).tolist(),
    "phases": ["/".join(dict.fromkeys(step)) for step in drawn.phases],
  }


def _plain(x) -> float | str:
  """Returns a number as JSON has it, which knows no infinity."""
  return "inf" if np.isinf(x) else float(x)


def table(rows: list[dict]) -> str:
  """Returns the rows as aligned text."""
  names = [name for name in METRICS if name in (rows[-1]["quality"] or {})]
  heads = ["density", "attention", "total", "compile", "per sample", *names]
  widths = [8, 9, 7, 9, 11] + [9] * len(names)
  lines = [f"{'method':40}"]
  lines[0] += "".join(f" {head:>{width}}" for head, width in zip(heads, widths, strict=True))
  for r in rows:
    cells = [
      f"{r['density']:.3f}",
      f"{r['attention_flops_over_dense']:.3f}",
      f"{r['total_flops_over_dense']:.3f}",
      f"{r['compile_seconds']:.1f} s",
      f"{r['seconds_per_sample']:.2f} s",
    ]
    for name in names:
      value = "reference" if r["quality"] is None else r["quality"][name]
      cells.append(f"{value:.3f}" if isinstance(value, float) else value)
    line = "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    lines.append(f"{r['method'][:40]:40}{line}")
  return "\n".join(lines)
