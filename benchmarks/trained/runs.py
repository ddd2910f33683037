"""Runs that a benchmark trains for itself, and the facts that it reads off a finished one."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
from absl import logging
from flax import nnx

from freqformer.cost import model_cost
from freqformer.data.cache import prepare
from freqformer.diffusion.sampling import SampleConfig, make_step, sample
from freqformer.evaluate.quality import artefacts, spread
from freqformer.evaluate.restore import Run, load_run
from freqformer.methods.base import Method
from freqformer.model.dit import VideoDiT
from freqformer.pages.text import aligned
from freqformer.train import metrics
from freqformer.train.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]


def run(*command: str):
  """Runs one of the project's own commands in a process of its own."""
  logging.info("python %s", " ".join(command))
  subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def train(config: str, workdir: pathlib.Path, steps: int, **overrides):
  """Trains a model unless that run is complete; a killed run goes on.

  Args:
    config: file in `configs/`.
    workdir: absolute folder of the run.
    steps: optimisation steps.
    **overrides: config keys and values; `__` stands for a dot.
  """
  checkpoints = workdir / "checkpoints"
  if checkpoints.is_dir() and Checkpoints(workdir, create=False).latest() == steps:
    return
  given = {"train.steps": steps, "train.val_batches": 16, "train.samples": 0}
  given |= {key.replace("__", "."): value for key, value in overrides.items()}
  flags = [f"--config.{key}={value}" for key, value in given.items()]
  run("train.py", f"--config={ROOT / 'configs' / config}", f"--workdir={workdir}", *flags)


class Finished:
  """A finished run.

  Attributes:
    workdir: its folder.
    restored: its checkpoint, see `load_run`.
    routing: the routing of heads on validation clips (`routing.json`), or None without a router.
    allocation: share of heads per branch by the router's hard choices, averaged over layers and
      quarters of t; None without a router.
  """

  def __init__(self, workdir: pathlib.Path):
    self.workdir = workdir
    self.restored = load_run(workdir)
    self.routing = None
    self.allocation = None
    if (workdir / "routing.json").exists():
      self.routing = json.loads((workdir / "routing.json").read_text())
      self.allocation = tuple(np.asarray(self.routing["choice"]).mean((0, 1, 2)).tolist())

  def row(self) -> dict:
    """Returns what the run was, its losses, and FLOPs of a forward pass over dense attention's.

    Losses are of validation, overall and per quarter of t, beside the linear predictor's and the
    soft loss of a routed run. Every layer is counted with the measured allocation.
    """
    config = self.restored.model.config
    shape = self.restored.latent_shape
    val = self.last("val")
    soft = self.last("val_soft")
    allocations = self.allocation and [self.allocation] * len(config.runs())
    cost = model_cost(config, shape, allocations)
    dense = model_cost(config.with_method("dense"), shape)
    return {
      "steps": self.restored.step,
      "seed": self.restored.experiment.seed,
      "val_loss": val["loss"],
      "val_buckets": val["buckets"],
      "linear_buckets": val["linear_buckets"],
      "val_soft_loss": soft and soft["loss"],
      "density": val["density"],
      "attention_flops_over_dense": cost.attention_flops / dense.attention_flops,
      "all_flops_over_dense": cost.total / dense.total,
      "allocation": self.allocation and list(self.allocation),
    }

  def routing_row(self) -> dict:
    """Returns names of branches and their weights by t, `[quarters of t][branches]`, or None.

    Weights, which are probabilities or gates, are means over layers and heads; t = 0 comes first.
    """
    routing = self.routing
    return {
      "branches": routing and routing["branches"],
      "probability_by_t": routing and np.asarray(routing["probs"]).mean((0, 2)).tolist(),
    }

  def last(self, kind: str) -> dict | None:
    """Returns the last line of a kind in `metrics.jsonl`."""
    lines = metrics.read(self.workdir / "metrics.jsonl")
    return next((line for line in reversed(lines) if line["kind"] == kind), None)

  def artefacts(self, latents) -> dict:
    """Returns seams and flicker of samples, the latter over that of validation clips."""
    real = spread(prepare(self.restored.experiment.data, "val"))
    return artefacts(self.restored, latents, real)


def with_method(restored: Run, method: Method, **fields) -> VideoDiT:
  """Returns a run's abstract model with a method that needs no name in the registry.

  Args:
    **fields: of the attention's config, to be changed as well.
  """
  fields |= {"methods": (("own", method),), "method": "own"}
  attention = dataclasses.replace(restored.model.config.attention, **fields)
  config = dataclasses.replace(restored.model.config, attention=attention)
  return nnx.eval_shape(
    lambda: VideoDiT(config, restored.latent_shape, len(restored.class_names), nnx.Rngs(0))
  )


def aux_of_run(restored: Run, labels, indices, config: SampleConfig) -> list:
  """Samples one batch with seed 0 and returns the aux of every step."""
  model = restored.model
  shape = restored.latent_shape
  step = make_step(nnx.graphdef(model), config)
  tables = model.tables(shape)
  found = sample(
    step, restored.params, model, labels, indices, 0, tables, shape, config, progress=False
  )
  return found[1]


def table(found: list[dict], columns: dict[str, Callable[[dict], str]]) -> str:
  """Returns rows as text; `columns`: title -> what a row shows there."""
  return aligned([list(columns), *([cell(r) for cell in columns.values()] for r in found)])
