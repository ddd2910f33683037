"""Programs of runs that differ in numbers alone are one, so that trials of a sweep share it."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from freqformer.config import numbers, with_numbers
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.train.experiment import experiment
from freqformer.train.step import (
  TrainConfig,
  init_state,
  learning_rate,
  make_optimizer,
  make_train_step,
)
from freqformer.train.validation import make_eval_step
from tests.tiny_config import get_config

# Other values than those of `lowered`; 0 where that turns something off.
TRAIN = {
  "steps": 1000,
  "lr": 0.5,
  "muon_lr": 0.5,
  "warmup": 0,
  "weight_decay": 0.0,
  "beta2": 0.5,
  "clip": 3.0,
  "ema": 0.5,
  "label_dropout": 0.0,
  "first_frame": 0.2,
  "time_range": (0.1, 0.9),
  "distill": 2.0,
}
ROUTER = {
  "temperature": (2.0, 0.1),
  "budget": 0.9,
  "penalty": 0.0,
  "prior_slope": 3.0,
  "noise": 0.1,
}
METHODS = ("octaves", "sparseflow")  # a base of its own, and one that is FreqFormer's, too


def lowered(changes: dict) -> list[str]:
  """Training and evaluation, as XLA gets them, of a model with routed methods."""
  config = get_config()
  config.data.codec = dict(name="dct", factor=(1, 8, 8), channels=3)
  config.data.frames = 2
  config.model.update(precondition=False, first_frame=True, remat=False)
  config.model.attention.layers = ((0, 1, METHODS[0]), (1, None, METHODS[1]))
  config.model.attention.implementation = "reference"
  config.model.attention.octaves = dict(levels=2, router=dict(penalty=0.1))
  config.model.attention.sparseflow = dict(router=dict(prior=(0.6, 0.4)))
  config.train.first_frame = 0.5
  config.train.distill = 0.5
  config.sample.guidance = 1.0
  values = config.to_dict()
  for key, value in changes.items():
    *groups, last = key.split(".")
    place = values
    for group in groups:
      place = place.setdefault(group, {})
    place[last] = value
  exp = experiment(values)
  shape = exp.latent_shape
  graphdef, params = nnx.split(
    nnx.eval_shape(lambda: VideoDiT(exp.model, shape, 3, nnx.Rngs(exp.seed)))
  )
  state = jax.eval_shape(lambda params: init_state(params, exp.train, exp.seed), params)
  tables = make_tables(exp.model, shape, with_dense=True)
  batch = {"latent": jnp.zeros((2, *shape)), "label": jnp.zeros(2, int)}
  step = make_train_step(graphdef, exp.train)
  judge = make_eval_step(graphdef, time_range=exp.train.time_range)
  weighed = batch | {"weight": jnp.ones(2)}
  programs = (
    step.lower(state, batch, tables, numbers(exp.train)),
    judge.func.lower(*judge.args, params, weighed, jnp.ones(shape[-1]), tables, 0),
  )
  return [program.as_text() for program in programs]


def test_numbers_are_no_part_of_a_program():
  # At 0, 1, empty and 1 the program leaves out no level.
  names = ("threshold", "threshold_from", "until", "until_share")
  threshold, late, until, share = (f"model.attention.octaves.{name}" for name in names)
  given = {threshold: 0.05, late: 0.5, until: (0.7, 1.0), share: 0.5}
  changes = {"seed": 5, threshold: 0.2, late: 0.7, until: (0.4, 1.0), share: 0.3}
  changes |= {f"train.{name}": value for name, value in TRAIN.items()}
  for method, (name, value) in itertools.product(METHODS, ROUTER.items()):
    changes[f"model.attention.{method}.router.{name}"] = value
  for before, now in zip(lowered(given), lowered(changes), strict=True):
    assert before == now
  assert TRAIN.keys() == set(TrainConfig.NUMBERS)


def test_optimizers_and_schedules_are_programs_of_their_own():
  """Each of them is one program at any numbers."""
  params = {"runs": {"kernel": jnp.ones((1, 2, 2))}, "bias": jnp.ones(2)}
  texts = []
  for optimizer, schedule in itertools.product(
    ("adamw", "muon"), ("constant", "cosine", "trapezoid")
  ):
    texts.append(set())
    for given in ({"steps": 7}, TRAIN):
      config = TrainConfig(batch_size=2, optimizer=optimizer, schedule=schedule, **given)

      @jax.jit
      def update(params, state, numbers, config=config):
        return make_optimizer(with_numbers(config, numbers)).update(params, state, params)

      state = make_optimizer(config).init(params)
      texts[-1].add(update.lower(params, state, numbers(config)).as_text())
  assert [len(own) for own in texts] == [1] * 6
  assert len(set.union(*texts)) == 6


def optax_schedule(config: TrainConfig) -> optax.Schedule:
  """The schedule as Optax has it, for numbers that are known to tracing."""
  peak = config.lr
  warmup = min(config.warmup, max(1, config.steps // 2))
  start = peak / max(1, warmup)  # Optax's ramp of no steps stays where it starts
  rise = optax.warmup_constant_schedule(start, peak, warmup)
  end = max(config.steps, warmup + 1)
  if config.schedule == "constant":
    return rise
  if config.schedule == "trapezoid":
    fall = max(1, config.steps // 5)
    return optax.join_schedules([rise, optax.linear_schedule(peak, 0, fall)], [end - fall])
  return optax.warmup_cosine_decay_schedule(start, peak, warmup, end, peak / 10)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "trapezoid"])
def test_schedules_are_those_of_optax(schedule):
  """At every step and a few behind the end."""

  @jax.jit
  def rates(numbers, steps):
    config = TrainConfig(steps=1, batch_size=1, schedule=schedule)
    return learning_rate(with_numbers(config, numbers))(steps)

  at = jnp.arange(60)
  for steps, warmup in itertools.product((1, 2, 3, 9, 10, 57), (0, 1, 4, 7, 100)):
    config = TrainConfig(steps=steps, warmup=warmup, batch_size=1, schedule=schedule, lr=3e-3)
    want = jax.vmap(optax_schedule(config))(at)
    assert rates(numbers(config), at) == pytest.approx(want, rel=1e-6, abs=1e-9), (steps, warmup)
