"""Times a trained run's steps against dense attention: the same model, batch and device."""

import json
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from flax import nnx

from freqformer.config import numbers
from freqformer.data.fields import FieldsConfig
from freqformer.data.sources import open_split
from freqformer.diffusion.posterior import Posterior
from freqformer.disk import write_whole
from freqformer.evaluate.conditions import conditioned
from freqformer.evaluate.draw import draw, requests, sample_config
from freqformer.evaluate.restore import Run, load_run
from freqformer.model.stack import LayerStack
from freqformer.train.experiment import Experiment
from freqformer.train.mesh import all_devices
from freqformer.train.step import init_state, make_train_step

_TURNS = 3
_STEPS_PER_TURN = 2


def write_seconds(workdir) -> pathlib.Path:
  """Times a training step and a sample of a run and of dense attention; writes seconds.json.

  Training steps take turns and the median counts; a batch of samples is drawn once by each, with
  the run's own number of steps. Weights are the averaged ones of the newest checkpoint, training
  sees noise.

  Raises:
    ConfigError: the run has no checkpoint.
  """
  workdir = pathlib.Path(workdir)
  logging.info("runs on %s", all_devices()[0].device_kind)
  runs = {"own": load_run(workdir), "dense": load_run(workdir, method="dense")}
  first = runs["own"]
  first = conditioned(first, None)
  labels, indices = requests(first, None, 1)
  labels = first.inputs(labels)
  count = min(len(labels), first.experiment.sample.batch_size)
  config = sample_config(first, count)
  drawn = {
    name: draw(run, labels[:count], indices[:count], 0, config, progress=False).run_seconds / count
    for name, run in runs.items()
  }
  steps = {name: _training(run) for name, run in runs.items()}
  times = {name: [] for name in steps}
  for _ in range(_TURNS):
    for name, step in steps.items():
      times[name] += [_timed(step) for _ in range(_STEPS_PER_TURN)]
  found = {
    "device": all_devices()[0].device_kind,
    "training": {
      "unit": "a step",
      "of": f"batches of {first.experiment.train.batch_size}",
      **{name: float(np.median(own)) for name, own in times.items()},
    },
    "sampling": {"unit": "a sample", "of": f"{count} together, {config.steps} steps", **drawn},
  }
  path = workdir / "seconds.json"
  write_whole(path, json.dumps(found, indent=1))
  return path


def _training(run: Run) -> Callable:
  """Returns a training step of a run on noise, which has run once."""
  data = run.experiment.data
  # Clips from files have no target of their own, and need not be there.
  target = open_split(data, "train").target if isinstance(data, FieldsConfig) else None
  params = jax.tree.map(jax.numpy.copy, run.params)  # a step takes the arrays that it is given
  return training_step(run.model, params, run.experiment, target)


def training_step(
  model: LayerStack, params, exp: Experiment, target: Posterior | None = None
) -> Callable:
  """Returns a function that trains one step on one batch of noise; it has run once.

  Args:
    model: abstract or not.
    params: its parameters, which are used up.
    target: as of a `Split`.
  """
  train = exp.train
  shape = exp.latent_shape
  state = init_state(params, train, exp.seed)
  latents = np.random.default_rng(0).standard_normal((train.batch_size, *shape))
  label = model.null(train.batch_size)
  batch = jax.device_put({"latent": latents.astype(np.float32), "label": label})
  tables = jax.device_put(model.tables(shape, with_dense=train.attends_densely))
  own = jax.device_put(numbers(train))
  step = make_train_step(nnx.graphdef(model), train)

  def one():
    nonlocal state
    state, values = step(state, batch, tables, own, target)
    return values["loss"]

  jax.block_until_ready(one())
  return one


def _timed(step: Callable) -> float:
  """Returns the seconds of a step."""
  clock = time.perf_counter()
  jax.block_until_ready(step())
  return time.perf_counter() - clock
