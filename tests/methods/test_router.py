"""The router: exact gradients where promised, hard where promised, one schedule, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.config import numbers
from freqformer.methods.base import Cond
from freqformer.methods.parts.router import (
  RouterConfig,
  SpectralRouter,
  entropy,
  penalty,
  route,
  temperature,
)

LOGITS = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 3)), jnp.float32)
# Outputs of the branches, and a cotangent.
Y = jnp.asarray(np.random.default_rng(1).standard_normal((2, 4, 3, 5)), jnp.float32)
DY = jnp.asarray(np.random.default_rng(2).standard_normal((2, 4, 5)), jnp.float32)


def cond(**kwargs):
  return Cond(
    jnp.array([0.2, 0.9]),
    jnp.ones((2, 6)),
    **{"progress": 0.5, "rng": jax.random.key(0), "train": True, **kwargs},
  )


def mixed(logits, config, where):
  return jnp.einsum("bhr,bhrd->bhd", route(logits, config, where).weights, Y)


@pytest.mark.parametrize("mode", ["soft", "straight_through"])
def test_gradients_are_the_branches_inner_products(mode):
  """d loss / d p_b = <dY, Y_b>, through the softmax at the current temperature."""
  config = RouterConfig(mode=mode)
  got = jax.grad(lambda z: (mixed(z, config, cond()) * DY).sum())(LOGITS)
  inner = jnp.einsum("bhd,bhrd->bhr", DY, Y)
  tau = temperature(config, 0.5)
  want = jax.vjp(lambda z: jax.nn.softmax(z / tau), LOGITS)[1](inner)[0]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_straight_through_and_evaluation_are_one_hot():
  for where in (cond(), cond(train=False)):
    routing = route(LOGITS, RouterConfig(mode="straight_through"), where)
    np.testing.assert_allclose(routing.weights, jax.nn.one_hot(LOGITS.argmax(-1), 3), atol=1e-6)
  assert not route(LOGITS, RouterConfig(), cond(train=False)).all_branches
  assert route(LOGITS, RouterConfig(), cond(train=False, soft_evaluation=True)).all_branches


def test_sampled_runs_one_branch_and_draws_from_p():
  config, logits = RouterConfig(mode="sampled"), jnp.tile(LOGITS[:1, :1], (4000, 1, 1))
  routing = route(logits, config, cond())
  assert not routing.all_branches
  assert ((routing.weights > 0).sum(-1) == 1).all()
  share = np.bincount(np.asarray(routing.choice[:, 0]), minlength=3) / 4000
  np.testing.assert_allclose(share, routing.probs[0, 0], atol=0.03)
  grad = jax.grad(lambda z: route(z, config, cond()).weights.sum())(LOGITS)
  chosen = jax.nn.one_hot(route(LOGITS, config, cond()).choice, 3)
  want = jax.grad(lambda z: (route(z, config, cond()).probs * chosen).sum())(LOGITS)
  np.testing.assert_allclose(grad, want, atol=1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_random_draws_from_p_and_learns_nothing(train):
  """Draws differ by sample, head and layer (logits), and both guidance halves share them."""
  config = RouterConfig(mode="random")
  logits = jnp.tile(LOGITS[:1, :1], (4000, 1, 1))
  routing = route(logits, config, cond(train=train))
  assert not routing.all_branches
  np.testing.assert_array_equal(routing.weights.sum(-1), 1)
  share = np.bincount(np.asarray(routing.choice[:, 0]), minlength=3) / 4000
  # Four standard errors of a share of one half.
  np.testing.assert_allclose(share, routing.probs[0, 0], atol=0.032)
  assert not jax.grad(lambda z: (route(z, config, cond(train=train)).probs * Y[..., 0]).sum())(
    LOGITS
  ).any()
  if train:
    again = dataclasses.replace(cond(), rng=jax.random.key(7))
    assert (route(logits, config, again).choice != routing.choice).any()
  else:
    other = route(logits + 0.1, config, cond(train=False))
    assert (other.choice != routing.choice).any()
    guided = route(logits, config, cond(train=False, guided=True)).choice
    np.testing.assert_array_equal(guided[:2000], guided[2000:])


def test_prior_and_more_low_at_high_noise():
  config = RouterConfig(noise=0.0, prior_slope=2.0)
  router = SpectralRouter(config, 4, 6, 3, nnx.Rngs(0))
  where = dataclasses.replace(cond(train=False), time=jnp.array([0.5, 1.0]), progress=0.0)
  probs = router(where, jnp.zeros((2, 4, 3)), numbers(config)).probs
  np.testing.assert_allclose(probs[0, 0], [0.1, 0.3, 0.6], rtol=1e-5)
  assert (probs[1, :, 0] > probs[0, :, 0]).all()


def test_temperature_penalty_entropy():
  config = RouterConfig(temperature=(1.0, 0.25), budget=0.2, penalty=0.5)
  np.testing.assert_allclose(
    [temperature(config, p) for p in (0.0, 0.5, 1.0)], [1, 0.5, 0.25], rtol=1e-6
  )
  probs = jnp.broadcast_to(jnp.array([0.5, 0.5, 0.0]), (2, 4, 3))
  assert penalty(config, probs, jnp.array([0.1, 0.3, 1.0])) == 0  # expected 0.2 = budget
  np.testing.assert_allclose(penalty(config, probs, jnp.array([0.4, 0.4, 1.0])), 0.5)
  np.testing.assert_allclose(entropy(probs), np.log(2), rtol=1e-5)


@pytest.mark.parametrize(
  "bad, message",
  [
    (dict(mode="hard"), "mode=.hard. must be one of soft, straight_through, sampled"),
    (dict(prior=(1.0, 0.0, 0.0)), "prior=.* must be above 0, in every entry"),
    (dict(temperature=(1.0, 0.0)), "must be above 0"),
    (dict(budget=0.0), "above 0 and at most 1"),
  ],
)
def test_refusals(bad, message):
  with pytest.raises(ValueError, match=message):
    RouterConfig(**bad)
