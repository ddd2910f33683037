"""SparseFlow: its temporal table, its schedule over the timestep, its linear path, its router."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.config import ConfigError
from freqformer.cost import layer_cost
from freqformer.grid.layout import TileLayout
from freqformer.grid.rotary import rotate
from freqformer.methods.base import Cond
from freqformer.methods.parts.router import RouterConfig
from freqformer.methods.sparseflow import Schedule, SparseFlow, temporal, variance_shares
from freqformer.model.attention import AttentionDims, SpectralAttention
from freqformer.model.dit import KEPT
from freqformer.tables.topk import anchor_frames
from tests.methods.method_training import trains
from tools import offline

LAYOUT = TileLayout.fit((9, 6, 9), 32, tile=(2, 4, 4))  # ragged on every axis: 5 x 2 x 3 tiles
DIMS = AttentionDims(48, 6, 8)
PRIOR = (0.6, 0.4)


def where(**kwargs):
  time = jnp.asarray(kwargs.pop("time", [0.3, 0.9]))
  return Cond(time, jnp.stack([jnp.sin(time * k) for k in range(1, 9)], -1), **kwargs)


def layer_of(method, layout=LAYOUT):
  return SpectralAttention(DIMS, method, layout, nnx.Rngs(0))


def tokens(layout=LAYOUT, seed=0):
  x = np.random.default_rng(seed).standard_normal((2, layout.n, DIMS.width)).astype(np.float32)
  return layout.arrays().pack(x)


@nnx.jit
def _apply(layer, x, cond, arrays, tables):
  out, _, aux = layer(x, cond, arrays, tables, {})
  return arrays.unpack(out), aux


def run(layer, x, cond=None, layout=LAYOUT):
  return _apply(
    layer, x, where() if cond is None else cond, layout.arrays(), layer.config.tables(layout)
  )


def hard(layer, choice):
  """Sets the router's logits so that p is one-hot at `choice` [h]."""
  layer.method.router.bias[...] = 200.0 * jax.nn.one_hot(jnp.asarray(choice), 2)
  return layer


def heads_of(layer, x, cond=None):
  """Head outputs before the out projection, `[b, n, h, d]`."""
  twin = nnx.clone(layer)
  twin.out.kernel[...], twin.out.bias[...] = jnp.eye(48), jnp.zeros(48)
  return run(twin, x, cond)[0].reshape(2, LAYOUT.n, 6, 8)


# ---- the table and its schedule --------------------------------------------------------


