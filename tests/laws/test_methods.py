"""Laws of every registered method, held through the attention layer of every architecture.

A new method is tested by being registered. Each method runs its phases in the order of a short
sampling run and carries its state through them; in the last one it does what it does for most of a
run. Compilations are what the laws cost, so programs and walks are shared between them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.methods.dense import Dense
from freqformer.methods.octaves import Octaves
from freqformer.methods.parts.router import RouterConfig
from freqformer.methods.registry import METHODS, method_class
from freqformer.methods.sparseflow import Schedule
from tests.methods.layers import (
  BASIS,
  DIMS,
  RAGGED,
  WAN_DIMS,
  apply,
  apply_without_attention,
  layer_of,
  tokens,
  where,
)

EVEN = TileLayout((4, 8, 16), (2, 4, 4), 32)  # 16 full tiles
ONE = TileLayout((1, 1, 1), (2, 4, 4), 32)  # one token, and padding
STEPS = 10  # of the sampling run whose phases are walked through

WHOLE = SpectralBasis("block_dct", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
# Fields that make a method sparse, yet possible, on these small grids; a method that is not named
# runs with its defaults.
SETTINGS = {
  "freqformer": [
    dict(basis=BASIS, low_op="linear", filter="qkv", mid_tiles=3, window=(1, 3, 3)),
    dict(
      basis=BASIS,
      allocation=(1, 3, 2),
      mid_tiles=5,
      sink=1,
      anchors=1,
      window=(1, 2, 2),
      deal="octant",
      filter="v",
      low_shared=True,
      summary=2,
    ),
    dict(
      basis=dataclasses.replace(BASIS, kind="dct"),
      allocation="measured",
      mid_tiles=3,
      window=(1, 2, 2),
      border="clip",
      deal="octant",
    ),
  ],
  "octaves": [
    dict(levels=2, window=(1, 3, 1), threshold=0.45, threshold_from=0.5, until=(0.5, 1.0)),
    dict(
      levels=3,
      window=(1, 1, 1),
      mid_tiles=2,
      basis="dct",
      lift="basis",
      router=RouterConfig(mode="straight_through", prior=(1, 2, 3), budget=0.1),
    ),
  ],
  "sliding_tile": [dict(window=(1, 2, 3), unit="tiles", border="clip", deal="octant", rows=16)],
  "radial": [dict(decay=0.4)],
  "block_topk": [dict(density=0.5, sink=1)],
  # One extent at all times: `cost` is then exact, not an average over t.
  "sparseflow": [dict(schedule=Schedule(frames=(1, 1)), around=(1, 2))],
  "sparse_linear": [dict(critical=0.25, negligible=0.25)],
  "adaspa": [dict(sparsity=0.5)],
}
# Fields of the first setting that differ in Wan's layer, whose norm is over all heads.
OF_WAN = {"freqformer": dict(filter="v")}
# Fields at which every query sees every key, or None if there are none.
WIDE = {
  "dense": {},
  "freqformer": dict(basis=WHOLE, allocation=(2, 2, 2), mid_tiles=99, window=(9, 9, 9)),
  "octaves": dict(levels=1),
  "sliding_tile": dict(window=(99, 99, 99)),
  "radial": dict(sink=99),
  "block_topk": dict(density=1.0, coarse="none"),
  "spatial_temporal": dict(frames=99, places=99),
  "sparseflow": dict(allocation=(6, 0), schedule=Schedule(frames=(99, 99)), around=(99, 99)),
  "sparse_linear": dict(critical=1.0, negligible=0.0),
  "adaspa": dict(sparsity=0.0),
}


def on(method, layout):
  """The method, with as many levels as the grid has."""
  if layout == ONE and isinstance(method, Octaves):
    return Octaves(levels=1)
  return method


def cases():
  """Every method in every setting, `name`, `name_2`, ..., in the layer of `VideoDiT`; in the first
  setting also in that of `WanDiT`, `name_wan`. One worker has all of a method's cases, so that what
  `usual` keeps is run once."""
  for name in METHODS:
    first, *others = (method_class(name)(**fields) for fields in SETTINGS.get(name, [{}]))
    wan = dataclasses.replace(first, **OF_WAN.get(name, {}))
    own = {name: (first, DIMS), f"{name}_wan": (wan, WAN_DIMS)}
    own |= {f"{name}_{i}": (method, DIMS) for i, method in enumerate(others, 2)}
    for case, values in own.items():
      yield pytest.param(*values, id=case, marks=pytest.mark.xdist_group(name))


every_method = pytest.mark.parametrize("method, dims", list(cases()))
on_either_grid = pytest.mark.parametrize("layout", [RAGGED, ONE], ids=["ragged", "one"])

# ---- running a layer ---------------------------------------------------------------------


def opened(method, layout=RAGGED, dims=DIMS, dtype=jnp.float32):
  """A layer whose zero-initialised gates are open, so that every part of the method matters."""
  layer = layer_of(method, layout, dims, dtype=dtype)
  graphdef, params = nnx.split(layer)
  keys = iter(jax.random.split(jax.random.key(1), 100))
  return nnx.merge(
    graphdef, jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params)
  )


def phases(method):
  """The distinct phases of a run, in order of appearance."""
  method.check_run(STEPS)
  return list(dict.fromkeys(method.phase(i, STEPS) for i in range(STEPS)))


def walk(layer, x, layout=RAGGED, times=(0.3, 0.9), warm=False, run=apply, **fields):
  """Results `(out, state, aux)` of each phase in turn, the same input in every phase; `warm`: also
  of a dense warm-up, for which two laws are enough."""
  method = layer.config
  state = method.init_state(len(times), layer.dims.for_method, layout)
  if fields.get("guided"):  # both halves have the same times
    times = (*times, *times)
    if not method.shares_state:
      state = method.init_state(len(x), layer.dims.for_method, layout)
  found = []
  for phase in phases(method):
    if phase == "warmup" and not warm:
      continue
    cond = where(times, phase=phase, **{"want_masks": True} | fields)
    args = (x, cond, layout.arrays(), method.tables(layout), state)
    found.append(run(*nnx.split(layer), *args))
    state = found[-1][1]
  return found


@functools.cache
def usual(method, layout=RAGGED, dims=DIMS):
  """A layer and its walk on random tokens, which most laws look at: run once."""
  layer = opened(method, layout, dims)
  return layer, walk(layer, tokens(layout), layout)


def training(graphdef, params, x, cond, arrays, tables, state):
  """Gradients of a loss with the layer's aux by parameters and input, the loss and aux."""

  def loss(params, x):
    out, _, aux = nnx.merge(graphdef, params)(x, cond, arrays, tables, state)
    return (arrays.unpack(out) ** 2).sum() + aux["loss"], aux

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def arguments(layer, x, layout=RAGGED):
  """Returns the arguments of `training`."""
  method = layer.config
  cond = where(train=True, rng=jax.random.key(0))
  state = method.init_state(len(x), layer.dims.for_method, layout)
  return *nnx.split(layer), x, cond, layout.arrays(), method.tables(layout), state


