"""FreqFormer's low band with linear attention among coarse tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.cost import layer_cost
from freqformer.grid.basis import SpectralBasis
from freqformer.grid.rotary import rotate
from freqformer.methods.freqformer import FreqFormer
from tests.methods.test_sparseflow import DIMS, LAYOUT, layer_of, run, tokens, where

BASIS = SpectralBasis("block_dct", (0.5, 0.5, 0.5), (0.75, 0.75, 0.75))
METHOD = FreqFormer(basis=BASIS, low_op="linear", mid_tiles=2, window=(1, 2, 2))


def with_choice(layer, choice):
  layer.method.router.bias[...] = 200.0 * jax.nn.one_hot(jnp.asarray(choice), 3)
  return layer


def test_a_low_head_is_the_dense_form_among_coarse_tokens():
  layer, x, arrays = (
    layer_of(dataclasses.replace(METHOD, allocation=(6, 0, 0))),
    tokens(),
    LAYOUT.arrays(),
  )
  spectral = BASIS.fit(LAYOUT)
  q, k, v = jnp.unstack(layer.qkv(x).reshape(2, LAYOUT.n_buffer, 3, 6, 8), axis=2)
  q, k, v = (spectral.compress(a) for a in (q, k, v))
  q, k = rotate(layer.q_norm(q), spectral.centres), rotate(layer.k_norm(k), spectral.centres)
  scores = jnp.einsum("bihd,bjhd->bhij", jax.nn.softmax(q), jax.nn.softmax(k))
  out = jnp.einsum("bhij,bjhd->bihd", scores / scores.sum(-1, keepdims=True), v)
  want = layer.out(arrays.unpack(spectral.lift(out)).reshape(2, LAYOUT.n, DIMS.width))
  got, aux = run(layer, x)
  np.testing.assert_allclose(got, want, atol=2e-5)
  assert (aux["density"] == 0).all()


def test_hard_equals_soft_and_the_mask_leaves_low_heads_empty():
  layer, x = with_choice(layer_of(METHOD), [0, 1, 2, 2, 1, 0]), tokens()
  hard, aux = run(layer, x, where(want_masks=True))
  soft, _ = run(layer, x, where(soft_evaluation=True))
  np.testing.assert_allclose(hard, soft, atol=2e-5)
  counts = np.asarray(aux["mask"].kv_counts)
  assert (counts[:, [0, 5]] == 0).all() and (counts[:, 1:5].max(-1) > 0).all()
  np.testing.assert_allclose(aux["density"], aux["mask"].density(LAYOUT.n), rtol=1e-6)


@pytest.mark.parametrize("mode", ["soft", "straight_through", "sampled"])
def test_gradients_are_finite_and_padding_changes_nothing(mode):
  method = dataclasses.replace(METHOD, router=dataclasses.replace(METHOD.router, mode=mode))
  layer, x = layer_of(method), tokens()
  dirty = jnp.where(LAYOUT.arrays().valid[:, None], x, 1e4)

  def loss(layer, x):
    out, _, aux = layer(
      x, where(train=True, rng=jax.random.key(0)), LAYOUT.arrays(), method.tables(LAYOUT), {}
    )
    return (LAYOUT.arrays().unpack(out) ** 2).sum() + aux["loss"]

  grad = nnx.jit(nnx.value_and_grad(loss))
  for a, b in zip(*(jax.tree.leaves(grad(layer, y)) for y in (x, dirty)), strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_cost_and_refusal():
  dense, linear = (
    layer_cost(dataclasses.replace(METHOD, low_op=op), LAYOUT, 6, 8, (1, 0, 0))
    for op in ("dense", "linear")
  )
  n_coarse = BASIS.fit(LAYOUT).n_coarse
  assert dense.attention_flops == 4 * 8 * 6 * n_coarse**2 and linear.attention_flops == 0
  # d + 8 columns: what is appended for the denominator is padded to 8
  assert linear.linear_flops - dense.linear_flops == 4 * n_coarse * 8 * 16 * 6
  with pytest.raises(ValueError, match="low_op"):
    FreqFormer(low_op="low rank")
