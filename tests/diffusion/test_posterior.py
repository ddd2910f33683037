"""The exact posterior mean: against an oracle in float64, against single filters, in validation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.data.fields import Fields, FieldsConfig, spectra
from freqformer.data.loader import val_batches
from freqformer.train.validation import evaluate, make_eval_step

CONFIG = FieldsConfig(grid=(4, 8, 6), labels="velocity", val_clips=96)
TIMES = (0.1, 0.4, 0.6, 0.95)
NULL = len(CONFIG.velocities)


def wiener(xt, t, power):
  """E[v | x_t] under one spectrum `[t, y, x]`, float64."""
  gain = (t - (1 - t) * power) / ((1 - t) ** 2 * power + t**2)
  return np.fft.ifftn(gain[..., None] * np.fft.fftn(xt, axes=(0, 1, 2)), axes=(0, 1, 2)).real


def oracle(xt, t, power):
  """The mixture over all spectra `[V, t, y, x]`, by the covariance of x_t: float64."""
  n = xt[..., 0].size
  logs = []
  for own in power:
    covariance = np.fft.ifftn((1 - t) ** 2 * own + t**2).real.ravel()
    offsets = np.stack(np.unravel_index(np.arange(n), own.shape), -1)
    gap = (offsets[:, None] - offsets[None]) % own.shape
    matrix = covariance[np.ravel_multi_index(tuple(np.moveaxis(gap, -1, 0)), own.shape)]
    x = xt.reshape(n, -1)
    fit = np.sum(x * np.linalg.solve(matrix, x))
    logs.append(-0.5 * (x.shape[1] * np.linalg.slogdet(matrix)[1] + fit))
  weight = np.exp(logs - np.max(logs))
  means = [wiener(xt, t, own) for own in power]
  return np.einsum("v,v...->...", weight / weight.sum(), means), np.array(logs)


@pytest.fixture(scope="module")
def drawn():
  """Clips, their labels, and at each time noisy latents, velocities and the posterior's means."""
  fields = Fields(CONFIG, "val")
  items = [fields[i] for i in range(len(fields))]
  x0 = np.stack([item["latent"] for item in items])
  label = np.stack([item["label"] for item in items])
  noise = np.random.default_rng(0).standard_normal(x0.shape).astype(np.float32)
  velocity = jax.jit(lambda posterior, *args: posterior.velocity(*args))
  found = {}
  for t in TIMES:
    xt = (1 - t) * x0 + t * noise
    time = np.full(len(x0), t, np.float32)
    mixed, told = (
      velocity(fields.reference, xt, time, own) for own in (np.full_like(label, NULL), label)
    )
    found[t] = (xt, noise - x0, np.asarray(mixed), np.asarray(told))
  return label, found


@pytest.mark.parametrize("t", TIMES)
def test_it_is_the_mixture_of_wiener_filters(drawn, t):
  label, found = drawn
  xt, _, mixed, told = found[t]
  power = spectra(CONFIG)
  reference = Fields(CONFIG, "val").reference
  likelihood = reference.log_likelihood(jnp.asarray(xt[:3]), jnp.full(3, t))
  for i in range(3):
    wanted, logs = oracle(xt[i].astype(np.float64), t, power)
    np.testing.assert_allclose(mixed[i], wanted, atol=2e-4)
    np.testing.assert_allclose(likelihood[i] - likelihood[i].max(), logs - logs.max(), atol=0.02)
    np.testing.assert_allclose(told[i], wiener(xt[i], t, power[label[i]]), atol=2e-4)


# Later, a clip tells too little about its velocity for so few clips to show it.
@pytest.mark.parametrize("t", TIMES[:3])
def test_nothing_beats_it_and_its_residual_is_uncorrelated(drawn, t):
  label, found = drawn
  xt, velocity, mixed, told = found[t]
  power = spectra(CONFIG)

  def error(estimate):
    return np.mean((velocity - estimate) ** 2, (1, 2, 3, 4))

  risk = error(mixed)
  assert error(told).mean() < risk.mean() + 1e-3  # the label tells more
  for wrong in range(1, NULL):
    others = power[(label + wrong) % NULL]
    excess = error(np.stack([wiener(x, t, own) for x, own in zip(xt, others, strict=True)])) - risk
    assert excess.mean() > 2 * excess.std() / np.sqrt(len(excess))
  for known in (xt, mixed):
    product = np.mean((velocity - mixed) * known, (1, 2, 3, 4))
    assert abs(product.mean()) < 4 * product.std() / np.sqrt(len(product))
  # Scaling the estimate by 10 % in either direction is worse.
  assert risk.mean() < min(error(0.9 * mixed).mean(), error(1.1 * mixed).mean())


class Perfect(nnx.Module):
  """A model that answers with the posterior mean, plus an error in the first quarter of t."""

  def __init__(self, error: float):
    self.error = nnx.Param(jnp.float32(error))

  def __call__(self, xt, time, label, tables, soft_evaluation):
    velocity = tables.velocity(xt, time, label)
    wrong = jnp.where(time < 0.25, self.error[...], 0.0).reshape(-1, 1, 1, 1, 1)
    return velocity + wrong, None, [{"density": jnp.ones((1, len(time), 1))}]


@pytest.mark.parametrize("buckets", [4, 8])
def test_validation_splits_the_loss_into_regret_and_bayes_risk(buckets):
  fields = Fields(CONFIG, "val")
  reference = fields.reference
  graphdef, params = nnx.split(Perfect(0.5))
  step = make_eval_step(graphdef, buckets=buckets)
  batches = list(val_batches(fields, 32))
  power = np.ones(CONFIG.channels, np.float32)
  result = evaluate(step, params, batches, power, reference, reference=reference)
  wanted = np.zeros(buckets)
  wanted[: buckets // 4] = 0.25
  np.testing.assert_allclose(result["regret_buckets"], wanted, atol=1e-6)
  assert result["regret"] == pytest.approx(0.0625, abs=1e-6)
  total = np.add(result["regret_buckets"], result["bayes_buckets"])
  # In expectation: the noise of the draw is not correlated with the model's error.
  np.testing.assert_allclose(result["buckets"], total, atol=0.02)
  assert (np.array(result["bayes_buckets"]) < result["linear_buckets"]).all()
  assert "regret" not in evaluate(step, params, batches[:1], power, reference)