@pytest.mark.parametrize("anchors", [0, 1, 2, 9])
@pytest.mark.parametrize("frames", [1, 2, 3, 9])
def test_the_window_covers_itself_its_neighbours_and_the_anchors(frames, anchors):
  mask = temporal(LAYOUT, frames, (1, 2), anchors).check()
  t, y, x = np.unravel_index(np.arange(LAYOUT.tiles), LAYOUT.tile_grid)
  listed = mask.to_tiles()[0, 0]
  assert listed.diagonal().all()
  seen = np.array([[listed[np.ix_(t == i, t == j)].any() for j in range(5)] for i in range(5)])
  start = np.clip(np.arange(5) - frames // 2, 0, max(5 - frames, 0))
  want = (np.arange(5) >= start[:, None]) & (np.arange(5) < start[:, None] + frames)
  want[:, anchor_frames(5, anchors)] = True
  np.testing.assert_array_equal(seen, want)
  assert (seen[:, 0]).all() == (anchors > 0 or frames >= 5)
  # Of each frame seen: 1 x 2 tiles around the own place.
  np.testing.assert_array_equal(listed.sum(1), 2 * seen[t].sum(1))
  assert not listed[(y[:, None] != y) | (np.abs(x[:, None] - x) > 1)].any()


def test_levels_are_nested():
  tiles = np.stack([temporal(LAYOUT, f, (2, 2), 1).to_tiles()[0, 0] for f in range(1, 6)])
  assert (tiles[1:] >= tiles[:-1]).all() and (tiles.sum((1, 2))[1:] > tiles.sum((1, 2))[:-1]).all()


@pytest.mark.parametrize("shape", ["linear", "cosine", "step"])
@pytest.mark.parametrize("direction", ["sparse_early", "dense_early"])
def test_density_is_monotone_in_the_configured_direction(direction, shape):
  method = SparseFlow(schedule=Schedule((1, 4), direction, shape), allocation=(6, 0), around=(1, 1))
  time, traces = np.linspace(1, 0, 21, dtype=np.float32), []
  tables = method.tables(LAYOUT)

  @jax.jit
  def density(tables, time):
    traces.append(None)
    return method.mask_at(tables, time[None]).density(LAYOUT.n)[0, 0]

  found = np.array([density(tables, t) for t in time])
  assert len(traces) == 1
  step = np.diff(found) * (1 if direction == "sparse_early" else -1)
  assert (step >= 0).all() and len(np.unique(found)) == (2 if shape == "step" else 4)
  ends = [temporal(LAYOUT, frames, (1, 1), 1).density(LAYOUT.n).item() for frames in (1, 4)]
  if direction == "dense_early":
    ends.reverse()
  np.testing.assert_allclose((found[0], found[-1]), ends, rtol=1e-6)


def test_each_sample_runs_at_its_own_time():
  layer, x = layer_of(SparseFlow(allocation=(6, 0))), tokens()
  both, aux = run(layer, x, where(time=[0.1, 0.95]))
  assert float(aux["density"][0, 0]) > float(aux["density"][1, 0])
  for i, t in enumerate((0.1, 0.95)):
    np.testing.assert_allclose(both[i], run(layer, x, where(time=[t, t]))[0][i], atol=1e-5)


# ---- the linear path -------------------------------------------------------------------


@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_a_linear_head_is_the_dense_form_within_its_frame(feature_map):
  layer = layer_of(SparseFlow(allocation=(0, 6), feature_map=feature_map))
  arrays = LAYOUT.arrays()
  x = tokens()
  got = heads_of(layer, x)
  q, k, v = jnp.unstack(layer.qkv(arrays.unpack(x)).reshape(2, LAYOUT.n, 3, 6, 8), axis=2)
  position = np.stack(np.unravel_index(np.arange(LAYOUT.n), LAYOUT.grid), -1).astype(np.float32)
  phi = {"softmax": jax.nn.softmax, "elu": lambda a: jnp.where(a > 0, a + 1, jnp.exp(a))}[
    feature_map
  ]
  q = phi(rotate(layer.q_norm(q), position))
  k = phi(rotate(layer.k_norm(k), position))
  same = position[:, 0][:, None] == position[:, 0]
  scores = jnp.einsum("bihd,bjhd->bhij", q, k) * same
  want = jnp.einsum("bhij,bjhd->bihd", scores / scores.sum(-1, keepdims=True), v)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_hard_linear_head_lists_no_tile():
  layer = hard(layer_of(SparseFlow()), [0, 1, 0, 1, 1, 1])
  _, aux = run(layer, tokens(), where(want_masks=True))
  counts = np.asarray(aux["mask"].kv_counts)
  assert counts.shape == (2, 6, LAYOUT.tiles)
  assert (counts[:, [1, 3, 4, 5]] == 0).all() and (counts[:, [0, 2]] > 0).all()
  np.testing.assert_allclose(aux["density"], aux["mask"].density(LAYOUT.n), rtol=1e-6)
  assert (aux["density"][:, [1, 3, 4, 5]] == 0).all()


# ---- the router ------------------------------------------------------------------------


def test_hard_equals_soft_with_one_hot_gates():
  layer = hard(layer_of(SparseFlow()), [0, 1, 1, 0, 1, 0])
  out, aux = run(layer, tokens())
  soft, soft_aux = run(layer, tokens(), where(soft_evaluation=True))
  np.testing.assert_allclose(out, soft, atol=2e-5)
  assert aux["choice"][0].tolist() == [0, 1, 1, 0, 1, 0]
  assert float(aux["cost"]) < float(soft_aux["cost"])
  fixed = layer_of(SparseFlow(allocation=(3, 3)))
  for name in ("qkv", "out", "q_norm", "k_norm"):
    nnx.update(getattr(fixed, name), nnx.state(getattr(layer, name)))
  routed, _ = run(hard(layer, [0, 0, 0, 1, 1, 1]), tokens())
  np.testing.assert_allclose(routed, run(fixed, tokens())[0], atol=2e-5)


@pytest.mark.parametrize("mode", ["soft", "straight_through"])
def test_router_gradient_through_the_layer(mode):
  """d loss / d logits = softmax' of <dY, Y_b>, with Y_b taken from layers fixed to one branch."""
  method = SparseFlow(
    router=RouterConfig(mode=mode, penalty=0.0, temperature=(1.0, 1.0), prior=PRIOR)
  )
  layer, x = layer_of(method), tokens()
  dy = jnp.asarray(np.random.default_rng(5).standard_normal((2, LAYOUT.n, DIMS.width)), jnp.float32)

  def loss(bias):
    twin = nnx.clone(layer)
    twin.method.router.bias[...] = bias
    arrays = LAYOUT.arrays()
    out, _, _ = twin(x, where(train=True), arrays, method.tables(LAYOUT), {})
    return (arrays.unpack(out) * dy).sum()

  got = jax.jit(jax.grad(loss))(layer.method.router.bias[...])
  probs, kernel = run(layer, x)[1]["probs"], layer.out.kernel[...].reshape(6, 8, 48)

  def branch(i):
    return jnp.einsum("bnhd,hdw,bnw->bh", heads_of(hard(nnx.clone(layer), [i] * 6), x), kernel, dy)

  value = jnp.stack([branch(0), branch(1)], -1)
  want = (probs * (value - (probs * value).sum(-1, keepdims=True))).sum(0)
  np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
  assert np.abs(want).max() > 0.1


def test_rematerialisation_changes_no_gradient():
  layer = layer_of(SparseFlow(router=RouterConfig(mode="sampled", prior=PRIOR)))
  graphdef, params = nnx.split(layer)

  def loss(params, x):
    cond = where(train=True, rng=jax.random.key(3))
    arrays = LAYOUT.arrays()
    tables = layer.config.tables(LAYOUT)
    out, _, aux = nnx.merge(graphdef, params)(x, cond, arrays, tables, {})
    return (arrays.unpack(out) ** 2).sum() + aux["loss"]

  kept = jax.checkpoint(loss, policy=jax.checkpoint_policies.save_only_these_names(*KEPT))
  whole, again = (jax.jit(jax.grad(f))(params, tokens()) for f in (loss, kept))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, again)


