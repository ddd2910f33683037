"""AdaSpa in whole sampling runs: compiled steps, state and its size, cost by phase, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from freqformer.kernels.selection.block_scores import block_mass

from freqformer.config import ConfigError
from freqformer.cost import layer_cost, model_cost, sampling_cost
from freqformer.diffusion.sampling import SampleConfig, compile_steps, make_step, sample
from freqformer.grid.layout import TileLayout
from freqformer.methods.adaspa import AdaSpa
from freqformer.model.config import model_config
from freqformer.model.dit import VideoDiT
from tests.kernels.block_sparse.suite import relative_error
from tools.offline import compile_for

SHAPE = (4, 8, 8, 2)
BASE = dict(size="custom", width=24, depth=3, heads=2, patch=(1, 1, 1))


def model_of(adaspa=None, method="adaspa", **attention):
  # The reference backend compiles fastest; backends are held to it elsewhere.
  attention = dict(
    method=method, block=16, implementation="reference", adaspa=adaspa or {}, **attention
  )
  model = VideoDiT(model_config({**BASE, "attention": attention}), SHAPE, 3, nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  keys = iter(jax.random.split(jax.random.key(1), 1000))
  return nnx.merge(
    graphdef, jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params)
  )


def draw(model, steps=10, guidance=3.0, labels=(0, 1), compiled=True):
  graphdef, params = nnx.split(model)
  config = SampleConfig(steps=steps, guidance=guidance, batch_size=len(labels))
  tables = model.tables(SHAPE)
  run = make_step(graphdef, config)
  if compiled:
    run = compile_steps(run, params, model, tables, SHAPE, config)
  out = sample(
    run, params, model, labels, np.arange(len(labels)), 0, tables, SHAPE, config, progress=False
  )
  return (*out, run)


@pytest.fixture(scope="module")
def run():
  """A model at half density, and ten steps of it: the sample, each step's aux, the jitted step."""
  model = model_of(dict(sparsity=0.5))
  return model, *draw(model, compiled=False)


def test_a_run_is_four_compiled_steps(run):
  model, out, aux, step = run
  assert step._cache_size() == 4 and np.isfinite(out).all()
  ahead, _, _ = draw(model)
  np.testing.assert_array_equal(out, ahead)
  density = [float(a[0]["density"].mean()) for a in aux]
  searched = [i for i, a in enumerate(aux) if "recall" in a[0]]
  assert density[:3] == [1, 1, 1] and searched == [2, 6]
  # Tiles are full: exactly the base budget, in every step and layer.
  np.testing.assert_allclose(density[3:], 0.5)
  assert aux[3][0]["density"].shape == (3, 4, 2) and aux[2][0]["recall"].shape == (3, 2, 2)
  assert float(aux[6][0]["cost"].mean()) == pytest.approx(0.75)
  assert float(aux[2][0]["cost"].mean()) == pytest.approx(1.25)


def test_runs_of_layers_mix_and_share_one_schedule():
  model = model_of(dict(sparsity=0.5), layers=((0, 1, "dense"), (1, None, "adaspa")))
  phases = ("warmup", "search_first", "reuse", "search", "reuse")
  assert model.schedule(5) == [("", phase) for phase in phases]
  _, aux, step = draw(model, steps=5, compiled=False)
  assert step._cache_size() == 4
  np.testing.assert_allclose(aux[-1][0]["density"], 1)
  np.testing.assert_allclose(aux[-1][1]["density"], 0.5)


def test_sparsity_zero_samples_as_dense():
  dense = model_of(method="dense")
  wide = model_of(dict(sparsity=0.0))
  # Each step feeds the last one's float32 rounding through the model: more than one layer's error.
  assert relative_error(draw(wide, steps=5)[0], draw(dense, steps=5)[0]) < 1e-5


def test_a_checkpoint_holds_nothing_of_it(run):
  """Parameters are those of dense attention: nothing is cached in a module, whatever has run."""

  def paths(model):
    return {(p, leaf.shape) for p, leaf in nnx.to_flat_state(nnx.state(model))}

  assert paths(run[0]) == paths(model_of(method="dense"))


def test_training_is_dense():
  x = jnp.ones((1, *SHAPE))
  time = jnp.full(1, 0.5)
  label = jnp.zeros(1, jnp.int32)

  @nnx.jit
  def out(model):
    return model(x, time, label, model.tables(SHAPE), train=True, rng=jax.random.key(0))[0]

  assert relative_error(out(model_of(dict(sparsity=0.5))), out(model_of(method="dense"))) < 1e-6


# ---- size and cost ---------------------------------------------------------------------


