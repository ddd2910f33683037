"""Laws of the methods, held through the whole attention layer on a ragged grid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.config import ConfigError
from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.methods.base import Cond
from freqformer.methods.dense import Dense
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.parts.router import RouterConfig
from freqformer.methods.registry import method_class
from freqformer.model.attention import AttentionDims, SpectralAttention

LAYOUT = TileLayout.fit((5, 6, 9), 32, tile=(2, 4, 4))
DIMS = AttentionDims(48, 6, 8)
WHOLE = SpectralBasis("block_dct", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
BASIS = SpectralBasis("block_dct", (0.5, 0.5, 0.5), (0.75, 0.75, 0.75))


def where(**kwargs):
  time = jnp.array([0.3, 0.9])
  return Cond(time, jnp.stack([jnp.sin(time * k) for k in range(1, 9)], -1), **kwargs)


def layer_of(method, dims=DIMS, layout=LAYOUT, seed=0):
  return SpectralAttention(dims, method, layout, nnx.Rngs(seed))


def tokens(layout=LAYOUT, seed=0, b=2):
  x = np.random.default_rng(seed).standard_normal((b, layout.n, DIMS.width)).astype(np.float32)
  return layout.arrays().pack(x)


def run(layer, x, cond=None, layout=LAYOUT):
  """out on valid tokens `[b, n, width]`, aux."""

  @nnx.jit
  def apply(layer, x, cond, arrays, tables):
    out, _, aux = layer(x, cond, arrays, tables, {})
    return arrays.unpack(out), aux

  return apply(
    layer, x, where() if cond is None else cond, layout.arrays(), layer.config.tables(layout)
  )


def same_weights(source, target):
  """Copies the projections and norms of one layer into another, whatever their methods."""
  for name in ("qkv", "out", "q_norm", "k_norm"):
    nnx.update(getattr(target, name), nnx.state(getattr(source, name)))
  return target


@pytest.mark.parametrize("kind", ["block_dct", "dct", "haar"])
@pytest.mark.parametrize("allocation", [(6, 0, 0), (0, 6, 0), (0, 0, 6), (2, 2, 2)])
def test_everything_wide_open_equals_dense(kind, allocation):
  basis = dataclasses.replace(WHOLE, kind=kind)
  method = FreqFormer(basis=basis, allocation=allocation, mid_tiles=99, window=(9, 9, 9))
  dense = layer_of(Dense())
  out, aux = run(same_weights(dense, layer_of(method)), tokens())
  np.testing.assert_allclose(out, run(dense, tokens())[0], atol=2e-5)
  np.testing.assert_allclose(aux["density"], 1, rtol=1e-6)


def test_dense_equals_textbook():
  layer, x = layer_of(Dense()), tokens()
  arrays = LAYOUT.arrays()
  n, positions = (
    LAYOUT.n,
    np.stack(np.unravel_index(np.arange(LAYOUT.n), LAYOUT.grid), -1).astype(np.float32),
  )
  from freqformer.grid.rotary import rotate

  q, k, v = jnp.unstack(layer.qkv(arrays.unpack(x)).reshape(2, n, 3, 6, 8), axis=2)
  q, k = rotate(layer.q_norm(q), positions), rotate(layer.k_norm(k), positions)
  want = layer.out(jax.nn.dot_product_attention(q, k, v).reshape(2, n, 48))
  np.testing.assert_allclose(run(layer, x)[0], want, atol=2e-5)


@pytest.mark.parametrize(
  "method",
  [
    Dense(),
    FreqFormer(basis=BASIS),
    FreqFormer(basis=BASIS, allocation=(2, 2, 2), filter="qkv", sink=1, anchors=1, mid_tiles=5),
    FreqFormer(basis=BASIS, allocation=(2, 2, 2), filter="v", low_shared=True, summary=2),
    FreqFormer(basis=dataclasses.replace(BASIS, kind="dct"), window=(1, 2, 2), border="clip"),
  ],
  ids=["dense", "routed", "filter_qkv", "shared_summary", "dct_clip"],
)
@pytest.mark.parametrize("train", [False, True])
def test_padding_rows_change_nothing(method, train):
  layer, x, valid = layer_of(method), tokens(), LAYOUT.arrays().valid
  cond = where(train=train, rng=jax.random.key(0))
  dirty = jnp.where(valid[:, None], x, 1e4)

  def loss(layer, x):
    arrays = LAYOUT.arrays()
    out, _, aux = layer(x, cond, arrays, layer.config.tables(LAYOUT), {})
    return (arrays.unpack(out) ** 2).sum() + aux["loss"]

  grad = nnx.jit(nnx.value_and_grad(loss))
  clean, soiled = grad(layer, x), grad(layer, dirty)
  for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(soiled), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def hard_router(layer, choice):
  """Sets the router's logits so that p is one-hot at `choice` [h]."""
  router = layer.method.router
  router.bias[...] = 200.0 * jax.nn.one_hot(jnp.asarray(choice), 3)
  return layer


