"""Laws of every registered method, held through the whole attention layer.

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
from freqformer.methods.base import Cond
from freqformer.methods.dense import Dense
from freqformer.methods.registry import METHODS, method_class
from freqformer.methods.sparseflow import Schedule
from freqformer.model.attention import AttentionDims, SpectralAttention

EVEN = TileLayout((4, 8, 16), (2, 4, 4), 32)  # 16 full tiles
RAGGED = TileLayout((5, 6, 9), (2, 4, 4), 32)  # 18 tiles of 32 to 2 tokens
PAIR = TileLayout((2, 4, 8), (2, 4, 4), 32)  # the fewest tiles whose every band holds something
SMALL = TileLayout.fit((1, 2, 3), 32)  # one tile, mostly padding
DIMS = AttentionDims(48, 6, 8)
STEPS = 10  # of the sampling run whose phases are walked through

BASIS = SpectralBasis("block_dct", (0.5, 0.5, 0.5), (0.75, 0.75, 0.75))
WHOLE = SpectralBasis("block_dct", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
# Fields that make a method sparse, yet possible, on these small grids; a method that is not named
# runs with its defaults.
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
# Fields at which every query sees every key, or None if there are none.
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
  """Every method in every setting: `name`, `name_2`, ... One worker has all of a method's cases, so
  that what `usual` keeps is run once."""
  for name in METHODS:
    for i, fields in enumerate(SETTINGS.get(name, [{}])):
      yield pytest.param(
        method_class(name)(**fields),
        id=f"{name}_{i + 1}" if i else name,
        marks=pytest.mark.xdist_group(name),
      )


every_method = pytest.mark.parametrize("method", list(cases()))
on_every_grid = pytest.mark.parametrize(
  "layout", [EVEN, RAGGED, SMALL], ids="even ragged small".split()
)

# ---- running a layer ---------------------------------------------------------------------


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
  """The moment of each sample; both halves of guidance have the same times."""
  halves = 2 if fields.get("guided") else 1
  time = jnp.tile(jnp.linspace(0.3, 0.9, b // halves), halves)
  return Cond(time, jnp.stack([jnp.sin(time * k) for k in range(1, 9)], -1), **fields)


def phases(method):
  """The distinct phases of a run, in order of appearance."""
  method.check_run(STEPS)
  return list(dict.fromkeys(method.phase(i, STEPS) for i in range(STEPS)))


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, params, x, cond, arrays, tables, state):
  out, state, aux = nnx.merge(graphdef, params)(x, cond, arrays, tables, state)
  return arrays.unpack(out), state, aux


def walk(layer, x, layout=EVEN, times=1.0, **fields):
  """Results `(out, state, aux)` of each phase in turn, the same input in every phase."""
  method = layer.config
  b = x.shape[0]
  fields = {"want_masks": True} | fields
  halves = 2 if fields.get("guided") and method.shares_state else 1
  state = method.init_state(b // halves, DIMS.for_method, layout)
  found = []
  for phase in phases(method):
    cond = where(b, phase=phase, **fields)
    cond = dataclasses.replace(cond, time=cond.time * times)
    args = (x, cond, layout.arrays(), method.tables(layout), state)
    found.append(apply(*nnx.split(layer), *args))
    state = found[-1][1]
  return found


@functools.cache
def usual(method, layout=EVEN):
  """A layer and its walk on random tokens, which most laws look at: run once."""
  layer = layer_of(method, layout)
  return layer, walk(layer, tokens(layout), layout)


@functools.partial(jax.jit, static_argnums=(0, 1))
def grads(graphdef, layout, params, x, cond, arrays, tables, state):
  """Loss with the layer's aux, and its gradients by parameters and input."""

  def loss(params, x):
    out, _, aux = nnx.merge(graphdef, params)(x, cond, arrays, tables, state)
    return (arrays.unpack(out) ** 2).sum() + aux["loss"], aux

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def training_grads(layer, x, layout, run=grads):
  """Loss and gradients in training mode, as a list of arrays; the aux holds no mask."""
  method = layer.config
  b = x.shape[0]
  cond = where(b, train=True, rng=jax.random.key(0))
  graphdef, params = nnx.split(layer)
  state = method.init_state(b, DIMS.for_method, layout)
  (loss, aux), found = run(
    graphdef, layout, params, x, cond, layout.arrays(), method.tables(layout), state
  )
  assert "mask" not in aux and "density" in aux
  return jax.tree.leaves((loss, found))


