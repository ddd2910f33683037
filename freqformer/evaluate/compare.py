"""Compares methods on one checkpoint: the same weights, the same noise; the first is the reference.

  python eval.py --workdir=runs/demo --compare="dense,adaspa,block_topk(density=0.2, coarse=none)"

Each method samples the same (seed, index) pairs. Quality is that of the decoded videos against the
reference's. FLOPs are the method's own cost over the phases of the run (`FLOPS_ARE`), density is
what ran. Seconds are those of this machine with whatever else it was doing.
"""

import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from absl import logging

from freqformer.config import ConfigError, did_you_mean, split_outside_brackets
from freqformer.diffusion.sampling import SampleConfig
from freqformer.evaluate import quality
from freqformer.evaluate.draw import Drawn, draw
from freqformer.evaluate.lpips import load_lpips
from freqformer.evaluate.restore import Run, load_run

# Compares videos with a reference, both uint8 `[b, t, y, x, 3]`: one number per video, `[b]`.
Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]
# LPIPS is loaded from its weights.
METRICS: dict[str, Metric | None] = {"psnr": quality.psnr, "ssim": quality.ssim, "lpips": None}


def split_methods(text: str) -> list[str]:
  """Returns the methods of `--compare`; ConfigError for less than two, or one of them twice."""
  methods = split_outside_brackets(text)
  if len(methods) < 2 or len(set(methods)) < len(methods):
    raise ConfigError(
      f"--compare={text!r} must name at least two different methods, the reference first, e.g. "
      "--compare=dense,adaspa."
    )
  return methods


def metric_functions(names: Iterable[str], lpips_weights=None) -> dict[str, Metric]:
  """Returns the metrics by name, and LPIPS if its file of weights is given.

  Raises:
    ConfigError: a name is unknown, or LPIPS has no weights.
  """
  names = list(names)
  for name in names:
    if name not in METRICS:
      raise ConfigError(f"metric {name!r} is unknown; {did_you_mean(name, METRICS)}")
    if name == "lpips" and not lpips_weights:
      raise ConfigError(
        "lpips needs its weights: give --lpips_weights=FILE (freqformer/evaluate/lpips.py says how "
        "to write it; nothing is downloaded), or leave it out of --metrics."
      )
  chosen = {name: METRICS[name] for name in names}
  if lpips_weights:
    chosen["lpips"] = load_lpips(lpips_weights)
  return chosen


def candidates(
  workdir,
  methods: Iterable[str],
  steps: int,
  checkpoint: int | None = None,
  raw: bool = False,
  schedule: str | None = None,
) -> dict[str, Run]:
  """Loads the run under each method and checks its schedule, before anything is sampled.

  `schedule` is that of `load_run`.

  Raises:
    ConfigError: the checkpoint lacks a method's parameters (named), or a schedule does not fit.
  """
  found = {}
  for method in methods:
    found[method] = load_run(workdir, step=checkpoint, method=method, raw=raw, schedule=schedule)
    found[method].model.schedule(steps)
  return found


def compare(
  found: Mapping[str, Run],
  labels,
  indices: np.ndarray,
  seed: int,
  config: SampleConfig,
  metrics: Mapping[str, Metric],
  null=None,
) -> tuple[list[dict], dict[str, np.ndarray]]:
  """Samples with every candidate and compares the videos with the first one's.

  Args:
    found: a `Run` or `PretrainedRun` by method, the reference first.
    labels: as of `draw`, like what follows.
    indices: of the samples.
    seed: of the noise.
    config: how they are sampled.
    metrics: by name.
    null: as of `draw`.

  Returns:
    rows: one per candidate, plain JSON.
    videos: per candidate uint8 `[b, t, y, x, 3]`.
  """
  rows = []
  videos = {}
  for method, run in found.items():
    logging.info("%s", method)
    drawn = draw(run, labels, indices, seed, config, null=null)
    clock = time.monotonic()
    videos[method] = run.decode(drawn.latents)
    decoding = time.monotonic() - clock
    reference = videos[rows[0]["method"]] if rows else None
    judged = row(method, drawn, videos[method], reference, metrics)
    rows.append(judged | {"decode_seconds": decoding})
  return rows, videos


def paired(rows: list[dict]) -> list[dict]:
  """Returns how two methods differ in quality on the same clips, of each pair behind the reference.

  Returns:
    plain JSON: the two methods, the metric, the number of clips, the mean difference of the first
    from the second, its standard error and t; pairs of less than two clips are left out, and those
    with a clip that equals the reference's.
  """
  found = []
  for i, first in enumerate(rows[1:], 1):
    for second in rows[i + 1 :]:
      for metric, values in (first["quality_by_sample"] or {}).items():
        pair = (values, second["quality_by_sample"][metric])
        if len(values) < 2 or "inf" in (*pair[0], *pair[1]):
          continue
        difference = np.subtract(*pair)
        error = float(difference.std(ddof=1) / len(difference) ** 0.5)
        mean = float(difference.mean())
        found.append(
          {
            "methods": [first["method"], second["method"]],
            "metric": metric,
            "clips": len(difference),
            "mean": mean,
            "standard_error": error,
            "t": mean / error if error else None,
          }
        )
  return found


def row(
  method: str,
  drawn: Drawn,
  videos: np.ndarray,
  reference: np.ndarray | None,
  metrics: Mapping[str, Metric],
) -> dict:
  """Returns one method's figures as plain JSON; its quality is None if it is the reference.

  Equal videos have a PSNR of "inf", because JSON knows no infinity.
  """

  def plain(x) -> float | str:
    return "inf" if np.isinf(x) else float(x)

  judged = {}
  if reference is not None:
    judged = {name: metric(videos, reference) for name, metric in metrics.items()}
  return {
    "method": method,
    "quality": {name: plain(np.mean(x)) for name, x in judged.items()} or None,
    "quality_by_sample": {name: [plain(y) for y in x] for name, x in judged.items()} or None,
    **drawn.figures(),
    "attention_flops_over_dense": drawn.cost.attention_flops / drawn.dense.attention_flops,
    "total_flops_over_dense": drawn.cost.total / drawn.dense.total,
    "density": float(drawn.density.mean()),
    "density_by_step_layer_head": np.round(drawn.density, 5).tolist(),
    "phases": ["/".join(dict.fromkeys(step)) for step in drawn.phases],
  }
