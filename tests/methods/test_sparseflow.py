"""SparseFlow: its temporal table, its schedule over the timestep, its linear path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.config import ConfigError
from freqformer.cost import layer_cost
from freqformer.grid.layout import TileLayout
from freqformer.methods.parts.router import RouterConfig
from freqformer.methods.sparseflow import Schedule, SparseFlow, temporal, variance_shares
from freqformer.model.attention import AttentionDims, SpectralAttention
from freqformer.tables.topk import anchor_frames
from tests.methods.layers import RAGGED, finished, heads_of, layer_of, run, tokens, where
from tools import offline

# ---- the table and its schedule --------------------------------------------------------


@pytest.mark.parametrize("frames, anchors", [(1, 0), (1, 2), (2, 1), (3, 9), (9, 0)])
def test_the_window_covers_itself_its_neighbours_and_the_anchors(frames, anchors):
  mask = temporal(RAGGED, frames, (1, 2), anchors).check()
  t, y, x = np.unravel_index(np.arange(RAGGED.tiles), RAGGED.tile_grid)
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


@pytest.mark.parametrize("shape", ["linear", "cosine", "step"])
@pytest.mark.parametrize("direction", ["sparse_early", "dense_early"])
def test_density_is_monotone_in_the_configured_direction(direction, shape):
  method = SparseFlow(schedule=Schedule((1, 4), direction, shape), allocation=(6, 0), around=(1, 1))
  times = np.linspace(1, 0, 21, dtype=np.float32)
  found = np.asarray(method.mask_at(method.tables(RAGGED), times).density(RAGGED.n))[:, 0]
  step = np.diff(found) * (1 if direction == "sparse_early" else -1)
  assert (step >= 0).all() and len(np.unique(found)) == (2 if shape == "step" else 4)
  ends = [temporal(RAGGED, frames, (1, 1), 1).density(RAGGED.n).item() for frames in (1, 4)]
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


@pytest.mark.parametrize("name", ["elu", "softmax"])
def test_a_linear_head_is_the_dense_form_within_its_frame(name):
  phi = {"elu": lambda x: jax.nn.elu(x) + 1, "softmax": jax.nn.softmax}[name]
  layer = layer_of(SparseFlow(allocation=(0, 6), feature_map=name))
  x = tokens()
  q, k, v, position = finished(layer, x)
  same = position[:, 0][:, None] == position[:, 0]
  scores = jnp.einsum("bihd,bjhd->bhij", phi(q), phi(k)) * same
  want = jnp.einsum("bhij,bjhd->bihd", scores / scores.sum(-1, keepdims=True), v)
  np.testing.assert_allclose(heads_of(layer, x), want, atol=2e-5)


def test_variance_shares_are_the_parts_of_the_variance():
  x = np.random.default_rng(0).standard_normal((2, RAGGED.n, 3, 8)).astype(np.float32)
  got = variance_shares(RAGGED.arrays().pack(x), RAGGED.arrays())
  np.testing.assert_allclose(
    got.sum(-1), ((x - x.mean(1, keepdims=True)) ** 2).sum(-1).mean(1), rtol=1e-4
  )
  whole = (2, 9, 54, 3, 8)  # 9 frames of 54 places
  still = np.broadcast_to(x[:, :54].reshape(2, 1, 54, 3, 8), whole).reshape(x.shape)
  moving = np.broadcast_to(x[:, :9].reshape(2, 9, 1, 3, 8), whole).reshape(x.shape)
  still = variance_shares(RAGGED.arrays().pack(still), RAGGED.arrays())
  moving = variance_shares(RAGGED.arrays().pack(moving), RAGGED.arrays())
  assert (still[..., 1] < 1e-6 * still.sum(-1)).all() and (still[..., 2] > 0).all()
  assert (moving[..., 2] < 1e-6 * moving.sum(-1)).all() and (moving[..., 1] > 0).all()


# ---- cost, refusals, backends ----------------------------------------------------------


def test_cost_is_what_runs_over_all_times():
  method = SparseFlow(schedule=Schedule((1, 4), shape="cosine"), allocation=(4, 2))
  times = (np.arange(64, dtype=np.float32) + 0.5) / 64
  density = 4 * float(method.mask_at(method.tables(RAGGED), times).density(RAGGED.n).mean())
  cost = layer_cost(method, RAGGED, 6, 8)
  np.testing.assert_allclose(cost.attention_flops, 4 * 8 * density * RAGGED.n**2, rtol=0.02)
  assert method.pairs(RAGGED, 6).pairs * 4 * 8 == pytest.approx(cost.attention_flops)


def test_refusals():
  with pytest.raises(ConfigError, match="hands out 5 heads, the layer has 6"):
    layer_of(SparseFlow(allocation=(2, 3)))
  with pytest.raises(ValueError, match="2 head counts"):
    SparseFlow(allocation="free")
  with pytest.raises(ValueError, match="fewest <= most"):
    Schedule(frames=(3, 2))
  with pytest.raises(ValueError, match="direction='up' must be one of sparse_early"):
    Schedule(direction="up")
  with pytest.raises(ValueError, match="one share per branch"):
    SparseFlow(router=RouterConfig())


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
