"""AdaSpa in whole sampling runs: compiled steps, state and its size, cost by phase, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.config import ConfigError
from freqformer.cost import layer_cost, model_cost, sampling_cost
from freqformer.diffusion.sampling import SampleConfig, make_step, sample
from freqformer.grid.layout import TileLayout
from freqformer.methods.adaspa import AdaSpa
from freqformer.methods.base import Dims
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT
from tools.offline import compile_for

# One worker: what the file prepares is then made once.
pytestmark = pytest.mark.xdist_group("adaspa_runs")

SHAPE = (4, 8, 8, 2)
BASE = dict(size="custom", width=24, depth=3, heads=2, patch=(1, 1, 1))


def abstract(adaspa=None, method="adaspa", **attention):
  """A model without arrays."""
  attention = dict(method=method, block=16, adaspa=adaspa or {}) | attention
  config = model_config({**BASE, "attention": attention})
  return nnx.eval_shape(lambda: VideoDiT(config, SHAPE, 3, nnx.Rngs(0)))


def paths(model):
  return {(path, leaf.shape) for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def run():
  """A model at half density behind one dense layer, and ten guided steps of two samples: the
  sample, each step's aux of AdaSpa's two layers, the jitted step."""
  # The reference backend compiles fastest; backends are held to it elsewhere.
  layers = ((0, 1, "dense"), (1, None, "adaspa"))
  model = abstract(dict(sparsity=0.5), layers=layers, implementation="reference")
  graphdef, params = nnx.split(model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), params)
  config = SampleConfig(steps=10, guidance=3.0, batch_size=2)
  step = make_step(graphdef, config)
  args = ([0, 1], np.arange(2), 0, model.tables(SHAPE), SHAPE, config)
  out, aux = sample(step, params, model, *args, progress=False)
  return model, out, aux, step


def test_a_run_is_four_compiled_steps(run):
  model, out, aux, step = run
  assert model.schedule(5) == [
    ("", phase) for phase in ("warmup", "search_first", "reuse", "search", "reuse")
  ]
  assert step._cache_size() == 4 and np.isfinite(out).all()
  assert all((a[0]["density"] == 1).all() for a in aux)
  aux = [a[1] for a in aux]
  density = [float(a["density"].mean()) for a in aux]
  searched = [i for i, a in enumerate(aux) if "recall" in a]
  assert density[:3] == [1, 1, 1] and searched == [2, 6]
  # Tiles are full: exactly the base budget, in every step and layer.
  np.testing.assert_allclose(density[3:], 0.5)
  assert aux[3]["density"].shape == (2, 4, 2) and aux[2]["recall"].shape == (2, 2, 2)
  assert float(aux[6]["cost"].mean()) == pytest.approx(0.75)
  assert float(aux[2]["cost"].mean()) == pytest.approx(1.25)


def test_a_checkpoint_holds_nothing_of_it(run):
  """Parameters are those of dense attention: nothing is cached in a module, whatever has run."""
  other = abstract(method="dense", layers=((0, 1, "dense"), (1, None, "dense")))
  assert paths(run[0]) == paths(other)


# ---- size and cost ---------------------------------------------------------------------


def state_bytes(tile=(), **fields):
  """State of 40 layers of 40 heads at 21x45x80 = 75,600 tokens, one sample under guidance."""
  layout = TileLayout.fit((21, 45, 80), 128, tile or None)
  state = jax.eval_shape(lambda: AdaSpa(**fields).init_state(1, Dims(40, 128, 1), layout))
  return 40 * sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_state_fits():
  assert state_bytes() == 40 * 40 * (2 * 75_600 + 630 * 79) <= 320 * 2**20
  assert state_bytes(tile=(7, 9, 2)) == 40 * 40 * (2 * 75_600 + 600 * 75) <= 320e6
  assert state_bytes(lse_dtype="uint8") == 40 * 40 * (75_600 + 630 * (79 + 8)) <= 320e6
  assert state_bytes(lse_cache="tile") == 40 * 40 * 630 * (2 + 79)


def test_cost_by_phase():
  layout = TileLayout((8, 8, 16), (2, 4, 4), 32)
  method = AdaSpa(sparsity=0.75)
  args = (layout, 6, 16)
  whole = 4 * layout.n**2 * 96
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
  density = np.mean([np.concatenate([a[0]["density"], a[1]["density"]]) for a in aux])
  assert got.attention_flops == pytest.approx(20 * dense.attention_flops * density)
  # Two steps, two rows, two layers of three: q k^T without the values.
  searches = 2 * 2 * dense.attention_flops * 2 / 3 / 2
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
    abstract(dict(sparsity=0.5) | fields).schedule(10)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(sparsity=1.0), "sparsity=1.0 must be at least 0 and below 1"),
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
    abstract(fields)


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
