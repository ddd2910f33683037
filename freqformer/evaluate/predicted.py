"""Speed-ups of pretrained models: as the simulator has them, beside those that were measured."""

import dataclasses
import math
from collections.abc import Iterable

from freqformer.evaluate.pretrained import PretrainedRun
from freqformer.model.schedule import parse_schedule
from freqformer.model.wan import WanConfig
from freqformer.simulation.descriptions import ModelCard, gpu_named, load_gpu
from freqformer.simulation.forward import Plan
from freqformer.simulation.scaling import denoising_run
from freqformer.train.mesh import all_devices

_ELSEWHERE = "h100"  # whose simulation stands beside what ran on a device that has none


def add_speedups(
  rows: list[dict], runs: Iterable[PretrainedRun], evaluations: int, schedule: str | None
):
  """Adds to rows of `compare` how fast each ran against the first one, and should have.

  Added are `speedup`, by measured seconds; `predicted_speedup`, of the whole run with its phases,
  warm-up included; and `predicted_on`, the GPU that was simulated.

  Args:
    rows: one of each run.
    runs: the first one is compared with.
    evaluations: of the model in a run.
    schedule: dense evaluations and layers; None: none.
  """
  gpu = load_gpu(gpu_named(all_devices()[0].device_kind) or _ELSEWHERE)
  seconds = []
  for row, run in zip(rows, runs, strict=True):
    config = run.model.config
    card = card_of(config, run.latent_shape)
    method = config.runs()[0][1]
    plan = Plan(card, row["method"], method, card.grid, config.attention.block)
    dense = parse_schedule(schedule or "")
    seconds.append(denoising_run(plan, gpu, steps=evaluations, schedule=dense)["run_seconds"])
    row["speedup"] = rows[0]["run_seconds"] / row["run_seconds"]
    row["predicted_speedup"] = seconds[0] / seconds[-1]
    row["predicted_on"] = gpu.name


def card_of(config: WanConfig, latent_shape) -> ModelCard:
  """Returns a model at a size as the simulator takes it."""
  shape = config.block_shape
  sizes = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)}
  return ModelCard(
    **sizes,
    name="pretrained",
    title="pretrained",
    layers=config.depth,
    patch_channels=latent_shape[-1] * math.prod(config.patch),
    patch=config.patch,
    compression=(4, 8, 8),
    fps=16.0,
    grid=config.layout(latent_shape).grid,
    steps=50,
    forwards=2,
    parameters=1.0,
    sources=(),
  )
