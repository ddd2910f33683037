"""Sampling: guidance in its interval, phases and memory per evaluation, first frames, devices."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.cost import model_cost, sampling_cost
from freqformer.diffusion.flow import sample_noise
from freqformer.diffusion.sampling import SampleConfig, make_step, sample
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT

ROOT = pathlib.Path(__file__).parents[2]
SHAPE = (2, 4, 4, 2)
NULL = 3
# Velocities of the stub below, along y: of its classes, and of the null class.
CONDITIONAL = 1.0 + 2 * np.arange(SHAPE[1])
UNCONDITIONAL = np.arange(SHAPE[1])


def drawn(config, **given):
  """Returns two samples of a stub, and what it was asked: (phases, rows, guided, given)."""
  asked = []

  class Stub(nnx.Module):
    def null(self, count):
      return np.full(count, NULL, np.int32)

    def init_state(self, batch, shape, guided):
      return []

    def conditional_half(self, state):
      return state

    def both_halves(self, state):
      return state

    def schedule(self, steps):
      return [(f"{step} of {steps}",) for step in range(steps)]

    def __call__(self, x, time, label, tables, state, *, guided, phases, given=None, **_):
      asked.append((phases[0], len(x), guided, given is not None))
      null = (label == NULL).reshape(-1, 1, 1, 1, 1)
      velocities = (jnp.asarray(v).reshape(-1, 1, 1) for v in (UNCONDITIONAL, CONDITIONAL))
      return jnp.broadcast_to(jnp.where(null, *velocities), x.shape), state, []

  graphdef, params = nnx.split(Stub())
  step = make_step(graphdef, config, first_frame="first_frame" in given)
  args = (step, params, Stub(), [0, 0], [0, 1], 0, {}, SHAPE, config)
  return sample(*args, progress=False, **given)[0], asked


def noise():
  return np.asarray(sample_noise(jax.random.key(0), jnp.arange(2), SHAPE))


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_guidance_acts_in_its_interval(sampler):
  """A solver follows each step's guidance, where velocities never change."""
  config = SampleConfig(
    steps=5, guidance=3.0, batch_size=2, sampler=sampler, guidance_interval=(0.2, 0.6)
  )
  got, asked = drawn(config)
  inside = [False, False, True, True, True]  # t = 1, 0.8, 0.6, 0.4, 0.2
  assert [(rows, guided) for _, rows, guided, _ in asked] == [(4 if g else 2, g) for g in inside]
  assert config.guided() == inside
  if sampler == "euler":
    guided = UNCONDITIONAL + 3.0 * (CONDITIONAL - UNCONDITIONAL)
    moved = 0.4 * CONDITIONAL + 0.6 * guided
    np.testing.assert_allclose(got, noise() - moved.reshape(-1, 1, 1), atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_guidance_zero_is_the_null_class_alone(sampler):
  """One forward an evaluation; outside the interval the conditional model runs as ever."""
  got, asked = drawn(SampleConfig(steps=4, guidance=0.0, batch_size=2, sampler=sampler))
  assert all((rows, guided) == (2, False) for _, rows, guided, _ in asked)
  np.testing.assert_allclose(got, noise() - UNCONDITIONAL.reshape(-1, 1, 1), atol=1e-5)
  config = SampleConfig(steps=4, guidance=0.0, batch_size=2, guidance_interval=(0.5, 0.75))
  got, asked = drawn(config)  # t = 1, 0.75, 0.5, 0.25
  assert config.unconditional() == [False, True, True, False] and not any(config.guided())
  moved = (CONDITIONAL + UNCONDITIONAL) / 2
  np.testing.assert_allclose(got, noise() - moved.reshape(-1, 1, 1), atol=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_has_the_spread_of_the_conditional_velocity(rescale):
  config = SampleConfig(steps=1, guidance=4.0, batch_size=2, guidance_rescale=rescale)
  guided = UNCONDITIONAL + 4.0 * (CONDITIONAL - UNCONDITIONAL)
  factor = rescale * CONDITIONAL.std() / guided.std() + 1 - rescale
  got, _ = drawn(config)
  np.testing.assert_allclose(got, noise() - (factor * guided).reshape(-1, 1, 1), rtol=1e-4)


def test_schedules_count_evaluations():
  """The second evaluation of heun is a moment of its own."""
  _, asked = drawn(SampleConfig(steps=3, guidance=1.0, batch_size=2, sampler="heun"))
  assert [phase for phase, *_ in asked] == [f"{i} of 5" for i in range(5)]


def test_a_given_first_frame_stays():
  first = np.random.default_rng(0).standard_normal(SHAPE[1:]).astype(np.float32)
  for sampler in ("heun", "unipc"):
    config = SampleConfig(
      steps=3, guidance=2.0, batch_size=2, sampler=sampler, guidance_rescale=1.0
    )
    got, asked = drawn(config, first_frame=first)
    np.testing.assert_allclose(got[:, 0], [first, first], atol=1e-5)
    assert all(given for *_, given in asked)
    np.testing.assert_allclose(got[:, 1], drawn(config)[0][:, 1], atol=1e-4)


LAYERS = ((0, 1, "spatial_temporal"), (1, None, "adaspa"))


def small_model(**attention):
  """A model with noise on adaLN-Zero's zeros, whose methods remember something by default."""
  methods = dict(
    layers=LAYERS,
    block=8,
    tile=(1, 2, 4),
    implementation="reference",
    spatial_temporal=dict(frames=0, places=0, sink=0, profile=dict(warmup=0.4)),
    adaspa=dict(sparsity=0.5, warmup=1, search=(1,)),
  )
  config = model_config(
    dict(size="custom", width=12, depth=2, heads=2, patch=(1, 1, 1), attention=methods | attention)
  )
  model = nnx.jit(lambda: VideoDiT(config, SHAPE, NULL, nnx.Rngs(0)))()
  graphdef, params = nnx.split(model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
  return nnx.merge(graphdef, params)


def test_methods_remember_across_the_ends_of_the_interval():
  """With the null class in both halves guidance has no effect, wherever it acts."""
  model = small_model()
  graphdef, params = nnx.split(model)
  tables = model.tables(SHAPE)

  def draw(guidance, interval):
    config = SampleConfig(steps=3, guidance=guidance, batch_size=2, guidance_interval=interval)
    args = (make_step(graphdef, config), params, model, [NULL, NULL], [0, 1], 0, tables, SHAPE)
    return sample(*args, config, progress=False)

  alone, aux = draw(1.0, (0.0, 1.0))
  # Measured and searched in the second evaluation: the third runs with what was found there.
  assert [float(a[1]["density"].mean()) < 1 for a in aux] == [False, False, True]
  assert [float(a[0]["density"].mean()) < 1 for a in aux] == [False, True, True]
  got, aux = draw(2.0, (0.5, 0.8))
  assert [a[0]["density"].shape[1] for a in aux] == [2, 4, 2]
  np.testing.assert_allclose(got, alone, atol=1e-4)


def test_without_guidance_by_classes_they_do_not_matter():
  """Equal noise gives equal samples; under guidance one class would choose the tiles of both."""
  model = small_model(layers=(), method="block_topk", block_topk=dict(density=0.5, coarse="none"))
  graphdef, params = nnx.split(model)
  samples = {}
  for guidance in (0.0, 1.0):
    config = SampleConfig(steps=3, guidance=guidance, batch_size=2)
    args = (make_step(graphdef, config), params, model, [0, 1], [5, 5], 0)
    samples[guidance], _ = sample(*args, model.tables(SHAPE), SHAPE, config, progress=False)
  np.testing.assert_array_equal(*samples[0.0])
  assert np.abs(np.subtract(*samples[1.0])).max() > 1e-3


def test_costs_follow_what_runs():
  config = small_model(layers=(), method="dense").config
  one = model_cost(config, SHAPE).total
  sampling = SampleConfig(steps=5, guidance=2.0, sampler="heun", guidance_interval=(0.3, 0.7))
  # t = 1, .8, .8, .6, .6, .4, .4, .2, .2: four of nine evaluations run twice.
  schedule = [("",)] * 9
  assert sampling_cost(config, SHAPE, schedule, sampling.guided()).total == pytest.approx(13 * one)
  assert sampling_cost(config, SHAPE, schedule, False).total == pytest.approx(9 * one)


ON_TWO = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from freqformer.diffusion.flow import sample_noise
from freqformer.diffusion.sampling import SampleConfig, make_step, sample
from tests.diffusion.test_sampling import SHAPE, small_model

assert jax.device_count() == 2
model = small_model(layers=(), method="dense")
graphdef, params = nnx.split(model)
tables = model.tables(SHAPE)
mesh = Mesh(np.array(jax.devices()), ("samples",))
split = NamedSharding(mesh, PartitionSpec("samples"))

def draw(batch, sharded):
  config = SampleConfig(steps=2, guidance=2.0, batch_size=batch, sampler="dpm++2m")
  step = make_step(graphdef, config)
  def placed(params, points, label, *rest):
    if sharded:
      params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
      points, label = jax.device_put((points, label), split)
    return step(params, points, label, *rest)
  args = (params, model, [0, 1, 2, 0], np.arange(4), 0, tables, SHAPE, config)
  return sample(placed, *args, progress=False)[0]

index = jnp.arange(4)
noise = jax.jit(lambda i: sample_noise(jax.random.key(0), i, SHAPE), out_shardings=split)
assert len(noise(index).sharding.device_set) == 2
np.testing.assert_array_equal(noise(index), sample_noise(jax.random.key(0), index, SHAPE))
alone = draw(1, False)
np.testing.assert_allclose(draw(4, True), alone, atol=1e-4)
np.testing.assert_allclose(draw(3, False), alone, atol=1e-4)
"""


def test_a_sample_is_the_same_on_two_devices_and_in_any_batch():
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
  done = subprocess.run(
    [sys.executable, "-c", ON_TWO],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert not done.returncode, done.stderr[-3000:]


@pytest.mark.parametrize(
  "wrong, message",
  [
    (dict(guidance_interval=(0.9, 0.1)), "must be the lowest and the highest t"),
    (dict(guidance_interval=(0.1, 1.1)), "at most 1"),
    (dict(guidance=0.0, guidance_rescale=0.5), "guidance_rescale=0.5 needs the conditional"),
    (dict(guidance_rescale=2.0), "guidance_rescale=2.0 must be at least 0 and at most 1"),
  ],
)
def test_refusals(wrong, message):
  with pytest.raises(ValueError, match=message):
    SampleConfig(**wrong)
