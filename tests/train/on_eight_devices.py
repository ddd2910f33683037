"""Training on several devices equals training on one. `test_mesh.py` runs it on eight of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from freqformer import placement
from freqformer.config import numbers
from freqformer.diffusion import sampling
from freqformer.diffusion.sampling import SampleConfig
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.model.leaves import flatten
from freqformer.train.mesh import MeshConfig, make_mesh
from freqformer.train.step import TrainConfig, init_state, make_train_step
from tests.tiny_config import get_config

SHAPE = (3, 6, 8, 3)
BATCH = 8
CLASSES = 4


def small_model(method, heads):
  """Returns a model of one layer, or of a layer for each of several methods: one compilation."""
  methods = (method,) if isinstance(method, str) else method
  config = get_config().model.to_dict() | {"precondition": False, "depth": len(methods)}
  config["attention"]["layers"] = [(i, i + 1, name) for i, name in enumerate(methods)]
  return model_config(config | {"heads": heads, "width": 12 * heads}).resolved(SHAPE)


@functools.cache
def new_model(model):
  """Returns the graph and the parameters of a new model, on the host: they are of no mesh."""
  graphdef, params = nnx.split(VideoDiT(model, SHAPE, CLASSES, nnx.Rngs(0)))
  return graphdef, jax.device_get(params)


def shaken(x):
  """Returns an array with something added: a new model predicts no velocity at all."""
  return x + 0.02 * np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)


@functools.cache
def trained(method, data, fsdp, optimizer="adamw", accumulate=1, context=1, heads=2):
  """Returns the state after one step on a mesh, its metrics, and the compiled step."""
  model = small_model(method, heads)
  # Octaves also learn from dense attention, layer by layer.
  teacher = "octaves" in method
  train = TrainConfig(
    distill=float(teacher),
    distill_at="layers",
    steps=10,
    batch_size=BATCH,
    warmup=0,
    schedule="constant",
    optimizer=optimizer,
    accumulate=accumulate,
  )
  mesh = make_mesh(MeshConfig(data, fsdp, context), BATCH, accumulate)
  latents = np.random.default_rng(0).standard_normal((BATCH, *SHAPE), np.float32)
  labels = np.arange(BATCH, dtype=np.int32) % CLASSES
  with jax.set_mesh(mesh):
    tables = placement.everywhere(make_tables(model, SHAPE, with_dense=teacher))
    graphdef, params = new_model(model)
    if context > 1 or heads > 2:
      params = jax.tree.map(shaken, params)
    state = placement.share(init_state(jax.tree.map(jnp.asarray, params), train, 0))
    batch = placement.split_batch({"latent": latents, "label": labels})
    step = make_train_step(graphdef, train)
    own = placement.everywhere(numbers(train))
    compiled = step.lower(state, batch, tables, own).compile()
    state, metrics = compiled(state, batch, tables, own)
  return state, jax.device_get(metrics), compiled


def moments(state):
  """Returns the averages of gradients by leaf: after one step a tenth of the gradients."""
  return flatten(jax.device_get(state.opt_state[1][0].mu))


def assert_equal(found, wanted):
  """Asserts that two results of `trained` are of one step."""
  (state, metrics, _), (alone, expected, _) = found, wanted
  for name in {"loss", "grad_norm", "density", "distill_loss"} & metrics.keys():
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
  norm = float(expected["grad_norm"])
  moved, wanted = moments(state), moments(alone)
  assert moved.keys() == wanted.keys()
  for name, x in moved.items():
    np.testing.assert_allclose(x, wanted[name], rtol=1e-5, atol=1e-6 * norm, err_msg=name)


@pytest.fixture(autouse=True)
def small_leaves_are_shared_too(monkeypatch):
  monkeypatch.setattr(placement, "_SMALL", 64)


@pytest.mark.parametrize("data, fsdp", [(8, 1), (1, 8)])
def test_a_step_equals_one_device(data, fsdp):
  assert jax.device_count() == 8
  assert_equal(trained("dense", data, fsdp), trained("dense", 1, 1))


def test_a_step_that_also_learns_from_a_teacher_equals_one_device():
  """The model is the one of `context_on_eight_devices.py`: one device computes it once."""
  found = trained(("octaves",), 2, 4, heads=8)
  assert "distill_loss" in found[1]
  assert_equal(found, trained(("octaves",), 1, 1, heads=8))


@pytest.mark.parametrize("data, fsdp", [(4, 1), (2, 2)])
def test_micro_batches_equal_one_batch_and_move_no_sample(data, fsdp):
  """Each device computes micro-batches of its own samples."""
  found = trained("dense", data, fsdp, accumulate=2)
  assert_equal(found, trained("dense", 1, 1))
  compiled = found[-1]
  if fsdp == 1:  # else matrices move
    text = compiled.as_text()
    assert " all-reduce(" in text
    assert not re.search(r" (all-to-all|collective-permute|all-gather)\(", text)


def test_matrices_are_shared_and_stay_so():
  state, _, compiled = trained("dense", 1, 8)
  kernel = state.params["runs"][0]["mlp_in"]["kernel"].get_value()
  assert kernel.sharding.spec == PartitionSpec(None, None, "fsdp")
  assert kernel.addressable_shards[0].data.size == kernel.size // 8
  for tree in (state.ema, state.opt_state[1][0].mu, state.opt_state[1][0].nu):
    assert tree["runs"][0]["mlp_in"]["kernel"].get_value().sharding == kernel.sharding
  text = compiled.as_text()
  assert "f32[1,3,6,8,3]" in text and "f32[8,3,6,8,3]" not in text  # a device sees one sample
  assert "all-gather" in text
  whole = sum(x.size * 4 for x in jax.tree.leaves(state.params))
  alone = trained("dense", 8, 1)[2].memory_analysis().argument_size_in_bytes
  assert alone - compiled.memory_analysis().argument_size_in_bytes > 2 * whole


def test_muon_on_shared_matrices():
  alone, expected, _ = trained("dense", 1, 1, "muon")
  state, metrics, _ = trained("dense", 2, 4, "muon")
  np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-5)
  wanted = jax.device_get(alone.params["runs"][0]["mlp_in"]["kernel"].get_value())
  found = jax.device_get(state.params["runs"][0]["mlp_in"]["kernel"].get_value())
  # Muon gives directions of hardly any gradient, which are rounding, steps of full length.
  np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def drawn(method, mesh, heads=2):
  """Returns ten samples in batches of eight, guided, and their densities."""
  model = small_model(method, heads)
  sampling_config = SampleConfig(steps=4, batch_size=8, guidance=2.0)
  labels = np.arange(10, dtype=np.int32) % CLASSES
  with jax.set_mesh(mesh):
    graphdef, params = new_model(model)
    params = jax.tree.map(lambda x: jnp.asarray(shaken(x)), params)
    whole = nnx.merge(graphdef, params)
    tables = placement.everywhere(whole.tables(SHAPE))
    step = sampling.make_step(graphdef, sampling_config)
    params = placement.everywhere(params)
    step = sampling.compile_steps(step, params, whole, tables, SHAPE, sampling_config)
    return sampling.sample(
      step, params, whole, labels, np.arange(10), 0, tables, SHAPE, sampling_config, False
    )[0]
