"""Samples from the rectified flow with classifier-free guidance, by any solver of `solvers`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from freqformer.config import require, require_one_of
from freqformer.diffusion.flow import sample_noise
from freqformer.diffusion.levels import LEVELS, Levels
from freqformer.diffusion.solvers import OTHER_EQUATIONS, SOLVERS, SolverTable
from freqformer.placement import everywhere, split, split_batch, whole

# What a batch's labels are for.
_CONDITIONAL = "conditional"
_NULL = "null"
_BOTH = "both"
_ROUNDING = 1e-9  # of timesteps at the ends of the guidance interval


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """Settings of the sampler.

  Attributes:
    steps: from t = 1 to t = 0. The model is evaluated once in each; with heun twice, but once in
      the last one.
    guidance: scale; 1 is the conditional model alone and 0 the null class alone (one forward an
      evaluation), others guide (two).
    shift: timestep shift s: t -> s t / (1 + (s - 1) t); above 1 spends more steps at high noise.
    soft: mix all branches of a router instead of taking the likeliest.
    sampler: a name of `solvers.SOLVERS`.
    guidance_interval: lowest and highest t where `guidance` holds (arXiv 2404.07724); elsewhere
      the conditional model runs alone.
    guidance_rescale: share of the guided velocity that gets the spread of the conditional one back
      (phi of arXiv 2305.08891, section 3.4).
    levels: boundaries of the steps, a name of `levels.LEVELS`.
  """

  steps: int = 50
  guidance: float = 4.0
  batch_size: int = 8
  shift: float = 1.0
  soft: bool = False
  sampler: str = "euler"
  guidance_interval: tuple[float, float] = (0.0, 1.0)
  guidance_rescale: float = 0.0
  levels: str = "even"

  def __post_init__(self):
    require(self, "steps batch_size", least=1)
    require(self, "guidance", least=0)
    require(self, "shift", above=0)
    require(self, "guidance_rescale guidance_interval", least=0, most=1)
    if len(self.guidance_interval) != 2 or self.guidance_interval[0] > self.guidance_interval[1]:
      raise ValueError(
        f"guidance_interval={self.guidance_interval!r} must be the lowest and the highest t that "
        "are guided, e.g. (0.1, 0.9)."
      )
    if self.guidance == 0 and self.guidance_rescale:
      raise ValueError(
        f"guidance_rescale={self.guidance_rescale!r} needs the conditional velocity, which "
        "guidance=0 does not compute; set guidance_rescale=0."
      )
    other = OTHER_EQUATIONS.get(self.sampler)
    if other is not None:
      raise ValueError(
        f"sampler={self.sampler!r} solves {other}; this model predicts the velocity of a rectified "
        f"flow, which {', '.join(SOLVERS)} solve."
      )
    require_one_of(self, "sampler", SOLVERS)
    require_one_of(self, "levels", LEVELS)

  def times(self) -> np.ndarray:
    """Returns the step boundaries, float64 `[steps + 1]`, from about 1 down to 0."""
    return self._levels().times

  def told(self) -> np.ndarray:
    """Returns the timestep that the model is told in each evaluation, float32."""
    return self._levels().told(self.table().times).astype(np.float32)

  def _levels(self) -> Levels:
    return LEVELS[self.levels](self.steps, self.shift)

  def table(self) -> SolverTable:
    """Returns the evaluations of a run and the solver's coefficients."""
    return SOLVERS[self.sampler](self.times())

  def guided(self) -> list[bool]:
    """Returns, for each evaluation, whether it runs a conditional and an unconditional half."""
    return [bool(x) and self.guidance not in (0, 1) for x in self._inside()]

  def unconditional(self) -> list[bool]:
    """Returns, for each evaluation, whether it runs the unconditional half alone."""
    return [bool(x) and self.guidance == 0 for x in self._inside()]

  def _inside(self) -> np.ndarray:
    """Tells which evaluations lie in the interval of guidance."""
    low, high = self.guidance_interval
    times = self.table().times
    return (low - _ROUNDING <= times) & (times <= high + _ROUNDING)


@dataclasses.dataclass(frozen=True)
class _Evaluation:
  """One evaluation of the model in a run.

  Attributes:
    time: float32, as the model is told.
    weights: float32 `[k, k + 1]`, of `SolverTable`.
    phases: of the methods, one per run of layers.
    guided: both halves of guidance run.
    unconditional: all labels are the null class.
  """

  time: np.ndarray
  weights: np.ndarray
  phases: tuple[str, ...]
  guided: bool
  unconditional: bool

  @property
  def labels(self) -> str:
    """Which of a batch's labels it takes."""
    return _BOTH if self.guided else _NULL if self.unconditional else _CONDITIONAL

  @property
  def program(self) -> tuple:
    """Static arguments of a step: each distinct value is compiled."""
    return self.phases, self.guided