def test_hard_equals_soft_with_one_hot_gates():
  method = FreqFormer(basis=BASIS, filter="qkv")
  layer = hard_router(layer_of(method), [0, 1, 2, 2, 1, 0])
  hard, aux = run(layer, tokens())
  soft, soft_aux = run(layer, tokens(), where(soft_evaluation=True))
  np.testing.assert_allclose(hard, soft, atol=2e-5)
  assert aux["choice"][0].tolist() == [0, 1, 2, 2, 1, 0]
  assert float(aux["cost"]) < float(soft_aux["cost"])
  fixed = same_weights(layer, layer_of(dataclasses.replace(method, allocation=(2, 2, 2))))
  order = hard_router(layer, [0, 0, 1, 1, 2, 2])
  np.testing.assert_allclose(run(order, tokens())[0], run(fixed, tokens())[0], atol=2e-5)


def test_one_compile_for_two_assignments():
  layer, traces = layer_of(FreqFormer(basis=BASIS)), []
  graphdef, state = nnx.split(layer)

  @jax.jit
  def apply(state, x, arrays, tables):
    traces.append(None)
    return nnx.merge(graphdef, state)(x, where(), arrays, tables, {})[0]

  outs = []
  for choice in ([0, 1, 2, 0, 1, 2], [2, 2, 2, 2, 2, 2]):
    state = nnx.state(hard_router(layer, choice))
    outs.append(apply(state, tokens(), LAYOUT.arrays(), layer.config.tables(LAYOUT)))
  assert len(traces) == 1 and np.abs(outs[0] - outs[1]).max() > 1e-3


@pytest.mark.parametrize("mode", ["soft", "straight_through"])
def test_router_gradient_through_the_layer(mode):
  """d loss / d logits = softmax' of <dY, Y_b>, with Y_b taken from layers fixed to one branch."""
  method = FreqFormer(
    basis=BASIS, router=RouterConfig(mode=mode, penalty=0.0, temperature=(1.0, 1.0))
  )
  layer, x = layer_of(method), tokens()

  def branch(i):
    return run(hard_router(nnx.clone(layer), [i] * 6), x)[0]

  def loss(bias):
    twin = nnx.clone(layer)
    twin.method.router.bias[...] = bias
    arrays = LAYOUT.arrays()
    return (
      arrays.unpack(twin(x, where(train=True), arrays, method.tables(LAYOUT), {})[0]) * dy
    ).sum()

  dy = jnp.asarray(np.random.default_rng(5).standard_normal((2, LAYOUT.n, DIMS.width)), jnp.float32)
  got = jax.jit(jax.grad(loss))(layer.method.router.bias[...])
  probs = run(layer, x)[1]["probs"]
  # The out projection is linear: its bias is common to all branches and cancels in the softmax's
  # Jacobian... per head it does not, so split heads by projecting each one alone.
  kernel = layer.out.kernel[...].reshape(6, 8, 48)
  inner = jnp.stack([jnp.einsum("bnw,bnw->b", dy, branch(i)) for i in range(3)], -1)
  per_head = []
  for i in range(3):
    heads = run_heads(layer, x, i)
    per_head.append(jnp.einsum("bnhd,hdw,bnw->bh", heads, kernel, dy))
  per_head = jnp.stack(per_head, -1)
  bias_part = jnp.einsum("bnw,w->b", dy, layer.out.bias[...])
  np.testing.assert_allclose(per_head.sum(1) + bias_part[:, None], inner, rtol=1e-3, atol=1e-2)
  want = (probs * (per_head - (probs * per_head).sum(-1, keepdims=True))).sum(0)
  np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def run_heads(layer, x, branch):
  """Head outputs before the out projection, `[b, n, h, d]`, with every head on one branch."""
  twin = hard_router(nnx.clone(layer), [branch] * 6)
  twin.out.kernel[...] = jnp.eye(48)
  twin.out.bias[...] = jnp.zeros(48)
  return run(twin, x)[0].reshape(2, LAYOUT.n, 6, 8)


