"""Rectified flow (arXiv 2209.03003): `x_t = (1 - t) x_0 + t eps`, target velocity `eps - x_0`; t = 1 is noise."""

import jax
import jax.numpy as jnp

TIME_SAMPLING = ("uniform", "logit_normal")
# Validation reports losses per quarter of t.
BUCKETS = 4


def sample_noise(key: jax.Array, index: jax.Array, shape) -> jax.Array:
  """Standard normal `[len(index), *shape]`; sample i depends on the key and `index[i]` only, not on the batch around it."""
  return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index)


def sample_time(key: jax.Array, batch: int, kind: str) -> jax.Array:
  """Timesteps `[batch]`, stratified over the batch; "logit_normal" (arXiv 2403.03206) favours the middle."""
  shift, order = jax.random.split(key)
  u = (jnp.arange(batch) + jax.random.uniform(shift, (batch,))) / batch
  u = jax.random.permutation(order, u)
  return (
    u if kind == "uniform" else jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.clip(u, 1e-5, 1 - 1e-5)))
  )


def interpolate(x0: jax.Array, noise: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Noisy latents and the target velocity, for `time` `[b]`."""
  t = time.reshape(-1, *(1,) * (x0.ndim - 1))
  return (1 - t) * x0 + t * noise, noise - x0


def linear_velocity(xt: jax.Array, time: jax.Array, power: jax.Array) -> jax.Array:
  """The best prediction `v = a_c(t) x_t` per channel, for channels of mean square `power` `[c]`.

  `a = E[v x_t] / E[x_t^2] = (t - (1 - t) p) / ((1 - t)^2 p + t^2)`. What a model must beat to have learned anything.
  """
  t = time.reshape(-1, *(1,) * (xt.ndim - 1))
  return (t - (1 - t) * power) / ((1 - t) ** 2 * power + t**2) * xt
