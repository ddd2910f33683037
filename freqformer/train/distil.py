"""Cheap learning on a dense model: a method's own leaves, from the model's own trajectories.

Nothing but prompts is needed. The dense model samples for them as it always does, and at every
evaluation each layer compares what the method would have given with its dense attention
(`methods/distilled.py`); one optimizer step follows, on routers, gates and level weights alone.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from tqdm import tqdm

from freqformer.config import ConfigError, require
from freqformer.diffusion import sampling
from freqformer.diffusion.sampling import SampleConfig
from freqformer.methods.distilled import Distilled
from freqformer.model.config import ModelConfig
from freqformer.model.leaves import leaf_name

_LAST_RATE = 0.1  # choice: share of the rate at the end, to which it falls like a cosine
_BETA2 = 0.99  # as of `TrainConfig`
_SKIPPED = 10  # choice: most steps in a row that are not finite and change nothing


@dataclasses.dataclass(frozen=True)
class DistilConfig:
  """Settings of the learning.

  Attributes:
    passes: how often each prompt is sampled, each time from other noise.
    lr: learning rate of AdamW at the start.
    weight_decay: of AdamW, on matrices only.
    keep: number of newest checkpoints that stay.
  """

  passes: int = 1
  lr: float = 0.01
  weight_decay: float = 0.0
  keep: int = 2

  def __post_init__(self):
    require(self, "passes keep", least=1)
    require(self, "lr", above=0)
    require(self, "weight_decay", least=0)


@dataclasses.dataclass(frozen=True)
class Distillation:
  """Leaves that were learned, and how near they came.

  Attributes:
    leaves: arrays by name (`model.leaves.flatten`), stacked over the layers of a run.
    errors: float32 `[prompts * passes, layers]`, each layer's mean error over a trajectory while it
      learned: the square of the difference from dense attention's output over the square of that.
    steps: number of optimizer steps.
  """

  leaves: dict[str, np.ndarray]
  errors: np.ndarray
  steps: int


class Stopped(Exception):
  """Learning was asked to stop, within a trajectory."""


class Keeper:
  """Keeps a run's state behind each of its trajectories; this one keeps nothing."""

  def restore(self, template) -> tuple[Any, list] | None:
    """Returns the newest state, in the form of `template`, and the errors so far; None: none."""

  def save(self, step: int, state, errors: list[np.ndarray]):
    """Keeps the state behind an optimizer step, and each trajectory's errors `[layers]`."""

  def should_stop(self) -> bool:
    """Tells whether the run has been asked to stop."""
    return False


def beside_dense(config: ModelConfig) -> ModelConfig:
  """Returns the config of the dense model that has the config's methods beside it in its layers.

  The names of leaves stay. Layers are not rematerialised: they keep nothing that is large.
  """
  attention = config.attention
  names = {name for _, name in attention.runs(config.depth)}
  methods = tuple((name, Distilled(attention.named(name))) for name in sorted(names))
  attention = dataclasses.replace(attention, methods=methods)
  return dataclasses.replace(config, attention=attention, remat=False)


def distil(
  model,
  params,
  labels,
  latent_shape,
  sample: SampleConfig,
  config: DistilConfig,
  seed: int = 0,
  null=None,
  progress: bool = True,
  keeper: Keeper | None = None,
) -> Distillation:
  """Learns a method's own leaves.

  A guided evaluation runs both halves, as when the method samples: they share a router's choice,
  which so learns to serve both.

  Args:
    model: of a config of `beside_dense`; also abstract.
    params: its parameters, which stay as they are.
    labels: of the prompts, as of `sampling.sample`.
    latent_shape: (t, y, x, c).
    sample: the trajectories' settings.
    config: of the learning.
    seed: of the noise, and of a router's draws.
    null: what stands in guidance for no condition; None: `model.null`.
    progress: show a progress bar.
    keeper: keeps what was learned behind each trajectory, and goes on from there; None: nobody.

  Raises:
    ConfigError: the method has no parameters, its schedule does not fit the run, or the leaves
      became numbers that are not finite.
    Stopped: the keeper was asked to stop.
  """
  check_learns(model.config, latent_shape)
  own = own_leaves(params)
  evaluations = len(sample.guided())
  count = sampling.count_rows(labels)
  starts = range(0, count, sample.batch_size)
  total = len(starts) * config.passes * evaluations
  tables = model.tables(latent_shape)
  trajectories = list(itertools.product(range(config.passes), starts))
  keeper = keeper or Keeper()
  with tqdm(total=total, desc="learning", unit="step", disable=not progress) as bar:
    learner = _Learner(model, own, sample, config, seed, evaluations, bar, keeper.should_stop)
    learner.go_on(keeper)
    for number, start in trajectories[len(learner.errors) :]:
      part = np.arange(start, min(start + sample.batch_size, count))
      indices = part + number * count
      prompts = sampling.rows(labels, part)
      args = (learner, params, model, prompts, indices, seed, tables, latent_shape, sample)
      sampling.sample(*args, progress=False, null=null)
      learner.keep(keeper)
  leaves = {name: np.asarray(x) for name, x in learner.own.items()}
  return Distillation(leaves, np.stack(learner.errors), learner.number)


