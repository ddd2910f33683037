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
  """How samples are drawn.

  Attributes:
    steps: Euler steps from t = 1 to t = 0.
    guidance: 1 is the conditional model alone (one forward a step), above 1 guides (two).
    batch_size: samples that run together.
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

  def times(self) -> np.ndarray:
    """Step boundaries `[steps + 1]`, from 1 down to 0."""
    t = np.linspace(1, 0, self.steps + 1)
    return (self.shift * t / (1 + (self.shift - 1) * t)).astype(np.float32)


def make_step(graphdef, config: SampleConfig, want_masks: bool = False):
  """One jitted Euler step `(params, x, label, t, t_next, tables, state, phases) -> (x, state, aux)`.

  `phases` (of `VideoDiT.schedule`) is static: one compilation per shape and distinct tuple. The state is donated: what a call
  was given is gone after it. `want_masks` puts each layer's `BlockMask` into aux.
  """
  guided = config.guidance != 1

  @functools.partial(jax.jit, static_argnums=7, donate_argnums=6)
  def step(params, x, label, t, t_next, tables, state, phases=()):
    model = nnx.merge(graphdef, params)
    both = (lambda a, b: jnp.concatenate([a, b])) if guided else (lambda a, b: a)
    time = jnp.broadcast_to(t, both(label, label).shape)
    velocity, state, aux = model(
      both(x, x),
      time,
      both(label, jnp.full_like(label, model.classes)),
      tables,
      state,
      guided=guided,
      soft_evaluation=config.soft,
      want_masks=want_masks,
      phases=phases,
    )
    if guided:
      conditional, free = jnp.split(velocity, 2)
      velocity = free + config.guidance * (conditional - free)
    return x + (t_next - t) * velocity, state, aux

  return step


def compile_steps(step, params, model, tables, latent_shape, config: SampleConfig):
  """`step` of `make_step`, compiled ahead for every phase of the run; called like it.

  What begins a batch (noise, first state) is run once and thrown away: else the first sample would pay for compiling it.

  Raises:
    ConfigError: if a method's schedule does not fit the run.
  """
  batch, guided, scalar = (
    config.batch_size,
    config.guidance != 1,
    jax.ShapeDtypeStruct((), np.float32),
  )
  x = jax.ShapeDtypeStruct((batch, *latent_shape), np.float32)
  label = jax.ShapeDtypeStruct((batch,), np.int32)

  def begin():
    return _begin(model, 0, *np.zeros((2, batch), np.int32), latent_shape, guided)

  _, _, state = jax.eval_shape(begin)
  compiled = {
    phases: step.lower(params, x, label, scalar, scalar, tables, state, phases).compile()
    for phases in dict.fromkeys(model.schedule(config.steps))
  }
  jax.block_until_ready(begin())
  return lambda *args: compiled[args[-1]](*args[:-1])


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
  progress=True,
):
  """Latents for labels, normalised as in training.

  Args:
    step: of `make_step` or `compile_steps`; model: for `init_state` and `schedule` (its parameters are not used).
    labels: int `[n]`; indices: int `[n]`, number of each sample under the seed: its noise depends on (seed, index) only.

  Returns:
    latents float32 `[n, *latent_shape]`, and aux of every step of the last batch (a list, NumPy).

  Raises:
    ConfigError: if a method's schedule does not fit the run.
  """
  labels, indices, times = np.asarray(labels), np.asarray(indices), config.times()
  schedule = model.schedule(config.steps)
  batch, guided, outs, auxes = config.batch_size, config.guidance != 1, [], []
  bar = tqdm(
    total=-(-len(labels) // batch) * config.steps,
    desc="sampling",
    unit="step",
    disable=not progress,
  )
  for start in range(0, len(labels), batch):
    part = np.arange(start, start + batch).clip(
      max=len(labels) - 1
    )  # the last batch repeats its last sample
    x, label, state = _begin(model, seed, labels[part], indices[part], latent_shape, guided)
    auxes = []
    for t, t_next, phases in zip(times[:-1], times[1:], schedule, strict=True):
      x, state, aux = step(params, x, label, t, t_next, tables, state, phases)
      auxes.append(aux)
      bar.update()
    outs.append(np.asarray(x)[: len(labels) - start])
  bar.close()
  return np.concatenate(outs), jax.device_get(auxes)


def _begin(model, seed: int, labels, indices, latent_shape, guided: bool):
  """Noise, labels and first state of a batch."""
  x = sample_noise(jax.random.key(seed), jnp.asarray(indices), latent_shape)
  return x, jnp.asarray(labels), model.init_state(len(labels) * (1 + guided), latent_shape, guided)
