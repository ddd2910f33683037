"""One training step and the state that it carries, as pure functions."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from absl import logging
from flax import nnx

from freqformer.config import ConfigError, require, require_one_of, with_numbers
from freqformer.cost import DENSE
from freqformer.diffusion.flow import (
  TIME_SAMPLING,
  give_first_frame,
  interpolate,
  sample_noise,
  sample_time,
)
from freqformer.placement import sharing, split
from freqformer.train.trackers import JSONL, TRACKERS

# choice: training stops after this many consecutive steps that are not finite, or half of the run.
CONSECUTIVE_SKIPS = 10
_FIRST_FRAME = 4  # number of its key; 0 to 3 are those of time, noise, null class and routing


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Optimisation, logging and saving.

  Attributes:
    optimizer: "adamw", or "muon" (optax.contrib.muon), which gives the layers' matrices steps of
      equal size in all directions and all other parameters AdamW's with Nesterov momentum.
    lr: peak learning rate of AdamW.
    muon_lr: peak learning rate of Muon's matrices; it follows the same schedule.
    warmup: steps of linear warm-up from a `warmup`-th of the peak, so that no step is lost; see
      `warm_steps`.
    schedule: "constant", "cosine", which ends at a tenth of the peak, or "trapezoid": constant,
      then straight to 0 over the last fifth of the steps (a cooldown, arXiv 2405.18392).
    weight_decay: of AdamW, on matrices only.
    beta2: of AdamW.
    clip: largest global norm of a gradient.
    ema: decay of the averaged weights, ramped up as (1 + step) / (10 + step).
    label_dropout: share of samples that are trained without their label, on the null class.
    first_frame: share of samples that are trained with their first latent frame given
      (`model.first_frame`); the loss leaves this frame out.
    accumulate: micro-batches in which a batch is computed, one after the other, in less memory;
      their gradients are averaged in float32 for one update. The loss is that of the whole batch,
      except that stochastic routing is drawn, and the router's penalty taken, per micro-batch.
      Validation takes batches of this size, too.
    rollback: whether to go back, once, to the last checkpoint before too many consecutive steps
      were skipped, and on with other batches and noise. A second time the run ends, as it does
      at once without this key. True by default: it changes no run that would not end there.
    time_sampling: see `sample_time`.
    time_range: least and largest timestep that is trained on, and validated on.
    val_every: 0 turns validation off.
    val_batches: batches per validation; 0 takes all.
    val_soft: also validate the soft mixture of branches (the soft-hard gap).
    samples: classes of which a sample is drawn at every validation, for the run's report.
    trackers: where figures go: "jsonl" (metrics.jsonl, always), "tensorboard", "wandb"
      (`freqformer/train/trackers.py`).
    init_from: folder of a run, "folder:step", or a file "*.safetensors": the averaged weights that
      this run starts from (`freqformer/train/origin.py`); empty: random weights.
    distill: weight of the difference from dense attention with the same weights, where no gradient
      goes; 0: none.
    distill_at: "output": mean square difference of the velocity from that of a forward with dense
      attention in all layers; "layers": mean over layers of `freqformer.model.attention.distance`,
      that of each attention layer from dense attention on its own input.
    dense_steps: first steps in which all layers attend densely; the method takes part behind them.
    dense_fall: steps behind those in which ever fewer layers attend densely: the first two thirds
      of them in the first half of these steps, the first third in the second half, then none.
    freeze: "backbone" trains the parameters of attention methods alone (routers, gates, level
      weights); "": all.
    keep: number of newest checkpoints that stay on disk.
    keep_best: beside them the checkpoint of the least validation loss stays, of those at whose
      very step the run validated.
    save_in_background: whether training goes on while a checkpoint is written. It takes as much
      memory of the host as the state has (of a process: its part of it).
    NUMBERS: fields that are arguments of the compiled step.
  """

  NUMBERS: ClassVar[tuple[str, ...]] = (
    "steps",
    "lr",
    "muon_lr",
    "warmup",
    "weight_decay",
    "beta2",
    "clip",
    "ema",
    "label_dropout",
    "first_frame",
    "time_range",
    "distill",
  )

  steps: int
  batch_size: int
  optimizer: str = "adamw"
  lr: float = 1e-3
  muon_lr: float = 0.02
  warmup: int = 100
  schedule: str = "cosine"
  weight_decay: float = 0.01
  beta2: float = 0.99
  clip: float = 1.0
  ema: float = 0.999
  label_dropout: float = 0.1
  first_frame: float = 0.0
  accumulate: int = 1
  rollback: bool = True
  time_sampling: str = "uniform"
  time_range: tuple[float, float] = (0.0, 1.0)
  log_every: int = 10
  val_every: int = 200
  val_batches: int = 4
  val_soft: bool = True
  samples: int = 4
  trackers: tuple[str, ...] = (JSONL,)
  init_from: str = ""
  distill: float = 0.0
  distill_at: str = "output"
  dense_steps: int = 0
  dense_fall: int = 0
  freeze: str = ""
  checkpoint_every: int = 500
  keep: int = 2
  keep_best: bool = True
  save_in_background: bool = True

  def __post_init__(self):
    require(self, "steps batch_size accumulate log_every checkpoint_every keep", least=1)
    require(self, "dense_steps dense_fall", least=0)
    require(self, "warmup val_every val_batches samples weight_decay", least=0)
    require(self, "lr muon_lr clip", above=0)
    require_one_of(self, "optimizer", ("adamw", "muon"))
    require(self, "beta2 ema", least=0, below=1)
    require(self, "label_dropout first_frame", least=0, most=1)
    require_one_of(self, "schedule", ("constant", "cosine", "trapezoid"))
    require_one_of(self, "time_sampling", TIME_SAMPLING)
    if JSONL not in self.trackers or not {JSONL, *TRACKERS}.issuperset(self.trackers):
      raise ValueError(
        f"trackers={self.trackers} must be {JSONL!r}, which resuming and the report read, and any "
        f"of {', '.join(TRACKERS)}."
      )
    require(self, "distill", least=0)
    require_one_of(self, "distill_at", ("output", "layers"))
    require_one_of(self, "freeze", ("", "backbone"))
    if self.freeze and not self.init_from:
      raise ValueError(
        f"freeze={self.freeze!r} needs trained weights, not random ones; set init_from to the run "
        "that has them."
      )
    if self.freeze and self.dense_steps + self.dense_fall:
      raise ValueError(
        f"freeze={self.freeze!r} trains the attention method alone, which takes no part in layers "
        "that attend densely; set dense_steps=0 and dense_fall=0."
      )
    if not 0 <= self.time_range[0] < self.time_range[1] <= 1:
      raise ValueError(f"{self.time_range=} must be two rising timesteps in [0, 1].")
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}, the "
        "number of its micro-batches."
      )

  @property
  def teacher(self) -> str:
    """`distill_at` where the run distils, "" where it does not."""
    return self.distill_at if self.distill > 0 else ""

  @property
  def attends_densely(self) -> bool:
    """True if any training step has dense attention, a teacher's or the layers' own."""
    return bool(self.teacher or self.dense_steps or self.dense_fall)

  def stages(self, depth: int) -> list[tuple[int, int]]:
    """Returns `(steps, dense layers)` of the stretches of a run, in order.

    In a stretch the same number of the first layers attends densely, which is a program of its own:
    four of them at most. Earlier layers stay dense longer.
    """
    ends = np.cumsum([self.dense_steps, self.dense_fall // 2, -(-self.dense_fall // 2)])
    edges = np.minimum([0, *ends, self.steps], self.steps)
    found = zip(np.diff(edges).tolist(), (depth, 2 * depth // 3, depth // 3, 0), strict=True)
    return [(steps, layers) for steps, layers in found if steps]

  def dense_layers(self, step: int, depth: int) -> int:
    """Returns how many of the first layers attend densely in the step behind `step` steps."""
    stages = self.stages(depth)
    ends = np.cumsum([steps for steps, _ in stages])
    return next((layers for end, (_, layers) in zip(ends, stages, strict=True) if step < end), 0)

  @property
  def counted(self) -> dict[str, Any]:
    """The arguments of `freqformer.cost.step_cost` that these settings decide."""
    return {"frozen": bool(self.freeze), "teacher": self.teacher}

  @property
  def warm_steps(self) -> jax.Array:
    """Warm-up steps that run: at most half of the run, so that it reaches its peak rate."""
    return jnp.minimum(self.warmup, jnp.maximum(1, self.steps // 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that training carries from step to step.

  Attributes:
    step: int32, steps done.
    params: the model's parameters, float32.
    ema: their exponential moving average.
    opt_state: the optimizer's moments and counters.
    key: data of the random key. It never changes: each step folds its number in, so a resumed run
      draws what the uninterrupted one would have drawn.
  """

  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any
  key: jax.Array


def learning_rate(config: TrainConfig, peak=None) -> optax.Schedule:
  """Returns linear warm-up followed by the configured schedule; `peak` replaces `config.lr`.

  Optax's schedules branch on their numbers of steps, which are arguments of the step here.
  """
  peak = config.lr if peak is None else peak
  warmup = config.warm_steps
  end = jnp.maximum(config.steps, warmup + 1)

  def schedule(step):
    ramp = jnp.maximum(1, warmup)
    rate = peak * (1 + (ramp - 1) * jnp.clip(step / ramp, 0, 1)) / ramp
    if config.schedule == "trapezoid":
      fall = jnp.maximum(1, config.steps // 5)  # choice
      rate *= jnp.clip((end - step) / fall, 0, 1)
    if config.schedule == "cosine":
      done = jnp.clip((step - warmup) / (end - warmup), 0, 1)
      rate *= 0.1 + 0.45 * (1 + jnp.cos(jnp.pi * done))
    return rate

  return schedule


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """Returns the optimizer with clipping.

  Matrices alone are decayed: no bias, norm, gain or embedding per head.
  """
  if config.optimizer == "muon":
    update = optax.contrib.muon(
      learning_rate(config, config.muon_lr),
      weight_decay=config.weight_decay,
      adam_b2=config.beta2,
      adam_learning_rate=learning_rate(config),
      muon_weight_dimension_numbers=_layers_matrices,
    )
  else:
    update = optax.adamw(
      learning_rate(config), b2=config.beta2, weight_decay=config.weight_decay, mask=_decayed
    )
  update = optax.chain(optax.clip_by_global_norm(config.clip), update)
  if not config.freeze:
    return update
  # No moments are kept of what does not move.
  return optax.partition({"trained": update, "frozen": optax.set_to_zero()}, _labels)


def _labels(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "trained" if _is_of_method(path) else "frozen", params
  )


def _is_of_method(path) -> bool:
  return "method" in jax.tree_util.keystr(path)


def _chosen(where, first, second) -> jax.Array:
  """Returns the rows of `first` where `[b]` says so, and those of `second` elsewhere."""
  return jnp.where(where.reshape(-1, *[1] * (second.ndim - 1)), first, second)


def _only_trained(config: TrainConfig, trained, frozen):
  """Returns `trained` where `config.freeze` lets parameters move, `frozen` elsewhere."""
  if not config.freeze:
    return trained
  return jax.tree_util.tree_map_with_path(
    lambda path, x, kept: x if _is_of_method(path) else kept, trained, frozen
  )


def _decayed(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "kernel" in jax.tree_util.keystr(path), params
  )


def _layers_matrices(params):
  """Returns the axes of what Muon updates, `[layers, in, out]`, and None for other parameters.

  A method's own matrices, such as a router's, are small and stay with AdamW.
  """

  def axes(path, x):
    name = jax.tree_util.keystr(path)
    if x.ndim == 3 and "runs" in name and "kernel" in name and "method" not in name:
      return optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    return None

  return jax.tree_util.tree_map_with_path(axes, params)


def init_state(params, config: TrainConfig, seed: int) -> TrainState:
  """Returns the state before the first step."""
  return TrainState(
    step=jnp.int32(0),
    params=params,
    ema=jax.tree.map(jnp.copy, params),
    opt_state=make_optimizer(config).init(params),
    key=jax.random.key_data(jax.random.key(seed)),
  )


def make_gradients(graphdef, config: TrainConfig, dense: int = 0, **moment):
  """Returns `(params, key, batch, tables, config, posterior, progress) -> (metrics, gradients)`.

  Metrics are the loss, without penalties, and what `_summary` finds.

  Args:
    dense: number of the first layers that attend densely.
    moment: further fields of `Cond`.
  """
  gives_first_frames = config.first_frame > 0
  teacher = config.teacher

  def draw(params, key, batch, config, posterior):
    """Returns the arrays to train on, samples in front, and the key of stochastic routing."""
    x0 = batch["latent"]
    key_time, key_noise, key_drop, key_route = jax.random.split(key, 4)
    time = sample_time(key_time, x0.shape[0], config.time_sampling)
    first, last = config.time_range
    time = first + (last - first) * time
    noise = sample_noise(key_noise, jnp.arange(x0.shape[0]), x0.shape[1:])
    xt, target = interpolate(x0, noise, time)
    dropped = jax.random.bernoulli(key_drop, config.label_dropout, time.shape)
    null = nnx.merge(graphdef, params).null(len(time))
    label = jax.tree.map(functools.partial(_chosen, dropped), null, batch["label"])
    if posterior is not None:
      target = posterior.velocity(xt, time, label)
    given = None
    if gives_first_frames:
      # A key of its own: the other draws are those of a run without first frames.
      key_given = jax.random.fold_in(key, _FIRST_FRAME)
      given = jax.random.bernoulli(key_given, config.first_frame, time.shape)
      xt = give_first_frame(xt, x0, given)
    drawn = {"xt": xt, "target": target, "time": time, "label": label, "given": given}
    return drawn, key_route

  def loss_fn(params, drawn, key_route, tables, config, progress, cells):
    given = drawn["given"]
    # Gradients of frozen parameters are not computed, and count in no norm.
    params = _only_trained(config, params, jax.lax.stop_gradient(params))
    model = nnx.merge(graphdef, params)
    phases = ()
    if dense:
      model.config = model.config.with_dense_layers(dense)
      phases = [DENSE if part.dense else "" for part in model.config.parts()]
    noisy = (drawn["xt"], drawn["time"], drawn["label"], tables)
    own = {**moment, "teacher": tables["dense"]} if teacher == "layers" else moment
    velocity, _, aux = model(
      *noisy, train=True, rng=key_route, phases=phases, progress=progress, given=given, **own
    )
    loss = _mean_square(velocity - drawn["target"], given, cells)
    penalty = sum(run["loss"].mean() for run in aux)
    told = _summary(aux)
    if teacher == "output" and dense == model.config.depth:
      told["distill_loss"] = jnp.float32(0)  # it is the teacher itself
    elif teacher == "output":
      everywhere = [DENSE] * len(model.config.parts())
      wanted, *_ = model(*noisy, phases=everywhere, given=given)
      told["distill_loss"] = _mean_square(velocity - jax.lax.stop_gradient(wanted), given, cells)
    elif teacher == "layers":
      told["distill_loss"] = jnp.concatenate([run["distance"] for run in aux]).mean()
    if teacher:
      penalty += config.distill * told["distill_loss"]
    return loss + penalty, (loss, told)

  compute = jax.value_and_grad(loss_fn, has_aux=True)

  def gradients(params, key, batch, tables, config, posterior, progress):
    drawn, key_route = draw(params, key, batch, config, posterior)
    count = config.accumulate
    cells = None
    if gives_first_frames:
      cells = jnp.sum(_counted(drawn["xt"], drawn["given"])) / count
    if count == 1:
      (_, metrics), grads = compute(params, drawn, key_route, tables, config, progress, cells)
      return metrics, grads

    def micro(total, part):
      number, own = part
      key = jax.random.fold_in(key_route, number)
      own = jax.tree.map(split, own)
      (_, metrics), grads = compute(params, own, key, tables, config, progress, cells)
      total = jax.tree.map(lambda x, grad: x + grad.astype(jnp.float32), total, grads)
      return sharing(total), metrics

    # Every count-th sample: each device computes micro-batches of the samples that it has.
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), drawn)
    zeros = sharing(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params))
    total, metrics = jax.lax.scan(micro, zeros, (jnp.arange(count), parts))
    metrics = jax.tree.map(lambda x: x.mean(0), metrics)
    return metrics, jax.tree.map(lambda x: x / count, total)

  return gradients


def make_train_step(graphdef, config: TrainConfig, dense: int = 0):
  """Returns the jitted step `(state, batch, tables, numbers, posterior) -> (state, metrics)`.

  It donates the state. A batch is `{"latent": [b, t, y, x, c], "label": ...}`, where the label is
  `[b]`, `[b, ...]` or any pytree of such arrays, as the model takes it. `numbers` are those of the
  config (`freqformer.config.numbers`): runs that differ in them alone compile one program, and
  another one for each number of the first layers, `dense`, that attend densely. The model regresses
  on the velocity of the draw or, given a `Posterior`, on the velocity's exact mean, of which the
  metric `loss` is then the regret.
  """
  if config.warm_steps < config.warmup:
    logging.info(
      "train.warmup=%d is cut to %d, half of the steps", config.warmup, config.warm_steps
    )
  gradients = make_gradients(graphdef, config, dense)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: TrainState, batch, tables, numbers, posterior=None):
    own = with_numbers(config, numbers)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    progress = state.step / own.steps
    (loss, routing), grads = gradients(state.params, key, batch, tables, own, posterior, progress)
    norm = optax.tree.norm(grads)
    updates, opt_state = make_optimizer(own).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(own.ema, (1 + state.step) / (10 + state.step))
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    ema = _only_trained(own, ema, state.ema)  # an average of equal numbers may round
    # A step that is not finite changes nothing but the step count, and with it the next step's
    # noise. optax.apply_if_finite looks at gradients alone and would not hold the average back.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    done = sharing(TrainState(state.step + 1, params, ema, opt_state, state.key))
    skipped = dataclasses.replace(state, step=state.step + 1)
    metrics = {
      "loss": loss,
      "grad_norm": norm,
      "lr": learning_rate(own)(state.step),
      "skipped": 1 - finite.astype(jnp.float32),
      **routing,
    }
    return jax.tree.map(functools.partial(jnp.where, finite), done, skipped), metrics

  return step


def _mean_square(error, given, cells):
  """Returns the mean square over all cells `[b, t, y, x, c]` but first frames that are given.

  Args:
    cells: frames to divide by, where some are given; of a micro-batch the mean over all of them.
  """
  if given is None:
    return jnp.mean(error**2)
  return jnp.sum(_counted(error, given) * jnp.mean(error**2, (2, 3, 4))) / cells


def _counted(x, given) -> jax.Array:
  """Returns `[b, t]` with 0 at first frames that are given and 1 elsewhere."""
  return jnp.ones(x.shape[:2]).at[:, 0].set(~given)


class NotFinite(ConfigError):
  """Too many consecutive steps were skipped, `first` to `last`."""

  def __init__(self, first: int, last: int):
    super().__init__(
      f"steps {first} to {last} all had a loss, gradient or update that is not finite and were "
      "skipped; lower train.lr or train.clip, or look at the data. Earlier checkpoints are as they "
      "were."
    )
    self.first = first


class SkippedSteps:
  """Ends a run that only skips; it is checked where the loop waits for the device anyway."""

  def __init__(self, config: TrainConfig):
    self._limit = min(CONSECUTIVE_SKIPS, -(-config.steps // 2))
    self._consecutive = 0  # skipped steps that end at the last one checked
    self._unchecked: list[jax.Array] = []

  def add(self, metrics: dict):
    """Notes whether a step was skipped, without waiting for it."""
    self._unchecked.append(metrics["skipped"])

  def check(self, step: int):
    """Raises NotFinite if too many consecutive steps up to `step` were skipped."""
    first = step - len(self._unchecked) + 1
    for number, skipped in enumerate(jax.device_get(self._unchecked), first):
      self._consecutive = self._consecutive + 1 if skipped else 0
      if self._consecutive >= self._limit:
        raise NotFinite(number + 1 - self._consecutive, number)
    self._unchecked = []


def _summary(aux: list[dict]) -> dict[str, jax.Array]:
  """Returns means over layers: density, cost and, of routed ones, entropy and expected density.

  `finite` of `Cond.want_finite` stays `[layers]`.
  """
  names = {"density": "density", "cost": "cost"}
  names |= {"router_entropy": "entropy", "expected_density": "expected_density"}
  metrics = {}
  for metric, name in names.items():
    runs = [run[name] for run in aux if name in run]
    if runs:
      metrics[metric] = jnp.concatenate([x.reshape(len(x), -1).mean(-1) for x in runs]).mean()
  if "finite" in aux[0]:
    metrics["finite"] = jnp.concatenate([run["finite"] for run in aux])
  return metrics
