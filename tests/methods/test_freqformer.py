"""FreqFormer's layer: what its bands compute, choose and cost; dense attention by the textbook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.config import ConfigError
from freqformer.cost import layer_cost
from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.rotary import rotate
from freqformer.methods.dense import Dense
from freqformer.methods.freqformer import FreqFormer, WholeAxes
from freqformer.methods.registry import method_class
from freqformer.methods.sliding_tile import SlidingTile
from freqformer.model.attention import AttentionDims
from freqformer.tables.window import sliding_tile
from tests.methods.layers import BASIS, DIMS, RAGGED, aux_of, finished, layer_of, run, tokens, where


def test_dense_equals_textbook():
  layer, x = layer_of(Dense()), tokens()
  q, k, v, _ = finished(layer, x)
  want = layer.out(jax.nn.dot_product_attention(q, k, v).reshape(2, RAGGED.n, DIMS.width))
  np.testing.assert_allclose(run(layer, x)[0], want, atol=2e-5)


def test_a_linear_low_head_is_the_dense_form_among_coarse_tokens():
  layer, x = layer_of(FreqFormer(basis=BASIS, low_op="linear", allocation=(6, 0, 0))), tokens()
  spectral = BASIS.fit(RAGGED)
  q, k, v = jnp.unstack(layer.qkv(x).reshape(2, RAGGED.n_buffer, 3, 6, 8), axis=2)
  q, k, v = (spectral.compress(a) for a in (q, k, v))
  q = rotate(layer.q_norm(q), spectral.centres, layer.theta)
  k = rotate(layer.k_norm(k), spectral.centres, layer.theta)
  scores = jnp.einsum("bihd,bjhd->bhij", jax.nn.softmax(q), jax.nn.softmax(k))
  out = jnp.einsum("bhij,bjhd->bihd", scores / scores.sum(-1, keepdims=True), v)
  lifted = RAGGED.arrays().unpack(spectral.lift(out)).reshape(2, RAGGED.n, DIMS.width)
  np.testing.assert_allclose(run(layer, x)[0], layer.out(lifted), atol=2e-5)


@pytest.mark.parametrize("filter_", ["none", "qkv"])
def test_planted_match_is_selected(filter_):
  """A key tile that answers one query tile far away is in its mid list, whatever the filter."""
  layout = TileLayout.fit((8, 8, 8), 32, tile=(2, 4, 4))
  layer = layer_of(FreqFormer(basis=BASIS, allocation=(0, 6, 0), mid_tiles=2, filter=filter_))
  x = np.random.default_rng(0).standard_normal((1, layout.n_buffer, 48)).astype(np.float32) * 0.05
  # Keys and queries = the input itself: a shared direction in tiles 1 and 14 is a match, up to the
  # rotation of distance.
  layer.qkv.kernel[...] = jnp.tile(jnp.eye(48), (1, 3))
  direction = np.zeros(48, np.float32)
  direction[2::8] = direction[3::8] = 4.0  # the slowest rotary channels of each head
  for tile in (1, 14):
    x[:, tile * 32 : (tile + 1) * 32] += direction
  aux = aux_of(layer, x, where([1.0], want_masks=True), layout)
  tiles = np.asarray(aux["mask"].to_tiles())[0, :, -layout.tiles :, -layout.tiles :]
  assert tiles[:, 1, 14].all() and tiles[:, 14, 1].all()


@pytest.mark.parametrize(
  "method",
  [
    FreqFormer(basis=BASIS, allocation=(0, 0, 6), window=(2, 2, 2), deal="octant"),
    SlidingTile(window=(2, 2, 2), unit="tiles", deal="octant"),
  ],
  ids=["freqformer", "sliding_tile"],
)
def test_heads_run_the_sides_of_their_window_in_turn(method):
  aux = aux_of(layer_of(method), tokens(), where(want_masks=True))
  ran = np.asarray(aux["mask"].to_tiles())[0, :, -RAGGED.tiles :, -RAGGED.tiles :]
  sides = sliding_tile(RAGGED, (2, 2, 2), deal="octant").to_tiles()[0]
  assert len(sides) == 4
  np.testing.assert_array_equal(ran, sides[np.arange(6) % 4])


def test_summary_tokens_are_neutral_at_init_and_learn():
  method = dict(basis=BASIS, allocation=(2, 2, 2))
  layer = layer_of(FreqFormer(**method, summary=3))
  plain, _ = run(layer_of(FreqFormer(**method)), tokens())
  np.testing.assert_array_equal(run(layer, tokens())[0], plain)

  def loss(layer):
    out, _, _ = layer(tokens(), where(), RAGGED.arrays(), layer.config.tables(RAGGED), {})
    return (out**2).sum()

  assert np.abs(nnx.jit(nnx.grad(loss))(layer).method.summary.gate[...]).min() > 0


def test_cost_of_a_linear_low_band():
  dense, linear = (
    layer_cost(FreqFormer(basis=BASIS, low_op=op), RAGGED, 6, 8, (1, 0, 0))
    for op in ("dense", "linear")
  )
  n_coarse = BASIS.fit(RAGGED).n_coarse
  assert dense.attention_flops == 4 * 8 * 6 * n_coarse**2 and linear.attention_flops == 0
  # d + 8 columns: what is appended for the denominator is padded to 8
  assert linear.linear_flops - dense.linear_flops == 4 * n_coarse * 8 * 16 * 6


def test_refusals():
  with pytest.raises(ConfigError, match="did you mean 'freqformer'"):
    method_class("freqfromer")
  with pytest.raises(ConfigError, match="hands out 5 heads, the layer has 6"):
    layer_of(FreqFormer(allocation=(1, 2, 2)))
  with pytest.raises(ConfigError, match="not divisible by 5 heads; heads may be"):
    AttentionDims(48, 5, 8)
  with pytest.raises(ValueError, match="must hold the own tile"):
    FreqFormer(mid_tiles=2, sink=2)
  with pytest.raises(ValueError, match="low_op"):
    FreqFormer(low_op="low rank")
  with pytest.raises(ValueError, match="3 head counts"):
    FreqFormer(allocation="free")
  for text in ("(1, 2,3)", "1,2,3"):
    assert FreqFormer(allocation=text).allocation == (1, 2, 3)


def test_filters_along_whole_axes_are_the_bands():
  spectral = SpectralBasis("dct", (0.5, 0.5, 0.5), (0.75, 0.75, 0.75)).fit(RAGGED)
  x = RAGGED.arrays().pack(np.random.default_rng(0).standard_normal((1, RAGGED.n, 2, 4)))
  box = spectral.project_box(x)
  want = jnp.stack([(box - spectral.project_low(x))[:, :, 0], (x - box)[:, :, 1]], 2)
  got = WholeAxes(spectral, None, None, 0).filter(x, jnp.array([[1, 2]]))
  np.testing.assert_array_equal(got, want)
