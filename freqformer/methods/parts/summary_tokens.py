"""Cross-band summary tokens: each band leaves a few pooled key/value pairs that the heads of the other bands read.

Residual form: rows attend to the other bands' summaries beside the main attention, times a gate that starts at 0, so a
model with summaries starts exactly equal to one without. The pooling is a softmax by learned queries, because a plain mean
of a mid or high band is 0. The construction is ours; the abstract of arXiv 2604.22808 only names the exchange.
"""

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
    """What each row reads from the other bands.

    Args:
      q, k: `[b, n_buffer, h, d]`, normed, not rotated (a summary has no place).
      v: `[b, n_buffer, h, d]`.
      share: `[b, h, 3]`, how much of a head belongs to each band; a head does not read its own band.
    """
    scale = q.shape[-1] ** -0.5
    valid = jnp.asarray(layout.valid)
    keys, values = zip(
      *(
        self._pool(i, x, y, valid, scale)
        for i, (x, y) in enumerate(zip(_bands(k, spectral), _bands(v, spectral), strict=True))
      ),
      strict=True,
    )
    other = jnp.log(jnp.maximum(1 - share, 1e-6)).transpose(0, 1, 2)  # [b, h, 3]
    other = jnp.repeat(other, keys[0].shape[2], axis=-1)[:, :, None]
    keys, values = jnp.concatenate(keys, 2), jnp.concatenate(values, 2)  # [b, h, 3 * count, d]
    scores = jnp.einsum("bnhd,bhmd->bhnm", q.astype(jnp.float32), keys) * scale + other
    out = jnp.einsum("bhnm,bhmd->bnhd", jax.nn.softmax(scores), values)
    return (self.gate[...][:, None] * out).astype(v.dtype)

  def _pool(self, band, k, v, valid, scale):
    """Softmax pooling of one band by its learned queries: keys and values `[b, h, count, d]`, float32."""
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    scores = jnp.einsum("hmd,bnhd->bhmn", self.query[...][band], k) * scale
    p = jax.nn.softmax(jnp.where(valid, scores, -jnp.inf))
    return jnp.einsum("bhmn,bnhd->bhmd", p, k), jnp.einsum("bhmn,bnhd->bhmd", p, v)


def _bands(x, spectral):
  low, box = spectral.project_low(x), spectral.project_box(x)
  return low, box - low, x - box
