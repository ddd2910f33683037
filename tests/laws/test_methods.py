"""Laws of every registered method, held through the whole attention layer. A new method is tested by being registered.

Each method runs its phases in the order of a short sampling run and carries its state through them; in the last one it does
what it does for most of a run.
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
from freqformer.methods.base import Cond
from freqformer.methods.dense import Dense
from freqformer.methods.registry import METHODS, method_class
from freqformer.methods.sparseflow import Schedule
from freqformer.model.attention import AttentionDims, SpectralAttention

EVEN = TileLayout((4, 8, 16), (2, 4, 4), 32)  # 16 full tiles
RAGGED = TileLayout((5, 6, 9), (2, 4, 4), 32)  # 18 tiles of 32 to 2 tokens
LITTLE = TileLayout(
  (3, 5, 9), (2, 4, 4), 32
)  # 12 tiles; large enough for every band to hold something
SMALL = TileLayout.fit((1, 2, 3), 32)  # one tile, mostly padding
DIMS = AttentionDims(48, 6, 8)
STEPS = 10  # of the sampling run whose phases are walked through

BASIS = SpectralBasis("block_dct", (0.5, 0.5, 0.5), (0.75, 0.75, 0.75))
WHOLE = SpectralBasis("block_dct", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
# Fields that make a method sparse, yet possible, on these small grids; a method that is not named runs with its defaults.
SETTINGS = {
  "freqformer": [
    dict(basis=BASIS, mid_tiles=3, window=(1, 2, 2)),
    dict(basis=BASIS, allocation=(1, 3, 2), mid_tiles=3, window=(1, 2, 2), low_shared=True),
    dict(basis=BASIS, allocation="measured", mid_tiles=3, window=(1, 2, 2)),
    dict(basis=BASIS, low_op="linear", mid_tiles=3, window=(1, 2, 2)),
  ],
  "sliding_tile": [
    dict(window=(2, 8, 8)),
    dict(window=(1, 2, 3), unit="tiles", border="clip", rows=16),
  ],
  "radial": [dict(decay=0.4)],
  "block_topk": [dict(density=0.5, coarse="none"), dict(density=0.5, sink=1)],
  # One extent at all times: `cost` is then exact, not an average over t.
  "sparseflow": [
    dict(schedule=Schedule(frames=(1, 1)), around=(1, 2)),
    dict(schedule=Schedule(frames=(2, 2)), allocation=(2, 4)),
  ],
  "sparse_linear": [dict(critical=0.25, negligible=0.25)],
  "adaspa": [dict(sparsity=0.5)],
}
# Fields at which every query sees every key, or why there are none.
WIDE = {
  "dense": {},
  "freqformer": dict(basis=WHOLE, allocation=(2, 2, 2), mid_tiles=99, window=(9, 9, 9)),
  "sliding_tile": dict(window=(99, 99, 99)),
  "radial": dict(sink=99),
  "block_topk": dict(density=1.0, coarse="none"),
  "spatial_temporal": dict(frames=99, places=99),
  "sparseflow": dict(allocation=(6, 0), schedule=Schedule(frames=(99, 99)), around=(99, 99)),
  "sparse_linear": dict(critical=1.0, negligible=0.0),
  "adaspa": dict(sparsity=0.0),
}


def cases():
  """Every method in every setting: `name`, `name_2`, ... One worker has them all, so that what `usual` keeps is run once."""
  for name in METHODS:
    for i, fields in enumerate(SETTINGS.get(name, [{}])):
      yield pytest.param(
        method_class(name)(**fields),
        id=f"{name}_{i + 1}" if i else name,
        marks=pytest.mark.xdist_group(name),
      )


every_method = pytest.mark.parametrize("method", list(cases()))

# ---- running a layer -----------------------------------------------------------------------------------------------------


def layer_of(method, layout=EVEN, dtype=jnp.float32):
  """A layer whose zero-initialised gates are open, so that every part of the method matters."""
  # The reference backend compiles fastest; backends are held to it elsewhere.
  layer = SpectralAttention(
    DIMS, method, layout, nnx.Rngs(0), dtype=dtype, implementation="reference"
  )
  graphdef, params = nnx.split(layer)
  keys = iter(jax.random.split(jax.random.key(1), 100))
  return nnx.merge(
    graphdef, jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params)
  )


def tokens(layout=EVEN, b=2, seed=0):
  x = np.random.default_rng(seed).standard_normal((b, layout.n, DIMS.width)).astype(np.float32)
  return layout.arrays().pack(x)


def where(b=2, **fields):
  time = jnp.full(b, 0.4) if fields.get("guided") else jnp.linspace(0.3, 0.9, b)
  return Cond(time, jnp.stack([jnp.sin(time * k) for k in range(1, 9)], -1), **fields)


def phases(method):
  """The distinct phases of a run, in order of appearance."""
  method.check_run(STEPS)
  return list(dict.fromkeys(method.phase(i, STEPS) for i in range(STEPS)))


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, params, x, cond, arrays, tables, state):
  out, state, aux = nnx.merge(graphdef, params)(x, cond, arrays, tables, state)
  return arrays.unpack(out), state, aux


def walk(layer, x, layout=EVEN, phase_of=apply, **fields):
  """Results `(out, state, aux)` of each phase in turn, the same input in every phase."""
  method, b, found = layer.config, x.shape[0], []
  halves = 2 if fields.get("guided") and method.shares_state else 1
  state = method.init_state(b // halves, DIMS.for_method, layout)
  for phase in phases(method):
    cond = where(b, phase=phase, **{"want_masks": True} | fields)
    found.append(
      phase_of(*nnx.split(layer), x, cond, layout.arrays(), method.tables(layout), state)
    )
    state = found[-1][1]
  return found


@functools.cache
def usual(method, layout=EVEN):
  """What most laws look at, run once: a layer and its walk on the same random tokens."""
  layer = layer_of(method, layout)
  return layer, walk(layer, tokens(layout), layout)


@functools.partial(jax.jit, static_argnums=(0, 1))
def grads(graphdef, layout, params, x, cond, arrays, tables, state):
  """Loss and its gradients by parameters and input."""

  def loss(params, x):
    out, _, aux = nnx.merge(graphdef, params)(x, cond, arrays, tables, state)
    return (arrays.unpack(out) ** 2).sum() + aux["loss"]

  return jax.value_and_grad(loss, argnums=(0, 1))(params, x)


def training_grads(layer, x, layout, run=grads):
  """`grads` in training mode."""
  method, b = layer.config, x.shape[0]
  graphdef, params = nnx.split(layer)
  cond, state = (
    where(b, train=True, rng=jax.random.key(0)),
    method.init_state(b, DIMS.for_method, layout),
  )
  return jax.tree.leaves(
    run(graphdef, layout, params, x, cond, layout.arrays(), method.tables(layout), state)
  )


# ---- laws ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layout", [EVEN, RAGGED], ids=["even", "ragged"])
def test_density_one_is_dense(name, layout):
  assert name in WIDE, f"say in WIDE which fields give {name} density 1, or None if nothing does"
  if WIDE[name] is None:
    return
  layer = SpectralAttention(DIMS, method_class(name)(**WIDE[name]), layout, nnx.Rngs(0))
  dense = SpectralAttention(DIMS, Dense(), layout, nnx.Rngs(1))
  for part in ("qkv", "out", "q_norm", "k_norm"):
    nnx.update(getattr(dense, part), nnx.state(getattr(layer, part)))
  want = walk(dense, tokens(layout), layout)[0][0]
  for out, _, aux in walk(layer, tokens(layout), layout):
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(aux["density"], 1, rtol=1e-5)


@every_method
@pytest.mark.parametrize("layout", [EVEN, RAGGED, SMALL], ids=["even", "ragged", "small"])
def test_shapes_densities_and_masks(method, layout):
  for out, _, aux in usual(method, layout)[1]:
    assert (
      out.shape == (2, layout.n, DIMS.width) and out.dtype == jnp.float32 and np.isfinite(out).all()
    )
    assert aux["density"].shape == (2, DIMS.heads)
    assert aux["cost"].shape == () and aux["loss"].shape == ()
    mask, coarse = jax.tree.map(np.asarray, aux["mask"]).check(), aux.get("coarse_density", 0)
    np.testing.assert_allclose(
      np.broadcast_to(mask.density(layout.n), (2, DIMS.heads)) + coarse, aux["density"], rtol=1e-5
    )


@every_method
def test_masks_come_only_when_asked_for(method):
  def shapes(graphdef, *args):
    return jax.eval_shape(functools.partial(apply, graphdef), *args)

  for _, _, aux in walk(layer_of(method), tokens(), phase_of=shapes, want_masks=False):
    assert "mask" not in aux and "density" in aux


@every_method
def test_bfloat16(method):
  rough = walk(layer_of(method, dtype=jnp.bfloat16), tokens().astype(jnp.bfloat16))
  for (want, _, _), (out, _, _) in zip(usual(method)[1], rough, strict=True):
    assert out.dtype == jnp.bfloat16
    # A tile more or less may be selected, a head dealt otherwise: this says that nothing overflows or is lost, no more.
    error = np.linalg.norm(out.astype(jnp.float32) - want) / np.linalg.norm(want)
    assert error < 0.2


@every_method
@pytest.mark.parametrize("layout", [RAGGED, SMALL], ids=["ragged", "small"])
def test_padding_rows_change_nothing(method, layout):
  layer, found = usual(method, layout)
  x = tokens(layout)
  dirty = jnp.where(layout.arrays().valid[:, None], x, 1e4)
  for clean, soiled in zip(found, walk(layer, dirty, layout), strict=True):
    np.testing.assert_allclose(clean[0], soiled[0], atol=1e-5)
    np.testing.assert_allclose(clean[2]["density"], soiled[2]["density"])
  for a, b in zip(*(training_grads(layer, y, layout) for y in (x, dirty)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@every_method
def test_gradients_are_finite(method):
  for grad in training_grads(usual(method, RAGGED)[0], tokens(RAGGED), RAGGED):
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", METHODS)
def test_gradients_do_not_need_jit(name):
  method = method_class(name)(**SETTINGS.get(name, [{}])[0])
  layer, x = layer_of(method, LITTLE), tokens(LITTLE)
  compiled, plain = (training_grads(layer, x, LITTLE, run) for run in (grads, grads.__wrapped__))
  for a, b in zip(compiled, plain, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@every_method
def test_a_sample_does_not_see_its_batch(method):
  layer, found = usual(method)
  other = tokens().at[1].set(tokens(seed=5)[1])
  for (a, _, _), (b, _, _) in zip(found, walk(layer, other), strict=True):
    np.testing.assert_array_equal(a[0], b[0])


@every_method
def test_both_halves_of_guidance_share_masks(method):
  for _, _, aux in walk(layer_of(method), tokens(b=4), guided=True):
    for leaf in (aux["mask"].kv_indices, aux["mask"].kv_counts, aux["density"]):
      if leaf.shape[0] == 4:
        np.testing.assert_array_equal(leaf[:2], leaf[2:])


@every_method
def test_cost_is_what_runs(method):
  """Of the first and last step, on tiles of equal length; a method whose heads differ is told what each sample chose."""
  found, last = (
    dict(zip(phases(method), usual(method)[1], strict=True)),
    method.phase(STEPS - 1, STEPS),
  )
  for phase in {method.phase(0, STEPS), last}:
    aux = found[phase][2]
    for i in range(2):
      allocation = None
      if "choice" in aux:
        allocation = np.bincount(
          np.asarray(aux["choice"][i]), minlength=max(2, len(method.branches))
        )
      pairs = method.pairs(EVEN, DIMS.heads, allocation, phase).pairs
      ran = EVEN.n**2 * float(aux["density"][i].sum())
      np.testing.assert_allclose(pairs, ran, rtol=1e-5)
  assert method.usual_phase == last


@every_method
def test_one_compile_for_two_inputs(method):
  layer, _ = usual(method)
  compiled = apply._cache_size()
  walk(layer, tokens(seed=3))

  def cond(*args):
    return apply(*args[:3], dataclasses.replace(args[3], time=args[3].time * 0.1), *args[4:])

  walk(layer, tokens(seed=4), phase_of=cond)
  assert apply._cache_size() == compiled