def check_learns(config: ModelConfig, latent_shape):
  """Raises ConfigError if a config's method has no parameters, or cannot train on the latents."""
  layout = config.layout(latent_shape)
  sizes = (layout, config.heads, config.dims.head_dim)
  if not any(method.has_parameters(*sizes) for _, method in config.runs()):
    name = config.attention.method
    raise ConfigError(f"{name} has no parameters of its own to learn; it runs as it is.")
  config.check_training(latent_shape)


def own_leaves(params) -> dict[str, jax.Array]:
  """Returns the parameters of the model's attention methods by name: those that can learn."""
  found = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    name = leaf_name(path)
    if "/attention/method/" in name:
      found[name] = leaf
  return found


class _Learner:
  """Takes the place of the sampler's step: it samples on, and learns from each evaluation.

  Attributes:
    own: the leaves that learn, by name.
    number: optimizer steps so far.
    errors: of each finished trajectory, float32 `[layers]`.
  """

  def __init__(
    self,
    model,
    own: dict[str, jax.Array],
    sample: SampleConfig,
    config: DistilConfig,
    seed: int,
    evaluations: int,
    bar: tqdm,
    should_stop: Callable[[], bool],
  ):
    self._evaluations = evaluations
    self._bar = bar
    self._should_stop = should_stop
    self._lr = config.lr
    rate = optax.cosine_decay_schedule(config.lr, bar.total, _LAST_RATE)
    matrices = {name: name.endswith("kernel") for name in own}
    optimizer = optax.adamw(rate, b2=_BETA2, weight_decay=config.weight_decay, mask=matrices)
    optimizer = optax.apply_if_finite(optimizer, _SKIPPED)
    self._step = make_learning_step(nnx.graphdef(model), sample, optimizer)
    self._key = jax.random.key(seed)
    self._recent: list[jax.Array] = []  # errors of the trajectory's evaluations
    self.own = {name: jnp.array(x, copy=True) for name, x in own.items()}  # they are donated
    self._optimizer_state = optimizer.init(self.own)
    self.number = 0
    self.errors: list[np.ndarray] = []

  def __call__(self, params, *args):
    """Evaluates the dense model and takes a step; arguments and results as of `make_step`."""
    if self._should_stop():
      raise Stopped
    progress = np.float32(self.number / self._bar.total)
    moment = {"progress": progress, "rng": jax.random.fold_in(self._key, self.number)}
    learning = (self.own, self._optimizer_state)
    (self.own, self._optimizer_state), points, state, aux = self._step(
      learning, moment, params, *args
    )
    self.number += 1
    self._bar.update()
    self._recent.append(jnp.concatenate([run["error"].mean((1, 2)) for run in aux]))
    if len(self._recent) == self._evaluations:
      self.errors.append(np.mean(jax.device_get(self._recent), 0))
      self._recent = []
      layers = " ".join(f"{x:.3f}" for x in self.errors[-1])
      logging.info("error by layer after %d steps: %s", self.number, layers)
    return points, state, aux

  def go_on(self, keeper: Keeper):
    """Takes up what a keeper has."""
    found = keeper.restore((self.own, self._optimizer_state))
    if found is not None:
      (self.own, self._optimizer_state), self.errors = found
      self.number = len(self.errors) * self._evaluations
      self._bar.update(self.number)

  def keep(self, keeper: Keeper):
    """Hands a keeper the state behind a trajectory; refuses numbers that are not finite."""
    if not all(np.isfinite(x).all() for x in self.own.values()):
      raise ConfigError(f"learned numbers are not finite; lower the learning rate, {self._lr:g}.")
    keeper.save(self.number, (self.own, self._optimizer_state), self.errors)


def make_learning_step(graphdef, sample: SampleConfig, optimizer: optax.GradientTransformation):
  """Returns one evaluation of the dense model and an optimizer step on a method's own leaves.

  It is `(learning, moment, params, points, label, t, weights, tables, state, phases, guided) ->
  (learning, points, state, aux)`, jitted: `learning` is the leaves by name and the optimizer's
  state, `moment` has `progress` and `rng` of `Cond`, and the rest is as of `sampling.make_step`.
  It donates `learning` and the methods' state.
  """
  gradient = jax.grad(make_loss(graphdef, sample), has_aux=True)

  @functools.partial(jax.jit, static_argnums=(9, 10), donate_argnums=(0, 8))
  def step(
    learning, moment, params, points, label, t, weights, tables, state, phases=(), guided=False
  ):
    own, optimizer_state = learning
    gradients, (points, state, aux) = gradient(
      own, moment, params, points, label, t, weights, tables, state, phases, guided
    )
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, own)
    return (optax.apply_updates(own, updates), optimizer_state), points, state, aux

  return step


def make_loss(graphdef, sample: SampleConfig):
  """Returns the loss of one evaluation of the dense model, not jitted.

  It is `(own, moment, params, points, ...) -> (loss, (points, state, aux))`, arguments as of the
  step of `make_learning_step`. The loss is the sum over layers, so that a layer's gradient does not
  depend on how many there are.
  """
  evaluate = sampling.make_evaluation(sample)

  def loss(own: dict[str, jax.Array], moment: dict[str, Any], params, *args):
    params = jax.tree_util.tree_map_with_path(lambda path, x: own.get(leaf_name(path), x), params)
    model = nnx.merge(graphdef, params)
    points, state, aux = evaluate(model, *args, train=True, **moment)
    return sum(run["loss"].sum() for run in aux), (points, state, aux)

  return loss