# ---- laws --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_density_one_is_dense(name, layout=RAGGED):
  assert name in WIDE, f"say in WIDE which fields give {name} density 1, or None if nothing does"
  if WIDE[name] is None:
    return
  layer = SpectralAttention(DIMS, method_class(name)(**WIDE[name]), layout, nnx.Rngs(0))
  dense = SpectralAttention(DIMS, Dense(), layout, nnx.Rngs(1))
  for part in ("qkv", "out", "q_norm", "k_norm"):
    nnx.update(getattr(dense, part), nnx.state(getattr(layer, part)))
  want = walk(dense, tokens(layout), layout)[0][0]
  for out, _, aux in walk(layer, tokens(layout), layout, want_masks=False):
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(aux["density"], 1, rtol=1e-5)
    assert "mask" not in aux  # it comes only when asked for


def test_all_bands_are_dense_attention_on_full_tiles_too():
  """With one class of tiles, coarse tokens keep their order."""
  test_density_one_is_dense("freqformer", EVEN)


@every_method
@on_every_grid
def test_shapes_densities_and_masks(method, layout):
  for out, _, aux in usual(method, layout)[1]:
    assert out.shape == (2, layout.n, DIMS.width) and out.dtype == jnp.float32
    assert np.isfinite(out).all()
    assert aux["density"].shape == (2, DIMS.heads)
    assert aux["cost"].shape == () and aux["loss"].shape == ()
    mask = jax.tree.map(np.asarray, aux["mask"]).check()
    density = np.broadcast_to(mask.density(layout.n), (2, DIMS.heads))
    np.testing.assert_allclose(density + aux.get("coarse_density", 0), aux["density"], rtol=1e-5)


@every_method
def test_guidance_shares_masks_and_bfloat16_rounds(method):
  """The conditional half is what it is alone, up to bfloat16, and the other half has its masks."""
  x = jnp.concatenate([tokens(), tokens(seed=6)]).astype(jnp.bfloat16)
  guided = walk(layer_of(method, dtype=jnp.bfloat16), x, guided=True)
  for (want, _, _), (out, _, aux) in zip(usual(method)[1], guided, strict=True):
    assert out.dtype == jnp.bfloat16
    # A tile more or less may be selected, a head dealt otherwise: this says that nothing overflows
    # or is lost, no more.
    error = np.linalg.norm(out[:2].astype(jnp.float32) - want) / np.linalg.norm(want)
    assert error < 0.2
    routed = [aux[key] for key in ("probs", "choice") if key in aux]
    for leaf in (aux["mask"].kv_indices, aux["mask"].kv_counts, aux["density"], *routed):
      if leaf.shape[0] == 4:
        np.testing.assert_array_equal(leaf[:2], leaf[2:])


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
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_do_not_need_jit(name):
  """On a small grid: each operation is compiled by itself, which is slow."""
  layer = layer_of(method_class(name)(**SETTINGS.get(name, [{}])[0]), PAIR)
  x = tokens(PAIR)
  compiled, plain = (training_grads(layer, x, PAIR, run) for run in (grads, grads.__wrapped__))
  for a, b in zip(compiled, plain, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@every_method
def test_a_sample_does_not_see_its_batch_and_one_compile_serves_all_inputs(method):
  layer, found = usual(method)
  compiled = apply._cache_size()
  other = tokens().at[1].set(tokens(seed=5)[1])
  for (a, _, _), (b, _, _) in zip(found, walk(layer, other), strict=True):
    np.testing.assert_array_equal(a[0], b[0])
  walk(layer, tokens(seed=4), times=0.1)
  assert apply._cache_size() == compiled


@every_method
def test_cost_is_what_runs(method):
  """Holds in the first and the last step on tiles of equal length; a method whose heads differ is
  told what each sample chose."""
  found = dict(zip(phases(method), usual(method)[1], strict=True))
  last = method.phase(STEPS - 1, STEPS)
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
