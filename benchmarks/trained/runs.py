"""Runs that a benchmark trains for itself, and the facts that it reads off a finished one."""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import logging

from freqformer.cost import Cost, model_cost
from freqformer.evaluate.restore import load_run
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
  given = {"train.steps": steps, "train.val_batches": 16}
  given |= {key.replace("__", "."): value for key, value in overrides.items()}
  flags = [f"--config.{key}={value}" for key, value in given.items()]
  run("train.py", f"--config={ROOT / 'configs' / config}", f"--workdir={workdir}", *flags)


class Finished:
  """A finished run.

  Attributes:
    workdir: its folder.
    model: an abstract `VideoDiT` of its config.
    params: the trained parameters.
    restored: the rest of the checkpoint, see `load_run`.
    routing: the routing of heads on validation clips (`routing.json`), or None without a router.
    allocation: share of heads per branch by the router's hard choices, averaged over layers and
      quarters of t; None without a router.
  """

  def __init__(self, workdir: pathlib.Path):
    self.workdir = workdir
    self.restored = load_run(workdir)
    self.model = self.restored.model
    self.params = self.restored.params
    self.routing = None
    self.allocation = None
    if (workdir / "routing.json").exists():
      self.routing = json.loads((workdir / "routing.json").read_text())
      self.allocation = tuple(np.asarray(self.routing["choice"]).mean((0, 1, 2)).tolist())

  def cost(self) -> Cost:
    """Counts one forward pass with the measured allocation in every layer."""
    allocations = self.allocation and [self.allocation] * len(self.model.config.runs())
    return model_cost(self.model.config, self.restored.latent_shape, allocations)

  def dense_cost(self) -> Cost:
    """Counts one forward pass of the same model with dense attention."""
    return model_cost(self.model.config.with_method("dense"), self.restored.latent_shape)

  def last(self, kind: str) -> dict | None:
    """Returns the last line of a kind in `metrics.jsonl`."""
    lines = metrics.read(self.workdir / "metrics.jsonl")
    return next((line for line in reversed(lines) if line["kind"] == kind), None)

  def losses(self) -> dict:
    """Validation loss, overall and per quarter of t, and the linear predictor's; the soft loss of a
    routed run."""
    val = self.last("val")
    soft = self.last("val_soft")
    return {
      "val_loss": val["loss"],
      "val_buckets": val["buckets"],
      "linear_buckets": val["linear_buckets"],
      "val_soft_loss": soft and soft["loss"],
    }