# ---- laws --------------------------------------------------------------------------------


@functools.cache
def dense_output(layout, dims=DIMS):
  return walk(layer_of(Dense(), layout, dims), tokens(layout), layout)[0][0]


def check_dense(name, layout=RAGGED, dims=DIMS, **fields):
  layer = layer_of(method_class(name)(**WIDE[name] | fields), layout, dims, implementation=None)
  for out, _, aux in walk(layer, tokens(layout), layout, warm=True, want_masks=False):
    np.testing.assert_allclose(out, dense_output(layout, dims), atol=2e-5)
    np.testing.assert_allclose(aux["density"], 1, rtol=1e-5)
    assert "mask" not in aux  # it comes only when asked for


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dims", [DIMS, WAN_DIMS], ids=["dit", "wan"])
def test_density_one_is_dense(name, dims):
  assert name in WIDE, f"say in WIDE which fields give {name} density 1, or None if nothing does"
  if WIDE[name] is not None:
    check_dense(name, dims=dims)


@pytest.mark.parametrize("kind, layout", [("block_dct", EVEN), ("dct", RAGGED), ("haar", RAGGED)])
def test_all_bands_of_any_basis_are_dense_attention(kind, layout):
  """With one class of tiles, which only `block_dct` knows, coarse tokens keep their order."""
  check_dense("freqformer", layout, basis=dataclasses.replace(WHOLE, kind=kind))


