"""Methods side by side on one checkpoint: the same weights, the same noise, one run; the first method is the reference.

  python eval.py --workdir=runs/demo --compare="dense,adaspa,block_topk(density=0.2, coarse=none),freqformer"

Each method samples the same (seed, index) pairs; quality is that of the decoded videos against the reference's
(`freqformer/evaluate/quality.py`). Compilation and running are timed apart. FLOPs are the method's own cost over the phases of the run
(`sampling_cost`, `FLOPS_ARE`), density is what ran. Seconds are those of this machine with whatever else it was doing.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np
from absl import logging
from flax import nnx

from freqformer.config import ConfigError, did_you_mean
from freqformer.cost import Cost, sampling_cost
from freqformer.diffusion.sampling import SampleConfig, compile_steps, make_step, sample
from freqformer.evaluate import quality
from freqformer.evaluate.lpips import load_lpips
from freqformer.evaluate.record_masks import realised_density
from freqformer.evaluate.restore import restore_model

METRICS = ("psnr", "ssim", "lpips")
FLOPS_ARE = (
  "the method's cost over the phases of the run, both halves of guidance counted. Heads that choose while sampling are counted "
  "as expected, not as they chose: by a router's prior, and where heads are measured by the shares that cost() assumes. "
  "Density is what ran."
)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A method on the checkpoint's weights.

  Attributes:
    text: as it was asked for: a name, or a name with some fields.
    model: abstract, for its config and tables; params: its parameters.
    restored: what else the checkpoint knows.
  """

  text: str
  model: nnx.Module
  params: object
  restored: object


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What one method sampled.

  Attributes:
    latents: `[n, t, y, x, c]`.
    density: `[steps, layers, heads]` of one sample, the first of the last batch.
    cost: FLOPs of one sample over all steps, both halves of guidance counted.
    dense: the same run with dense attention in every layer and step.
    phases: what each step did, one name per run of layers.
    compile_seconds, run_seconds: of all samples.
  """

  latents: np.ndarray
  density: np.ndarray
  cost: Cost
  dense: Cost
  phases: list[tuple[str, ...]]
  compile_seconds: float
  run_seconds: float


def split_methods(text: str) -> list[str]:
  """Methods between commas; commas within parentheses belong to a method's fields.

  Raises:
    ConfigError: for fewer than two methods or the same text twice.
  """
  parts, depth = [""], 0
  for c in text:
    depth += (c in "([") - (c in ")]")
    if c == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += c
  parts = [p.strip() for p in parts if p.strip()]
  if len(parts) < 2 or len(set(parts)) < len(parts):
    raise ConfigError(
      f"--compare={text!r} must name at least two different methods, the reference first, e.g. --compare=dense,adaspa."
    )
  return parts


def metric_functions(names, lpips_weights=None) -> dict[str, Callable]:
  """`name -> (videos, reference) -> [b]`.

  Raises:
    ConfigError: for an unknown name, or LPIPS without its weights.
  """
  for name in names:
    if name not in METRICS:
      raise ConfigError(f"metric {name!r} is unknown; {did_you_mean(name, METRICS)}")
  if "lpips" in names and not lpips_weights:
    raise ConfigError(
      "lpips needs its weights: give --lpips_weights=FILE (freqformer/evaluate/lpips.py says how to write it; nothing is downloaded), "
      "or leave it out of --metrics."
    )
  found = {"psnr": quality.psnr, "ssim": quality.ssim}
  if lpips_weights:
    found["lpips"] = load_lpips(lpips_weights)
    names = dict.fromkeys((*names, "lpips"))
  return {name: found[name] for name in names}


def candidates(
  workdir, methods, config: SampleConfig, step: int | None = None, raw: bool = False
) -> list[Candidate]:
  """Every method restored and its schedule checked, before anything is sampled.

  Raises:
    ConfigError: if the checkpoint lacks a method's parameters (named), or a schedule does not fit the run.
  """
  found = []
  for text in methods:
    candidate = Candidate(text, *restore_model(workdir, step=step, method=text, raw=raw))
    candidate.model.schedule(config.steps)
    found.append(candidate)
  return found


def draw(
  model, params, labels, indices, seed: int, shape, config: SampleConfig, progress: bool = True
) -> Drawn:
  """Samples with one method; compile seconds mean something where JAX's persistent cache is off."""
  tables, schedule, guided = model.tables(shape), model.schedule(config.steps), config.guidance != 1
  clock = time.monotonic()
  step = compile_steps(make_step(nnx.graphdef(model), config), params, model, tables, shape, config)
  compile_seconds, clock = time.monotonic() - clock, time.monotonic()
  latents, aux = sample(step, params, model, labels, indices, seed, tables, shape, config, progress)
  run_seconds = time.monotonic() - clock
  cost = sampling_cost(model.config, shape, schedule, guided)
  dense = sampling_cost(
    model.config.with_method("dense"), shape, [("",) * len(schedule[0])] * len(schedule), guided
  )
  return Drawn(latents, realised_density(aux), cost, dense, schedule, compile_seconds, run_seconds)


def judge(
  videos: Mapping[str, np.ndarray], metrics: Mapping[str, Callable]
) -> dict[str, dict[str, np.ndarray]]:
  """Every metric of every method's videos against the first method's: `{method: {metric: [b]}}`, the reference left out."""
  (_, reference), *others = videos.items()
  return {
    text: {name: metric(own, reference) for name, metric in metrics.items()} for text, own in others
  }


def row(text: str, drawn: Drawn, judged: Mapping[str, np.ndarray] | None) -> dict:
  """One method's figures as plain JSON; quality is None for the reference, equal videos have a PSNR of "inf"."""

  def plain(x):
    return "inf" if np.isinf(x) else float(x)

  return {
    "method": text,
    "quality": None if judged is None else {k: plain(np.mean(v)) for k, v in judged.items()},
    "quality_by_sample": None
    if judged is None
    else {k: [plain(x) for x in v] for k, v in judged.items()},
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
    "phases": ["/".join(dict.fromkeys(p)) for p in drawn.phases],
  }


def compare(found: list[Candidate], labels, indices, seed: int, config: SampleConfig, metrics):
  """Samples with every candidate and holds the videos against the first one's.

  Returns:
    rows (one per candidate) and `{method text: videos uint8 [b, t, y, x, 3]}`.
  """
  drawn, videos = {}, {}
  for one in found:
    logging.info("%s", one.text)
    shape = one.restored.latent_shape
    drawn[one.text] = draw(one.model, one.params, labels, indices, seed, shape, config)
    videos[one.text] = one.restored.decode(drawn[one.text].latents)
  judged = judge(videos, metrics)
  return [row(text, drawn[text], judged.get(text)) for text in drawn], videos


def table(rows: list[dict]) -> str:
  """The rows for people."""
  names = [n for n in METRICS if n in (rows[-1]["quality"] or {})]
  head = (
    f"{'method':40} {'density':>8} {'attention':>9} {'total':>7} {'compile':>9} {'per sample':>11}"
  )
  lines = [head + "".join(f" {n:>9}" for n in names)]
  for r in rows:
    numbers = (r["quality"] or {}).get
    shown = ["reference" if r["quality"] is None else numbers(n) for n in names]
    lines.append(
      f"{r['method'][:40]:40} {r['density']:8.3f} {r['attention_flops_over_dense']:9.3f} {r['total_flops_over_dense']:7.3f} "
      f"{r['compile_seconds']:7.1f} s {r['seconds_per_sample']:9.2f} s"
      + "".join(f" {x:9.3f}" if isinstance(x, float) else f" {x:>9}" for x in shown)
    )
  return "\n".join(lines)
