"""Methods whose router deals the heads: soft and hard mixtures, and gradients to the router."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.cost import layer_cost
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.parts.router import RouterConfig
from freqformer.methods.sparseflow import SparseFlow
from tests.methods.layers import (
  BASIS,
  DIMS,
  RAGGED,
  heads_of,
  layer_of,
  routed_to,
  run,
  tokens,
  where,
)


def router(*prior):
  return RouterConfig(prior=prior, penalty=0.0, temperature=(1.0, 1.0))


THREE = router(0.1, 0.3, 0.6)
METHODS = {
  "freqformer": FreqFormer(basis=BASIS, filter="qkv", router=THREE),
  "linear_low": FreqFormer(
    basis=BASIS, low_op="linear", window=(2, 2, 2), deal="octant", router=THREE
  ),
  "sparseflow": SparseFlow(router=router(0.6, 0.4)),
}
EMPTY = {"linear_low": 0, "sparseflow": 1}  # the branch whose heads list no tile


@pytest.mark.parametrize("name", METHODS)
def test_hard_equals_soft_with_one_hot_gates_and_fixed_heads(name):
  method = METHODS[name]
  last = len(method.branches) - 1
  choice = np.array([0, 1, last, last, 1, 0])
  layer, x = layer_of(method), tokens()
  hard, aux = run(routed_to(layer, choice), x)
  soft, soft_aux = run(routed_to(layer, choice), x, where(soft_evaluation=True))
  np.testing.assert_allclose(hard, soft, atol=2e-5)
  assert aux["choice"][0].tolist() == choice.tolist()
  assert float(aux["cost"]) < float(soft_aux["cost"])
  np.testing.assert_array_equal(aux["density"] == 0, [choice == EMPTY.get(name)] * 2)
  fixed = layer_of(dataclasses.replace(method, allocation=tuple(np.bincount(choice).tolist())))
  in_order = run(routed_to(layer, np.sort(choice)), x)[0]
  np.testing.assert_allclose(in_order, run(fixed, x)[0], atol=2e-5)


def router_gradient(layer, x, cond, loss_of):
  """Gradient of a loss of the layer's output by the router's bias, `[h, branches]`."""
  arrays = RAGGED.arrays()

  def loss(bias):
    twin = nnx.clone(layer)
    twin.method.router.bias[...] = bias
    out, _, _ = twin(x, cond, arrays, twin.config.tables(RAGGED), {})
    return loss_of(arrays.unpack(out))

  return jax.jit(jax.grad(loss))(layer.method.router.bias[...])


@pytest.mark.parametrize("name", ["freqformer", "sparseflow"])
def test_router_gradient_through_the_layer(name):
  """d loss / d logits = softmax' of <dY, Y_b>, with Y_b taken from layers fixed to one branch."""
  layer, x = layer_of(METHODS[name]), tokens()
  dy = jnp.asarray(np.random.default_rng(5).standard_normal((2, RAGGED.n, DIMS.width)), jnp.float32)
  got = router_gradient(layer, x, where(train=True), lambda out: (out * dy).sum())
  probs = run(layer, x)[1]["probs"]
  kernel = layer.out.kernel[...].reshape(DIMS.heads, DIMS.head_dim, DIMS.width)
  values = []
  for branch in range(probs.shape[-1]):
    heads = heads_of(routed_to(layer, [branch] * DIMS.heads), x)
    values.append(jnp.einsum("bnhd,hdw,bnw->bh", heads, kernel, dy))
  value = jnp.stack(values, -1)
  want = (probs * (value - (probs * value).sum(-1, keepdims=True))).sum(0)
  np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
  assert np.abs(want).max() > 0.1


@pytest.mark.parametrize("name", ["freqformer", "sparseflow"])
@pytest.mark.parametrize("mode", ["straight_through", "sampled"])
def test_router_learns(name, mode):
  """A gradient reaches the router in the modes whose forward pass is hard."""
  method = METHODS[name]
  layer = layer_of(
    dataclasses.replace(method, router=dataclasses.replace(method.router, mode=mode))
  )
  cond = where(train=True, rng=jax.random.key(0))
  gradient = router_gradient(layer, tokens(), cond, lambda out: (out**2).sum())
  assert np.abs(gradient).max() > 1e-2


def test_a_training_step_costs_the_branches_that_it_runs():
  """One where heads are drawn, else all of them."""
  costs = {}
  for mode in ("soft", "sampled", "random"):
    method = FreqFormer(router=RouterConfig(mode=mode))
    costs[mode] = layer_cost(method, RAGGED, DIMS.heads, DIMS.head_dim, training=True).total
  assert costs["random"] == costs["sampled"] < costs["soft"]