def _evaluations(model, config: SampleConfig) -> list[_Evaluation]:
  """Returns a run's evaluations in order.

  The schedule of a method counts evaluations: heun's second one is a moment of its own, at its own
  t, and what a method remembers goes through all of them in the order of falling noise.
  """
  table = config.table()
  schedule = model.schedule(len(table.times))
  return [
    _Evaluation(time, weights.astype(np.float32), phases, guided, unconditional)
    for time, weights, phases, guided, unconditional in zip(
      config.told(), table.weights, schedule, config.guided(), config.unconditional(), strict=True
    )
  ]


def make_step(
  graphdef,
  config: SampleConfig,
  want_masks: bool = False,
  first_frame: bool = False,
  want_distance: bool = False,
):
  """Returns one evaluation and the solver's update, jitted.

  It is `(params, points, label, t, weights, tables, state, phases, guided) -> (points, state,
  aux)`. Points and weights are those of `SolverTable`, the points in a tuple. Labels have a row for
  each sample, where guided a second one each, without the condition, behind them. `phases`, of
  `LayerStack.schedule`, and `guided` are static: each distinct pair is compiled. The state is
  donated.

  Args:
    want_masks: puts each layer's `BlockMask` into aux.
    first_frame: the first latent frame of the points is given and stays.
    want_distance: puts each layer's distance from dense attention into aux (`Cond.teacher`); the
      tables then have the dense one.
  """
  evaluate = make_evaluation(config, first_frame)

  @functools.partial(jax.jit, static_argnums=(7, 8), donate_argnums=6)
  def step(params, points, label, t, weights, tables, state, phases=(), guided=False):
    model = nnx.merge(graphdef, params)
    moment = dict(want_masks=want_masks, teacher=tables["dense"] if want_distance else None)
    return evaluate(model, points, label, t, weights, tables, state, phases, guided, **moment)

  return step


