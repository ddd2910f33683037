"""Euler sampling of the rectified flow with classifier-free guidance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from freqformer.config import require
from freqformer.diffusion.flow import sample_noise


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """Settings of the sampler.

  Attributes:
    steps: Euler steps from t = 1 to t = 0.
    guidance: scale; 1 is the conditional model alone (one forward a step), others guide (two).
    shift: timestep shift s: t -> s t / (1 + (s - 1) t); above 1 spends more steps at high noise.
    soft: mix all branches of a router instead of taking the likeliest.
  """

  steps: int = 50
  guidance: float = 4.0
  batch_size: int = 8
  shift: float = 1.0
  soft: bool = False

  def __post_init__(self):
    require(self, "steps batch_size", least=1)
    require(self, "guidance", least=0)
    require(self, "shift", above=0)

  @property
  def guided(self) -> bool:
    """True if a step also runs an unconditional half."""
    return self.guidance != 1

  def times(self) -> np.ndarray:
    """Returns the step boundaries `[steps + 1]`, from 1 down to 0."""
    t = np.linspace(1, 0, self.steps + 1)
    return (self.shift * t / (1 + (self.shift - 1) * t)).astype(np.float32)


def make_step(graphdef, config: SampleConfig, want_masks: bool = False):
  """Returns `(params, x, label, t, t_next, tables, state, phases) -> (x, state, aux)`, jitted.

  `phases`, of `VideoDiT.schedule`, is static: each distinct tuple is compiled. The state is
  donated. `want_masks` puts each layer's `BlockMask` into aux.
  """

  @functools.partial(jax.jit, static_argnums=7, donate_argnums=6)
  def step(params, x, label, t, t_next, tables, state, phases=()):
    model = nnx.merge(graphdef, params)
    rows = jnp.concatenate([x, x]) if config.guided else x
    null = jnp.full_like(label, model.classes)
    labels = jnp.concatenate([label, null]) if config.guided else label
    velocity, state, aux = model(
      rows,
      jnp.broadcast_to(t, labels.shape),
      labels,
      tables,
      state,
      guided=config.guided,
      soft_evaluation=config.soft,
      want_masks=want_masks,
      phases=phases,
    )
    if config.guided:
      conditional, unconditional = jnp.split(velocity, 2)
      velocity = unconditional + config.guidance * (conditional - unconditional)
    return x + (t_next - t) * velocity, state, aux

  return step


def compile_steps(step, params, model, tables, latent_shape, config: SampleConfig):
  """Compiles `step` of `make_step` ahead for every phase of a run; the result is called like it.

  What begins a batch (noise, first state) runs once, so that no sample pays for compiling it.
  """
  batch = config.batch_size
  scalar = jax.ShapeDtypeStruct((), np.float32)

  def begin():
    nothing = np.zeros(batch, np.int32)
    return _begin(model, 0, nothing, nothing, latent_shape, config.guided)

  x, label, state = jax.eval_shape(begin)
  compiled = {
    phases: step.lower(params, x, label, scalar, scalar, tables, state, phases).compile()
    for phases in dict.fromkeys(model.schedule(config.steps))
  }
  jax.block_until_ready(begin())

  def run(*args):
    *arrays, phases = args
    return compiled[phases](*arrays)

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
):
  """Draws latents, normalised as in training.

  Args:
    step: of `make_step` or `compile_steps`, with the same `config`.
    model: for `init_state` and `schedule`; its own parameters are not used.
    labels: int `[n]`.
    indices: int `[n]`, number of each sample: its noise depends on (seed, index) only.
    latent_shape: (t, y, x, c).

  Returns:
    Latents float32 `[n, *latent_shape]`, and the aux of every step of the last batch (a list).

  Raises:
    ConfigError: a method's schedule does not fit the run.
  """
  labels = np.asarray(labels)
  indices = np.asarray(indices)
  times = config.times()
  schedule = model.schedule(config.steps)
  starts = range(0, len(labels), config.batch_size)
  latents = []
  total = len(starts) * config.steps
  with tqdm(total=total, desc="sampling", unit="step", disable=not progress) as bar:
    for start in starts:
      # The last batch repeats its last sample.
      part = np.arange(start, start + config.batch_size).clip(max=len(labels) - 1)
      x, label, state = _begin(
        model, seed, labels[part], indices[part], latent_shape, config.guided
      )
      auxes = []
      for t, t_next, phases in zip(times[:-1], times[1:], schedule, strict=True):
        x, state, aux = step(params, x, label, t, t_next, tables, state, phases)
        auxes.append(aux)
        bar.update()
      latents.append(np.asarray(x)[: len(labels) - start])
  return np.concatenate(latents), jax.device_get(auxes)


def _begin(model, seed: int, labels, indices, latent_shape, guided: bool):
  """Returns noise, labels and first state of a batch."""
  x = sample_noise(jax.random.key(seed), jnp.asarray(indices), latent_shape)
  state = model.init_state(len(labels) * (1 + guided), latent_shape, guided)
  return x, jnp.asarray(labels), state