def state_bytes(tile=None, **fields):
  """State of 40 layers of 40 heads at 21x45x80 = 75,600 tokens, one sample under guidance."""
  config = dict(size="custom", width=5120, depth=40, heads=40, patch=(1, 1, 1))
  config["attention"] = dict(method="adaspa", block=128, tile=tile or (), adaspa=fields)
  shape = (21, 45, 80, 16)
  model = nnx.eval_shape(lambda: VideoDiT(model_config(config), shape, 1, nnx.Rngs(0)))
  state = jax.eval_shape(lambda: model.init_state(2, shape, guided=True))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_state_fits():
  assert state_bytes() == 40 * 40 * (2 * 75_600 + 630 * 79) <= 320 * 2**20
  assert state_bytes(tile=(7, 9, 2)) == 40 * 40 * (2 * 75_600 + 600 * 75) <= 320e6
  assert state_bytes(lse_dtype="uint8") == 40 * 40 * (75_600 + 630 * (79 + 8)) <= 320e6
  assert state_bytes(lse_cache="tile") == 40 * 40 * 630 * (2 + 79)


def test_cost_by_phase():
  layout = TileLayout((8, 8, 16), (2, 4, 4), 32)
  method, args, whole = AdaSpa(sparsity=0.75), (layout, 6, 16), 4 * layout.n**2 * 96
  totals = {
    p: layer_cost(method, *args, phase=p).total / whole
    for p in ("", "warmup", "search_first", "search", "reuse")
  }
  assert totals == pytest.approx(
    {"": 1, "warmup": 1, "search_first": 1.5, "search": 0.75, "reuse": 0.25}
  )


def test_cost_of_a_run(run):
  """10 steps: 3 dense, 7 at half; attention FLOPs are what the steps' densities say."""
  model, _, aux, _ = run
  got = sampling_cost(model.config, SHAPE, model.schedule(10))
  dense = model_cost(model.config.with_method("dense"), SHAPE)
  density = np.mean([a[0]["density"] for a in aux])
  assert got.attention_flops == pytest.approx(20 * dense.attention_flops * density)
  searches = 2 * 2 * dense.attention_flops / 2  # two steps, two rows: q k^T without the values
  assert got.linear_flops == pytest.approx(20 * dense.linear_flops + searches)


def test_search_memory_on_a_gpu():
  """Scores of one head alone would be 26 GB; compiled for an H100, without one."""
  layout = TileLayout.fit((21, 45, 80), 128)
  arrays, method = layout.arrays(), AdaSpa()
  q = jax.ShapeDtypeStruct((1, layout.n_buffer, 40, 128), jnp.bfloat16)
  lse = jax.ShapeDtypeStruct((1, 40, layout.n_buffer), jnp.bfloat16)

  def find(q, k, lse, fixed):
    return method.find(q, k, lse, arrays, fixed)

  assert compile_for(find, q, q, lse, method.tables(layout)["fixed"]).temp_bytes < 512 * 2**20

  def masses(q, k, lse):
    return block_mass(q, k, lse, arrays.kv_len, layout.block)

  assert compile_for(masses, q, q, lse).temp_bytes < 512 * 2**20


# ---- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(warmup=11), "warmup=11 is longer than the run of 10 steps"),
    (dict(search=(3, 10)), "step 10 comes after the last step of a run of 10"),
    (dict(warmup=4, search=(3, 6)), "step 3 lies in the warm-up of 4 dense steps"),
    (dict(search=(6, 3)), "ascending"),
  ],
)
def test_a_schedule_that_does_not_fit_is_refused_before_the_run(fields, message):
  with pytest.raises(ConfigError, match=message):
    draw(model_of(dict(sparsity=0.5) | fields))


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(sparsity=1.0), r"sparsity=1.0 must lie in \[0, 1\)"),
    (dict(sparsity=0.99), "of 16 tiles rounds to no tile per query tile; lower it to 0.968"),
    (dict(sparsity=0.9, sink=4), "leaves 2 per query tile, fewer than the own tile and sink=4"),
    (dict(search=()), "names no step"),
    (dict(warmup=-1), "steps .integers >= 0. or shares"),
    (dict(search=(0.2, 1.5)), "shares of the run"),
    (dict(lse_cache="half"), "must be one of"),
    (dict(lse_cache="tile", lse_dtype="uint8"), "needs lse_cache='row'"),
    (dict(sparsty=0.5), "did you mean 'sparsity'"),
    (dict(warmup="ten"), "must be int | float"),
  ],
)
def test_bad_fields(fields, message):
  with pytest.raises(ConfigError, match=message):
    model_of(fields)


def test_shares_and_steps():
  """The paper's schedule at 50 steps, and the same shares elsewhere; every run length works."""
  method = AdaSpa()

  def searches(steps):
    return [i for i in range(steps) if method.phase(i, steps).startswith("search")]

  assert (
    searches(50) == [10, 30]
    and [method.phase(i, 50) for i in (0, 9, 11, 29, 49)] == ["warmup"] * 2 + ["reuse"] * 3
  )
  assert AdaSpa(warmup=10, search=(10, 30)).phase(30, 50) == "search"
  for steps in range(1, 60):
    method.check_run(steps)
    assert (
      searches(steps)[0] <= steps // 5 and method.phase(searches(steps)[0], steps) == "search_first"
    )