def make_evaluation(config: SampleConfig, first_frame: bool = False):
  """Returns the step of `make_step` before it is jitted, as a part of other programs.

  It takes a model where that one takes parameters, and further fields of `Cond` by name.
  """
  guides = any(config.guided())
  free = slice(int(first_frame), None)  # latent frames that are sampled

  def evaluate(model, points, label, t, weights, tables, state, phases=(), guided=False, **moment):
    x = points[0]
    rows = jnp.concatenate([x, x]) if guided else x
    alone = guides and not guided  # in a run whose other evaluations have two halves
    velocity, state, aux = model(
      rows,
      jnp.broadcast_to(t, len(rows)),
      label,
      tables,
      model.conditional_half(state) if alone else state,
      guided=guided,
      soft_evaluation=config.soft,
      phases=phases,
      given=jnp.ones(len(rows), bool) if first_frame else None,
      **moment,
    )
    if alone:
      state = model.both_halves(state)
    velocity = velocity[:, free]
    if guided:
      velocity = _guide(velocity, config)
    if first_frame:
      velocity = jnp.pad(velocity, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    known = (*points, velocity)
    points = tuple(
      split(sum(weights[i, j] * array for j, array in enumerate(known))) for i in range(len(points))
    )
    return points, whole(state), whole(aux)

  return evaluate


def _guide(velocity, config: SampleConfig):
  """Returns the guided velocity `[b, ...]` of both halves, conditional first, `[2 b, ...]`."""
  conditional, unconditional = jnp.split(velocity, 2)
  velocity = unconditional + config.guidance * (conditional - unconditional)
  if config.guidance_rescale:
    axes = tuple(range(1, velocity.ndim))
    spread = jnp.std(velocity, axes, keepdims=True)
    wanted = jnp.std(conditional, axes, keepdims=True)
    ratio = wanted / jnp.maximum(spread, np.finfo(np.float32).tiny)
    velocity *= 1 + config.guidance_rescale * (ratio - 1)
  return velocity


def compile_steps(
  step, params, model, tables, latent_shape, config: SampleConfig, first_frame=None
):
  """Compiles `step` of `make_step` ahead for every evaluation of a run; it is called like it.

  What begins a batch (noise, first state) runs once, so that no sample pays for compiling it.
  """
  batch = config.batch_size
  null = model.null(batch)
  numbers = np.zeros(batch, np.int32)
  points, labels, state = _begin(model, 0, null, null, numbers, latent_shape, config, first_frame)
  scalar = jax.ShapeDtypeStruct((), np.float32)
  weights = jax.ShapeDtypeStruct((len(points), len(points) + 1), np.float32)
  programs = dict.fromkeys(each.program for each in _evaluations(model, config))
  compiled = {}
  for program in programs:
    own = labels[_BOTH if program[1] else _CONDITIONAL]
    lowered = step.lower(params, points, own, scalar, weights, tables, state, *program)
    compiled[program] = lowered.compile()
  jax.block_until_ready(points)

  def run(*args):
    *arrays, phases, guided = args
    return compiled[phases, guided](*arrays)

  return run


def by_noise(high: tuple, low: tuple, boundary: float):
  """Returns a step of two models, for high and for low noise, each `(step, params)`.

  It is called as either of them, and the parameters that it is given do not count. The first model
  runs where t, as the model is told it, is at least the boundary.
  """

  def run(params, points, label, t, *rest):
    del params
    step, own = high if t >= boundary else low
    return step(own, points, label, t, *rest)

  return run


def sample(
  step,
  params,
  model,
  labels,
  indices,
  seed: int,
  tables,
  latent_shape,
  config: SampleConfig,
  progress: bool = True,
  first_frame: np.ndarray | None = None,
  null=None,
):
  """Draws latents, normalised as in training.

  Args:
    step: of `make_step` or `compile_steps`, with the same `config`.
    model: for `init_state` and `schedule`; its own parameters are not used.
    labels: int `[n]`, embeddings `[n, ...]`, or any pytree of arrays with a row for each sample.
    indices: int `[n]`, number of each sample: its noise depends on (seed, index) only.
    latent_shape: (t, y, x, c).
    first_frame: normalised latents `[y, x, c]` that all samples begin with, or None; the step is
      then made for them.
    null: what stands in guidance for no condition, one row of `labels`; None: `model.null`.

  Returns:
    Latents float32 `[n, *latent_shape]`, and the aux of every evaluation of the last batch (a
    list).

  Raises:
    ConfigError: a method's schedule does not fit the run.
  """
  if isinstance(labels, list):  # of numbers, no pytree
    labels = np.asarray(labels)
  total = count_rows(labels)
  indices = np.asarray(indices)
  evaluations = _evaluations(model, config)
  starts = range(0, total, config.batch_size)
  latents = []
  forwards = len(starts) * len(evaluations)
  with tqdm(total=forwards, desc="sampling", unit="forward", disable=not progress) as bar:
    for start in starts:
      # The last batch repeats its last sample.
      part = np.arange(start, start + config.batch_size).clip(max=total - 1)
      own = rows(labels, part)
      other = model.null(len(part)) if null is None else _repeated(null, len(part))
      points, labelled, state = _begin(
        model, seed, own, other, indices[part], latent_shape, config, first_frame
      )
      auxes = []
      for each in evaluations:
        own = labelled[each.labels]
        points, state, aux = step(
          params, points, own, each.time, each.weights, tables, state, *each.program
        )
        auxes.append(aux)
        bar.update()
      latents.append(np.asarray(everywhere(points[0]))[: total - start])
  return np.concatenate(latents), jax.device_get(auxes)


def count_rows(labels) -> int:
  """Returns the number of samples that labels, any pytree, have a row for.

  Raises:
    ValueError: its arrays have not equally many.
  """
  counts = {len(x) for x in jax.tree.leaves(labels)}
  if len(counts) != 1:
    raise ValueError(f"labels have {sorted(counts)} rows; each array needs one for each sample.")
  return counts.pop()


def rows(labels, places):
  """Returns the rows of some samples of labels, any pytree."""
  return jax.tree.map(lambda x: np.asarray(x)[places], labels)


def _repeated(row, count: int):
  """Returns labels of `count` samples that all have one row."""
  return jax.tree.map(lambda x: np.broadcast_to(x, (count, *np.shape(x))), row)


def _begin(
  model, seed: int, labels, null, indices, latent_shape, config: SampleConfig, first_frame
):
  """Returns a batch's points, labels by use, and first state: noise behind a given first frame."""
  x = sample_noise(jax.random.key(seed), jnp.asarray(indices), latent_shape)
  if first_frame is not None:
    x = x.at[:, 0].set(first_frame)
  guided = any(config.guided())
  state = model.init_state(len(indices) * (1 + guided), latent_shape, guided)
  by_use = {_CONDITIONAL: labels, _NULL: null}
  if guided:
    # By NumPy: jnp would compile a program of its own where seconds are taken.
    by_use[_BOTH] = jax.tree.map(lambda *halves: np.concatenate(halves), labels, null)
  x, by_use = split_batch((x, jax.tree.map(jnp.asarray, by_use)))
  return (x,) * config.table().weights.shape[1], by_use, everywhere(state)
