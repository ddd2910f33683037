"""Cross-band summary tokens: pooled key/value pairs of each band that heads of the others read.

Residual form: rows attend to the other bands' summaries in addition to the main attention, times a
gate that starts at 0, so a model with summaries starts exactly equal to one without. The pooling is
a softmax by learned queries, because a plain mean of a mid or high band is 0.
"""

# choice: the construction; the abstract of arXiv 2604.22808 only names the exchange.

import jax
import jax.numpy as jnp
from flax import nnx

from freqformer.grid.basis import SpectralTables
from freqformer.grid.layout import LayoutTables


class SummaryTokens(nnx.Module):
  """`count` summaries per band and head; bands are low, mid, high."""

  def __init__(self, count: int, heads: int, head_dim: int, rngs: nnx.Rngs):
    self.query = nnx.Param(jax.random.normal(rngs.params(), (3, heads, count, head_dim)))
    self.gate = nnx.Param(jnp.zeros((heads,)))

  def __call__(self, q, k, v, share, spectral: SpectralTables, layout: LayoutTables) -> jax.Array:
    """Computes what each row reads from the other bands, `[b, n_buffer, h, d]`.

    Args:
      q, k, v: `[b, n_buffer, h, d]`; q and k normed, not rotated (a summary has no place).
      share: `[b, h, 3]`, how much of a head belongs to each band; a head does not read its own.
    """
    scale = q.shape[-1] ** -0.5
    valid = jnp.asarray(layout.valid)
    bands = zip(_bands(k, spectral), _bands(v, spectral), strict=True)
    pooled = [
      self._pool(i, band_k, band_v, valid, scale) for i, (band_k, band_v) in enumerate(bands)
    ]
    keys = jnp.concatenate([keys for keys, _ in pooled], 2)  # [b, h, 3 * count, d]
    values = jnp.concatenate([values for _, values in pooled], 2)
    other = jnp.log(jnp.maximum(1 - share, 1e-6))  # [b, h, 3]
    other = jnp.repeat(other, keys.shape[2] // 3, axis=-1)[:, :, None]
    scores = jnp.einsum("bnhd,bhmd->bhnm", q.astype(jnp.float32), keys) * scale + other
    out = jnp.einsum("bhnm,bhmd->bnhd", jax.nn.softmax(scores), values)
    return (self.gate[...][:, None] * out).astype(v.dtype)

  def _pool(self, band, k, v, valid, scale):
    """Pools a band by its learned queries: keys and values `[b, h, count, d]`, float32."""
    k = k.astype(jnp.float32)
    v = v.astype(jnp.float32)
    scores = jnp.einsum("hmd,bnhd->bhmn", self.query[...][band], k) * scale
    p = jax.nn.softmax(jnp.where(valid, scores, -jnp.inf))
    return jnp.einsum("bhmn,bnhd->bhmd", p, k), jnp.einsum("bhmn,bnhd->bhmd", p, v)


def _bands(x, spectral):
  """P_low x, P_mid x and P_high x."""
  low = spectral.project_low(x)
  box = spectral.project_box(x)
  return low, box - low, x - box
