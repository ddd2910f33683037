"""Rectified flow (arXiv 2209.03003): `x_t = (1 - t) x_0 + t eps`, velocity `eps - x_0`."""

import jax
import jax.numpy as jnp

TIME_SAMPLING = ("uniform", "logit_normal")
BUCKETS = 4  # validation reports losses per quarter of t


def sample_noise(key: jax.Array, index: jax.Array, shape) -> jax.Array:
  """Draws standard normal noise `[len(index), *shape]`.

  Sample i depends on the key and `index[i]` only, not on the batch around it.
  """
  return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index)


def sample_time(key: jax.Array, batch: int, kind: str) -> jax.Array:
  """Draws timesteps `[batch]`, stratified over the batch.

  The kind is "uniform", or "logit_normal" (arXiv 2403.03206), which favours the middle.
  """
  key_shift, key_order = jax.random.split(key)
  u = (jnp.arange(batch) + jax.random.uniform(key_shift, (batch,))) / batch
  u = jax.random.permutation(key_order, u)
  if kind == "uniform":
    return u
  return jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.clip(u, 1e-5, 1 - 1e-5)))


def interpolate(x0: jax.Array, noise: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns noisy latents and the target velocity, for `time` `[b]`."""
  t = _like(time, x0)
  return (1 - t) * x0 + t * noise, noise - x0


def give_first_frame(xt: jax.Array, x0: jax.Array, given: jax.Array) -> jax.Array:
  """Returns noisy latents `[b, t, y, x, c]` with a clean first frame where `given` `[b]`."""
  frame = jnp.where(_like(given, x0), x0[:, :1], xt[:, :1])
  return jnp.concatenate([frame, xt[:, 1:]], 1)


def linear_velocity(xt: jax.Array, time: jax.Array, power: jax.Array) -> jax.Array:
  """Returns the best prediction `v = a_c(t) x_t` per channel.

  `a = E[v x_t] / E[x_t^2] = (t - (1 - t) p) / ((1 - t)^2 p + t^2)` for latents `[b, ..., c]` whose
  mean square `p` is `power` `[c]`. A model that is no better has learned nothing.
  """
  t = _like(time, xt)
  return (t - (1 - t) * power) / ((1 - t) ** 2 * power + t**2) * xt


def _like(time, x):
  """Returns `time` `[b]` as `[b, 1, ..., 1]`, of the rank of x."""
  return time.reshape(-1, *(1,) * (x.ndim - 1))