def test_variance_shares_are_the_parts_of_the_variance():
  x = np.random.default_rng(0).standard_normal((2, LAYOUT.n, 3, 8)).astype(np.float32)
  got = variance_shares(LAYOUT.arrays().pack(x), LAYOUT.arrays())
  np.testing.assert_allclose(
    got.sum(-1), ((x - x.mean(1, keepdims=True)) ** 2).sum(-1).mean(1), rtol=1e-4
  )
  whole = (2, 9, 54, 3, 8)  # 9 frames of 54 places
  still = np.broadcast_to(x[:, :54].reshape(2, 1, 54, 3, 8), whole).reshape(x.shape)
  moving = np.broadcast_to(x[:, :9].reshape(2, 9, 1, 3, 8), whole).reshape(x.shape)
  still = variance_shares(LAYOUT.arrays().pack(still), LAYOUT.arrays())
  moving = variance_shares(LAYOUT.arrays().pack(moving), LAYOUT.arrays())
  assert (still[..., 1] < 1e-6 * still.sum(-1)).all() and (still[..., 2] > 0).all()
  assert (moving[..., 2] < 1e-6 * moving.sum(-1)).all() and (moving[..., 1] > 0).all()


# ---- cost, training, refusals ----------------------------------------------------------


def test_cost_is_what_runs_over_all_times():
  method = SparseFlow(schedule=Schedule((1, 4), shape="cosine"), allocation=(4, 2))
  layer, x = layer_of(method), tokens()
  time = (np.arange(64) + 0.5).reshape(-1, 2) / 64
  density = np.mean(
    [
      np.asarray(run(layer, x, where(time=t.astype(np.float32)))[1]["density"]).mean(0).sum()
      for t in time
    ]
  )
  cost = layer_cost(method, LAYOUT, 6, 8)
  np.testing.assert_allclose(cost.attention_flops, 4 * 8 * density * LAYOUT.n**2, rtol=0.02)
  assert method.pairs(LAYOUT, 6).pairs * 4 * 8 == pytest.approx(cost.attention_flops)


def test_a_single_token_works():
  layout = TileLayout.fit((1, 1, 1), 32)
  out, aux = run(layer_of(SparseFlow(), layout), tokens(layout), layout=layout)
  assert np.isfinite(out).all() and np.isfinite(aux["density"]).all()


def test_it_trains():
  router = dict(mode="sampled", hidden=8, prior=PRIOR)
  trains("sparseflow", dict(schedule=dict(frames=(1, 2)), around=(1, 1), router=router))


def test_refusals():
  with pytest.raises(ConfigError, match="hands out 5 heads, the layer has 6"):
    layer_of(SparseFlow(allocation=(2, 3)))
  with pytest.raises(ValueError, match="2 head counts"):
    SparseFlow(allocation="free")
  with pytest.raises(ValueError, match="fewest <= most"):
    Schedule(frames=(3, 2))
  with pytest.raises(ValueError, match="sparse_early"):
    Schedule(direction="up")
  with pytest.raises(ValueError, match="one share per branch"):
    SparseFlow(router=RouterConfig())
  assert SparseFlow(allocation="(2, 4)").allocation == (2, 4)
  assert dataclasses.replace(SparseFlow(), allocation="2,4").routed is False


@pytest.mark.parametrize(
  "implementation, kernels", [(None, True), ("pallas_mgpu", True), ("xla", False)]
)
def test_a_named_backend_holds_for_every_op_of_the_layer(implementation, kernels):
  """On a described Hopper GPU: attention, linear attention, norm and rotary."""
  layout = TileLayout.fit((4, 16, 16), 128)
  layer = SpectralAttention(
    AttentionDims(128, 2, 8),
    SparseFlow(),
    layout,
    nnx.Rngs(0),
    dtype=jnp.bfloat16,
    implementation=implementation,
  )
  x, tables = jnp.zeros((2, layout.n_buffer, 128), jnp.bfloat16), layer.config.tables(layout)
  with jax.sharding.use_abstract_mesh(offline.mesh().abstract_mesh):
    program = str(jax.make_jaxpr(lambda x: layer(x, where(), layout.arrays(), tables, {})[0])(x))
  for kernel in ("attention_forward", "linear_read", "norm_rotary"):
    assert (f"name={kernel}" in program) == kernels, kernel
