"""The exact velocity of Gaussian data: what a perfect denoiser would predict.

A clip is a stationary Gaussian field on a periodic grid, of one of several spectra `S_v`, equally
likely; its channels are independent. With `F` the transform over the grid, `n` its tokens, and
`D_v = (1 - t)^2 S_v + t^2` the spectrum of `x_t = (1 - t) x_0 + t eps`,

  E[v | x_t]  = sum_v p(v | x_t) F^-1[ (t - (1 - t) S_v) / D_v  F x_t ]
  log p(x_t)  = -1/2 sum over frequencies and channels of ( log D_v + |F x_t|^2 / (n D_v) )

The first is a mixture of Wiener filters, the second the log-likelihood of a spectrum, up to a
constant (Whittle's, exact on a periodic grid).
"""

import dataclasses

import jax
import jax.numpy as jnp

_GRID = (2, 3, 4)  # axes t, y, x of an array [b, c, t, y, x]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
  """The posterior of clips of known spectra; a pytree, so that jit takes the spectra as arguments.

  Attributes:
    spectra: `S_v`, float32 `[V, t, y, x]` in the order of the FFT; the mean of each is the variance
      of a token.
    labelled: the class label is the number of the clip's spectrum; any other label, such as the
      null class, leaves it unknown.
  """

  spectra: jax.Array
  labelled: bool = dataclasses.field(metadata={"static": True})

  def velocity(self, xt: jax.Array, time: jax.Array, label: jax.Array) -> jax.Array:
    """Returns E[v | x_t] of noisy latents `[b, t, y, x, c]`, for `time` and `label` `[b]`."""
    t = time.reshape(-1, 1, 1, 1, 1)
    noisy, spectrum = self._transformed(xt, time)
    weight = jax.nn.softmax(self._log_prior(label) + _likelihood(noisy, spectrum), -1)
    filters = (t - (1 - t) * self.spectra) / spectrum  # [b, V, t, y, x]
    mixed = jnp.einsum("bv,bvtyx->btyx", weight, filters)
    found = jnp.fft.ifftn(mixed[:, None] * noisy, axes=_GRID).real
    return jnp.moveaxis(found, 1, -1)

  def log_likelihood(self, xt: jax.Array, time: jax.Array) -> jax.Array:
    """Returns `log p(x_t)` under each spectrum, up to a constant: `[b, V]`."""
    return _likelihood(*self._transformed(xt, time))

  def _transformed(self, xt, time):
    """Returns `F x_t` `[b, c, t, y, x]` and `D_v` `[b, V, t, y, x]`."""
    t = time.reshape(-1, 1, 1, 1, 1)
    return jnp.fft.fftn(jnp.moveaxis(xt, -1, 1), axes=_GRID), (1 - t) ** 2 * self.spectra + t**2

  def _log_prior(self, label):
    """Returns 0, or minus infinity where a label rules a spectrum out: `[b, V]`."""
    count = len(self.spectra)
    if not self.labelled:
      return jnp.zeros((len(label), count))
    other = (label[:, None] != jnp.arange(count)) & (label < count)[:, None]
    return jnp.where(other, -jnp.inf, 0.0)


def _likelihood(noisy, spectrum):
  channels = noisy.shape[1]
  tokens = noisy[0, 0].size
  power = jnp.sum(noisy.real**2 + noisy.imag**2, 1)[:, None] / tokens
  return -0.5 * jnp.sum(channels * jnp.log(spectrum) + power / spectrum, (2, 3, 4))