@every_method
@on_either_grid
def test_shapes_densities_and_masks(method, dims, layout):
  for out, _, aux in usual(on(method, layout), layout, dims)[1]:
    assert out.shape == (2, layout.n, DIMS.width) and out.dtype == jnp.float32
    assert np.isfinite(out).all()
    assert aux["density"].shape == (2, DIMS.heads)
    assert aux["cost"].shape == () and aux["loss"].shape == ()
    mask = jax.tree.map(np.asarray, aux["mask"]).check()
    density = np.broadcast_to(mask.density(layout.n), (2, DIMS.heads))
    np.testing.assert_allclose(density + aux.get("coarse_density", 0), aux["density"], rtol=1e-5)


@every_method
def test_guidance_shares_masks_and_bfloat16_rounds(method, dims):
  """The conditional half is what it is alone, up to bfloat16, and the other half has its masks."""
  x = jnp.concatenate([tokens(), tokens(seed=6)]).astype(jnp.bfloat16)
  guided = walk(opened(method, RAGGED, dims, jnp.bfloat16), x, guided=True)
  for (want, _, _), (out, _, aux) in zip(usual(method, RAGGED, dims)[1], guided, strict=True):
    assert out.dtype == jnp.bfloat16
    # A tile more or less may be selected, a head dealt otherwise: this says that nothing overflows
    # or is lost, no more.
    error = np.linalg.norm(out[:2].astype(jnp.float32) - want) / np.linalg.norm(want)
    assert error < 0.2
    routed = [aux[key] for key in ("probs", "choice") if key in aux]
    for leaf in (aux["mask"].kv_indices, aux["mask"].kv_counts, aux["density"], *routed):
      if leaf.shape[0] == 4:
        np.testing.assert_array_equal(leaf[:2], leaf[2:])


def soiled(x, layout):
  return jnp.where(layout.arrays().valid[:, None], x, 1e4)


@every_method
@on_either_grid
def test_padding_rows_change_nothing(method, dims, layout):
  layer, found = usual(on(method, layout), layout, dims)
  for clean, dirty in zip(found, walk(layer, soiled(tokens(layout), layout), layout), strict=True):
    np.testing.assert_allclose(clean[0], dirty[0], atol=1e-5)
    np.testing.assert_allclose(clean[2]["density"], dirty[2]["density"])


@every_method
def test_padding_rows_change_no_gradient(method, dims):
  layer = usual(method, RAGGED, dims)[0]
  run = jax.jit(training, static_argnums=0)
  results = [run(*arguments(layer, x)) for x in (tokens(), soiled(tokens(), RAGGED))]
  assert "mask" not in results[0][0][1] and "density" in results[0][0][1]
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_tables_may_be_constants(name):
  """A model that is called without jit traces its layers, but not its NumPy tables."""
  graphdef, params, x, *rest = arguments(
    opened(method_class(name)(**SETTINGS.get(name, [{}])[0])), tokens()
  )
  traced = jax.eval_shape(lambda params, x: training(graphdef, params, x, *rest), params, x)
  assert jax.tree.map(jnp.shape, traced[1]) == jax.tree.map(jnp.shape, (params, x))


@every_method
def test_a_sample_does_not_see_its_batch_and_one_compile_serves_all_inputs(method, dims):
  layer, found = usual(method, RAGGED, dims)
  compiled = apply._cache_size()
  other = tokens().at[1].set(tokens(seed=5)[1])
  for (a, _, _), (b, _, _) in zip(found, walk(layer, other), strict=True):
    np.testing.assert_array_equal(a[0], b[0])
  walk(layer, tokens(seed=4), times=(0.03, 0.09))
  assert apply._cache_size() == compiled


@every_method
def test_cost_is_what_runs(method, dims):
  """Holds in the first and the last step on tiles of equal length; a method whose heads differ is
  told what each sample chose."""
  how = dict(warm=True, want_masks=False, run=apply_without_attention)
  walked = walk(opened(method, EVEN, dims), tokens(EVEN), EVEN, **how)
  found = dict(zip(phases(method), walked, strict=True))
  last = method.phase(STEPS - 1, STEPS)
  for phase in {method.phase(0, STEPS), last}:
    aux = found[phase][2]
    for i in range(2):
      allocation = None
      if "kept" in aux:
        allocation = np.asarray(aux["kept"][i], np.float64).mean(0)
      elif "choice" in aux:
        allocation = np.bincount(
          np.asarray(aux["choice"][i]), minlength=max(2, len(method.branches))
        )
      pairs = method.pairs(EVEN, DIMS.heads, allocation, phase).pairs
      ran = EVEN.n**2 * float(aux["density"][i].sum())
      np.testing.assert_allclose(pairs, ran, rtol=1e-5)
  assert method.usual_phase == last
