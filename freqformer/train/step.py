"""One training step, one validation pass and the state they carry: pure functions that `train.py` strings together."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx

from freqformer.config import ConfigError, require, require_one_of
from freqformer.diffusion.flow import (
  BUCKETS,
  TIME_SAMPLING,
  interpolate,
  linear_velocity,
  sample_noise,
  sample_time,
)

SCHEDULES = ("constant", "cosine")
# A batch that breaks one step is skipped; so many steps in a row are a run that cannot go on. The number is ours.
SKIPS_IN_A_ROW = 10


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Optimisation, logging and saving.

  Attributes:
    steps, batch_size: optimisation steps and samples per step.
    lr, warmup, schedule: peak learning rate, linear warm-up steps (see `warm_steps`), then "constant" or "cosine" to a tenth.
    weight_decay, beta2, clip: AdamW (on matrices only) and global gradient-norm clipping.
    ema: decay of the averaged weights, ramped up as (1 + step) / (10 + step).
    label_dropout: share of samples trained on the null class.
    time_sampling: "uniform" or "logit_normal".
    log_every, val_every, checkpoint_every, keep: in steps; 0 turns validation off; `keep` newest checkpoints stay.
    val_batches: batches per validation, 0 takes all; val_soft: also report the loss of the soft mixture (the soft-hard gap).
  """

  steps: int
  batch_size: int
  lr: float = 1e-3
  warmup: int = 100
  schedule: str = "cosine"
  weight_decay: float = 0.01
  beta2: float = 0.99
  clip: float = 1.0
  ema: float = 0.999
  label_dropout: float = 0.1
  time_sampling: str = "uniform"
  log_every: int = 10
  val_every: int = 200
  val_batches: int = 4
  val_soft: bool = True
  checkpoint_every: int = 500
  keep: int = 2

  def __post_init__(self):
    require(self, "steps batch_size log_every checkpoint_every keep", least=1)
    require(self, "warmup val_every val_batches weight_decay", least=0)
    require(self, "lr clip", above=0)
    require(self, "beta2 ema", least=0, below=1)
    require(self, "label_dropout", least=0, most=1)
    require_one_of(self, "schedule", SCHEDULES)
    require_one_of(self, "time_sampling", TIME_SAMPLING)

  @property
  def warm_steps(self) -> int:
    """Steps of warm-up that run: `warmup`, of a short run at most half (ours), so that it reaches its peak rate."""
    return min(self.warmup, max(1, self.steps // 2))

  @property
  def skip_limit(self) -> int:
    """Skipped steps in a row that end the run, `SKIPS_IN_A_ROW`; of a short run half of its steps."""
    return min(SKIPS_IN_A_ROW, -(-self.steps // 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes. The random key never changes: each step folds its number in, so resuming needs no more."""

  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any
  key: jax.Array


def learning_rate(config: TrainConfig) -> optax.Schedule:
  """Linear warm-up, then the schedule."""
  warmup, start = (
    config.warm_steps,
    0.0 if config.warm_steps else config.lr,
  )  # a ramp of no steps stays where it starts
  if config.schedule == "constant":
    return optax.warmup_constant_schedule(start, config.lr, warmup)
  return optax.warmup_cosine_decay_schedule(
    start, config.lr, warmup, max(config.steps, warmup + 1), config.lr / 10
  )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """AdamW with clipping; biases, norms, gains and embeddings per head are not decayed."""
  decay = functools.partial(
    jax.tree_util.tree_map_with_path, lambda path, x: "kernel" in jax.tree_util.keystr(path)
  )
  return optax.chain(
    optax.clip_by_global_norm(config.clip),
    optax.adamw(
      learning_rate(config), b2=config.beta2, weight_decay=config.weight_decay, mask=decay
    ),
  )


def init_state(params, config: TrainConfig, seed: int) -> TrainState:
  """The state before the first step; parameters, averages and moments are float32."""
  return TrainState(
    jnp.int32(0),
    params,
    jax.tree.map(jnp.copy, params),
    make_optimizer(config).init(params),
    jax.random.key_data(jax.random.key(seed)),
  )


def make_train_step(graphdef, config: TrainConfig, classes: int):
  """The jitted step `(state, batch, tables) -> (state, metrics)`; batch: latent `[b, t, y, x, c]`, label `[b]`."""
  optimizer, schedule = make_optimizer(config), learning_rate(config)
  if config.warm_steps < config.warmup:
    logging.info(
      "train.warmup=%d is cut to %d, half of the %d steps",
      config.warmup,
      config.warm_steps,
      config.steps,
    )

  def loss_fn(params, key, batch, tables, progress):
    x0, label = batch["latent"], batch["label"]
    k_time, k_noise, k_drop, k_route = jax.random.split(key, 4)
    time = sample_time(k_time, x0.shape[0], config.time_sampling)
    noise = sample_noise(k_noise, jnp.arange(x0.shape[0]), x0.shape[1:])
    label = jnp.where(
      jax.random.bernoulli(k_drop, config.label_dropout, label.shape), classes, label
    )
    xt, target = interpolate(x0, noise, time)
    velocity, _, aux = nnx.merge(graphdef, params)(
      xt, time, label, tables, train=True, rng=k_route, progress=progress
    )
    loss = jnp.mean((velocity - target) ** 2)
    extra = sum(a["loss"].mean() for a in aux)
    return loss + extra, (loss, summarise(aux))

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: TrainState, batch, tables):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    progress = state.step / config.steps
    (_, (loss, routing)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, key, batch, tables, progress
    )
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    fine = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(config.ema, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, params)
    # A step that is not finite changes nothing but the step count, and with it the next step's noise.
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(fine, new, old))
    new = TrainState(
      state.step + 1,
      keep(params, state.params),
      keep(ema, state.ema),
      keep(opt_state, state.opt_state),
      state.key,
    )
    return new, {
      "loss": loss,
      "grad_norm": norm,
      "lr": schedule(state.step),
      "skipped": 1 - fine.astype(jnp.float32),
      **routing,
    }

  return step


class SkippedSteps:
  """Ends a run whose steps are all skipped. The values are read where the loop waits for the device anyway.

  Args:
    config: its `skip_limit` counts.
  """

  def __init__(self, config: TrainConfig):
    self.limit, self.row, self._values = config.skip_limit, 0, []

  def add(self, metrics: dict):
    """Notes a step's `skipped`, without waiting for it."""
    self._values.append(metrics["skipped"])

  def check(self, step: int):
    """Looks at all steps up to `step`; call it before every save, so that no checkpoint is made of a run that broke.

    Raises:
      ConfigError: if `limit` steps in a row were skipped.
    """
    first = step - len(self._values)
    for i, skipped in enumerate(jax.device_get(self._values), 1):
      self.row = self.row + 1 if skipped else 0
      if self.row >= self.limit:
        raise ConfigError(
          f"training stopped: steps {first + i + 1 - self.row} to {first + i} all had a loss, gradient or update that is not "
          "finite and were skipped; lower train.lr or train.clip, or look at the data. Earlier checkpoints are as they were."
        )
    self._values = []


def summarise(aux) -> dict:
  """Means over layers: density, cost and, where heads are routed, the router's entropy and expected density."""
  out = {name: _layer_mean(aux, name) for name in ("density", "cost")}
  if any("entropy" in a for a in aux):
    routed = [a for a in aux if "entropy" in a]
    out["router_entropy"] = _layer_mean(routed, "entropy")
    out["expected_density"] = _layer_mean(routed, "expected_density")
  return out


def _layer_mean(aux, name):
  layers = [jnp.asarray(a[name], jnp.float32) for a in aux]
  return sum(x.reshape(x.shape[0], -1).mean(-1).sum() for x in layers) / sum(
    x.shape[0] for x in layers
  )


def make_eval_step(graphdef, *, soft: bool = False):
  """The jitted pass `(params, batch, power, tables, key, offset) -> sums per bucket`, hard routing unless `soft`.

  Each sample is seen at one timestep in every quarter of t; timestep and noise depend on its number only, so every model
  and every moment of training is judged on the same draws.
  """

  @jax.jit
  def step(params, batch, power, tables, key, offset):
    x0, weight = batch["latent"], batch["weight"]
    index = offset + jnp.arange(x0.shape[0])
    u = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, 2 * i), (BUCKETS,)))(index)

    def bucket(i):
      time = (i + u[:, i]) / BUCKETS
      xt, target = interpolate(
        x0, sample_noise(key, (2 * index + 1) * BUCKETS + i, x0.shape[1:]), time
      )
      velocity, _, aux = nnx.merge(graphdef, params)(
        xt, time, batch["label"], tables, soft_evaluation=soft
      )

      def error(v):
        return (((v - target) ** 2).mean((1, 2, 3, 4)) * weight).sum()

      routed = [a for a in aux if "probs" in a]
      routing = {}
      if routed:

        def weigh(x):
          return jnp.einsum("lbhr,b->lhr", x, weight)

        routing["probs"] = jnp.concatenate([weigh(a["probs"]) for a in routed])

        def hot(a):
          return jax.nn.one_hot(a["choice"], a["probs"].shape[-1])

        routing["choice"] = jnp.concatenate([weigh(hot(a)) for a in routed])
      density = sum(
        jnp.einsum("lbh,b->", a["density"], weight) / a["density"].shape[2] for a in aux
      )
      depth = sum(a["density"].shape[0] for a in aux)
      return {
        "loss": error(velocity),
        "linear": error(linear_velocity(xt, time, power)),
        "density": density / depth,
        **routing,
      }

    return jax.lax.map(bucket, jnp.arange(BUCKETS)), weight.sum()

  return step


def evaluate(
  step, params, batches, power, tables, seed: int = 0, should_stop=lambda: False
) -> dict | None:
  """Validation losses overall and per quarter of t, against the best per-channel linear prediction, and the routing.

  Args:
    batches: an iterable of dicts latent, label, weight.
    power: mean square per channel `[c]` of the validation latents.
    should_stop: polled between batches; True gives up and returns None.
  """
  total, count, offset = None, 0.0, 0
  for batch in batches:
    if should_stop():
      return None
    sums, weight = step(params, batch, power, tables, jax.random.key(seed), offset)
    sums = jax.device_get(sums)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    count, offset = count + float(weight), offset + len(batch["label"])
  mean = jax.tree.map(lambda x: x / count, total)
  out = {
    "loss": float(mean["loss"].mean()),
    "buckets": mean["loss"].tolist(),
    "linear_buckets": mean["linear"].tolist(),
    "density": float(mean["density"].mean()),
  }
  if "probs" in mean:
    # [buckets, layers, heads, branches] -> layer first, as it is drawn
    out["probs"], out["choice"] = (mean[n].transpose(1, 0, 2, 3) for n in ("probs", "choice"))
  return out