@pytest.mark.parametrize("filter_", ["none", "qkv", "v"])
def test_planted_match_is_selected(filter_):
  """A key tile that answers one query tile far away is in its mid list, whatever the filter."""
  layout = TileLayout.fit((8, 8, 8), 32, tile=(2, 4, 4))
  method = FreqFormer(basis=BASIS, allocation=(0, 6, 0), mid_tiles=2, filter=filter_)
  layer = layer_of(method, layout=layout)
  x = np.random.default_rng(0).standard_normal((1, layout.n_buffer, 48)).astype(np.float32) * 0.05
  # Keys and queries = the input itself: a shared direction in tiles 1 and 14 is a match, up to the
  # rotation of distance.
  eye = np.eye(48, dtype=np.float32)
  layer.qkv.kernel[...] = jnp.concatenate([eye, eye, eye], 1)
  direction = np.zeros(48, np.float32)
  direction[2::8] = direction[3::8] = 4.0  # the slowest rotary channels of each head
  for tile in (1, 14):
    x[:, tile * 32 : (tile + 1) * 32] += direction
  seen = {}
  original = FreqFormer._mid_table

  def spy(self, *args):
    seen["mask"] = original(self, *args)
    return seen["mask"]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(FreqFormer, "_mid_table", spy)
    layer(
      jnp.asarray(x),
      dataclasses.replace(where(), time=jnp.ones(1), embedding=jnp.ones((1, 8))),
      layout.arrays(),
      method.tables(layout),
      {},
    )
  tiles = np.asarray(seen["mask"].to_tiles())
  coarse = tiles.shape[-1] - layout.tiles
  assert tiles[0, :, coarse + 1, coarse + 14].all() and tiles[0, :, coarse + 14, coarse + 1].all()


def test_guided_halves_share_routing_and_masks():
  layer = layer_of(FreqFormer(basis=BASIS))
  kernel = layer.method.router.out.kernel  # starts at 0: the samples' statistics would not count
  kernel[...] = 10 * jax.random.normal(jax.random.key(0), kernel[...].shape)
  at = dataclasses.replace(where(guided=True), time=jnp.array([0.5, 0.5]))
  _, aux = run(layer, tokens(), at)
  for name in ("probs", "choice", "density"):
    np.testing.assert_array_equal(aux[name][0], aux[name][1])
  _, alone = run(layer, tokens(), dataclasses.replace(at, guided=False))
  assert (
    np.abs(alone["probs"][0] - alone["probs"][1]).max() > 1e-4
  )  # else the law above would be empty


def test_summary_tokens_are_neutral_at_init_and_learn():
  method = FreqFormer(basis=BASIS, allocation=(2, 2, 2))
  plain = layer_of(method)
  layer = same_weights(plain, layer_of(dataclasses.replace(method, summary=3)))
  np.testing.assert_array_equal(run(layer, tokens())[0], run(plain, tokens())[0])

  def loss(layer):
    return (
      layer(tokens(), where(), LAYOUT.arrays(), layer.config.tables(LAYOUT), {})[0] ** 2
    ).sum()

  assert np.abs(nnx.jit(nnx.grad(loss))(layer).method.summary.gate[...]).min() > 0


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 2, 3), (7, 5, 3), (2, 8, 8)])
def test_any_grid_works(grid):
  layout = TileLayout.fit(grid, 32)
  layer = layer_of(FreqFormer(basis=BASIS, sink=1), layout=layout)
  out, aux = run(layer, tokens(layout), layout=layout)
  assert (
    np.isfinite(out).all() and out.shape == (2, layout.n, 48) and np.isfinite(aux["density"]).all()
  )


def test_cost_is_the_tables_cost():
  """Fixed allocations: the analytic pairs are the pairs that run (tiles of equal length)."""
  layout = TileLayout.fit((4, 8, 16), 32, tile=(2, 4, 4))
  for allocation, shared in (
    ((6, 0, 0), False),
    ((0, 6, 0), False),
    ((0, 0, 6), False),
    ((1, 2, 3), True),
  ):
    method = FreqFormer(basis=BASIS, allocation=allocation, low_shared=shared, window=(1, 1, 3))
    _, aux = run(layer_of(method, layout=layout), tokens(layout), layout=layout)
    pairs = float(aux["density"][0].sum()) * layout.n**2
    np.testing.assert_allclose(method.pairs(layout, 6).pairs, pairs, rtol=1e-5)
  np.testing.assert_allclose(Dense().pairs(layout, 6).pairs, 6 * layout.n**2)


def test_refusals():
  with pytest.raises(ConfigError, match="did you mean 'freqformer'"):
    method_class("freqfromer")
  with pytest.raises(ConfigError, match="hands out 5 heads, the layer has 6"):
    layer_of(FreqFormer(allocation=(1, 2, 2)))
  with pytest.raises(ConfigError, match="not divisible by 5 heads; heads may be"):
    AttentionDims(48, 5, 8)
  with pytest.raises(ValueError, match="must hold the own tile"):
    FreqFormer(mid_tiles=2, sink=2)
  assert (
    FreqFormer(allocation="(1, 2,3)").allocation
    == FreqFormer(allocation="1,2,3").allocation
    == (1, 2, 3)
  )
  with pytest.raises(ValueError, match="3 head counts"):
    FreqFormer(allocation="free")
