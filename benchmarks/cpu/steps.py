"""Seconds and FLOPs of a training step and of a sampling run, each method over dense attention.

  python -m benchmarks.cpu.steps            # 8 minutes on 2 cores: results/steps_cpu.json
  python -m benchmarks.cpu.steps --quick    # a tiny model, no rows

The model is that of configs/comparison.py with the method in all layers, untrained: routers are
where they begin, losses mean nothing; and the same on frames of twice the height and width, with
the same tiles and windows. Methods take turns, so that ratios are of one run. Sampling is the run
that configs/comparison.py asks for, all its steps, guidance included; of larger frames two samples.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from absl import flags
from flax import nnx

from benchmarks.rows import write_rows
from benchmarks.timing import Timing, beside_others, in_turns, timed
from benchmarks.trained.runs import ROOT
from freqformer.analysis.timed_steps import training_step
from freqformer.command import cli
from freqformer.command.files import read_config
from freqformer.cost import model_cost, sampling_cost, training_flops
from freqformer.diffusion.sampling import SampleConfig, compile_steps, make_step, sample
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.pages.text import aligned
from freqformer.train.experiment import Experiment, experiment

NAME = "steps_cpu"
METHODS = ("dense", "octaves", "freqformer")
_CLASSES = 8
_SMALL = 96
SIDES = (_SMALL, 2 * _SMALL)  # pixels of a frame: of configs/comparison.py, and twice that
_QUICK_SIDES = (32,)
_TURNS = 3
_STEPS_PER_TURN = 4


def of_side(side: int, quick: bool = False) -> Experiment:
  """Returns the experiment of configs/comparison.py on frames of `side` x `side` pixels."""
  config = read_config(ROOT / "configs" / "comparison.py")
  config.data.resolution = (side, side)
  if side > _SMALL:
    config.sample.batch_size = 2
  if quick:
    config.model.depth = 1
    config.sample.steps = 2
  return experiment(config)


def training(exp: Experiment) -> Callable[[int], list[float]]:
  """Returns a sampler of seconds per training step; compiles and runs the first one here."""
  model = VideoDiT(exp.model, exp.latent_shape, _CLASSES, nnx.Rngs(0))
  one = training_step(model, nnx.state(model), exp)
  return lambda turn: [timed(one) for _ in range(_STEPS_PER_TURN)]


def sampling(exp: Experiment, config: SampleConfig) -> Callable[[int], list[float]]:
  """Returns a sampler of seconds per run of one batch; compiles and runs the first one here."""
  model = VideoDiT(exp.model, exp.latent_shape, _CLASSES, nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  tables = make_tables(exp.model, exp.latent_shape)
  step = make_step(graphdef, config)
  step = compile_steps(step, params, model, tables, exp.latent_shape, config)
  indices = np.arange(config.batch_size)
  args = (step, params, model, indices % _CLASSES, indices, 0, tables, exp.latent_shape, config)

  def run():
    return sample(*args, progress=False)[0]

  run()
  return lambda turn: [timed(run)]


def measure(exp: Experiment, config: SampleConfig, turns: int) -> list[dict]:
  """Returns a row per method and kind of step: seconds and FLOPs, each over dense attention's."""
  experiments = of_methods(exp)
  kinds = {
    "training": {name: training(own) for name, own in experiments.items()},
    "sampling": {name: sampling(own, config) for name, own in experiments.items()},
  }
  found = []
  for kind, samplers in kinds.items():
    times = in_turns(samplers, turns)
    flops = counted(exp, kind)
    place = f"{kind}/{exp.model.layout(exp.latent_shape).n}"
    found += [over_dense(place, name, times, flops) for name in METHODS]
  return found


def of_methods(exp: Experiment) -> dict[str, Experiment]:
  """Returns the experiment with each of `METHODS` in all layers."""
  return {name: dataclasses.replace(exp, model=exp.model.with_method(name)) for name in METHODS}


def counted(exp: Experiment, kind: str) -> dict[str, float]:
  """Returns FLOPs by method: of a sample's step, or of its run, as a router expects it at first."""
  shape = exp.latent_shape
  models = {name: own.model for name, own in of_methods(exp).items()}
  if kind == "training":
    costs = {name: model_cost(model, shape, training=True) for name, model in models.items()}
    return {name: training_flops(cost) for name, cost in costs.items()}
  guided = exp.sample.guided()
  return {
    name: sampling_cost(model, shape, model.phases(len(guided)), guided).total
    for name, model in models.items()
  }


def over_dense(place: str, name: str, times: dict[str, Timing], flops: dict[str, float]) -> dict:
  """Returns the row of a method: its seconds, and both ratios to dense attention."""
  dense = times["dense"]
  own = times[name]
  return {
    "name": f"{place}/{name}",
    **own.row(),
    "seconds_over_dense": own.median / dense.median,
    "flops_over_dense": flops[name] / flops["dense"],
  }


def main(_):
  """Measures, prints a table and writes the rows."""
  quick = _QUICK.value
  rows = []
  for side in _QUICK_SIDES if quick else SIDES:
    exp = of_side(side, quick)
    rows += beside_others(functools.partial(measure, exp, exp.sample, 1 if quick else _TURNS))
  lines = [("", "seconds", "over dense", "FLOPs over dense")]
  for row in rows:
    cells = (f"{row[key]:.3f}" for key in ("median_s", "seconds_over_dense", "flops_over_dense"))
    lines.append((row["name"], *cells))
  print(aligned(lines))
  if not quick:
    write_rows(NAME, rows, "python -m benchmarks.cpu.steps")


if __name__ == "__main__":
  _QUICK = flags.DEFINE_bool("quick", False, "A tiny model; writes no rows.")
  cli.run(main)
