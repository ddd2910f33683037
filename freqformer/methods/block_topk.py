"""Top-k key tiles by pooled scores, and the pooled attention's own output (VSA, arXiv 2505.13389).

q, k, v are averaged over tiles. Attention among the averages picks each query tile's key tiles, and
its output, repeated over the tile's tokens and times a gate, is added to the exact attention over
them: `out = exact + gate * coarse`. `coarse="none"` runs on any checkpoint.
"""

# choice: the paper's gate is linear in the token. This one starts at 0, as in fine-tuning, and
# reads the head's query, because a method sees no residual stream. A tile always lists itself.

import dataclasses

import jax.numpy as jnp

from freqformer.config import ConfigError, require, require_one_of
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import dense_mask
from freqformer.methods.base import Method, attend, copied, even_lists
from freqformer.methods.parts.gate import QueryGate
from freqformer.tables.topk import block_topk, fixed_tiles, pool_tiles

COARSE = ("gated", "none")


@dataclasses.dataclass(frozen=True)
class BlockTopK(Method):
  """Fields of the method.

  Attributes:
    density: share of key tiles that each query tile lists, rounded to whole tiles.
    sink: first tiles that every list holds; they and the own tile count inside the density.
    coarse: "gated" adds the pooled attention's output, "none" does not and has no parameters.
  """

  density: float = 0.125
  sink: int = 0
  coarse: str = "gated"

  def __post_init__(self):
    require(self, "density", above=0, most=1)
    require(self, "sink", least=0)
    require_one_of(self, "coarse", COARSE)

  def budget(self, layout) -> int:
    """Returns the key tiles per query tile.

    Raises:
      ConfigError: if the density rounds to fewer tiles than the fixed ones.
    """
    budget = int(self.density * layout.tiles + 0.5)
    fixed = min(1 + self.sink, layout.tiles)
    if budget < fixed:
      raise ConfigError(
        f"block_topk: density {self.density} of {layout.tiles} tiles rounds to {budget}, fewer "
        f"than the {fixed} fixed ones (own, sink); give at least {fixed / layout.tiles:.3g}."
      )
    return budget

  def refuses_dense(self, phase):
    return None if self.coarse == "none" else super().refuses_dense(phase)

  def build(self, dims, layout, rngs):
    self.budget(layout)
    return QueryGate(dims.heads, dims.head_dim) if self.coarse == "gated" else None

  def tables(self, layout):
    return fixed_tiles(layout, self.sink)

  def __call__(self, module, qkv, cond, tables, state):
    arrays = qkv.layout
    tiles = arrays.tiles
    block = arrays.block
    q, k = qkv.rotated()
    q_pool = pool_tiles(q, arrays)
    k_pool = pool_tiles(k, arrays)
    mask = block_topk(
      cond.share(q_pool),
      cond.share(k_pool),
      self.budget(arrays.layout),
      tables,
      arrays,
      qkv.other_ops_implementation,
    )
    out, aux = attend(qkv, mask, cond, (q, k))
    coarse_density = 0.0
    if module is not None:
      pools = (q_pool, k_pool, pool_tiles(qkv.v, arrays))
      # Kernels take whole blocks of rows; the mask hides those beyond the tiles.
      to_blocks = [(0, 0), (0, -tiles % block), (0, 0), (0, 0)]
      pooled = [jnp.pad(x.transpose(0, 2, 1, 3).astype(q.dtype), to_blocks) for x in pools]
      everything = dense_mask(tiles, tiles, block, block)
      coarse = attention(*pooled, everything, implementation=qkv.implementation)[0][:, :tiles]
      out = out + (module(qkv.q) * copied(coarse, block, 1)).astype(out.dtype)
      coarse_density = (tiles / arrays.n) ** 2
    aux |= {
      "density": aux["density"] + coarse_density,
      "cost": aux["cost"] + coarse_density,
      "coarse_density": coarse_density,
    }
    return out, state, aux

  def pairs(self, layout, heads, allocation=None, phase=None):
    """Counts listed tiles of average length and, if gated, the averages' own pairs."""
    listed = layout.n * self.budget(layout) * layout.n / layout.tiles
    averages = layout.tiles**2 if self.coarse == "gated" else 0
    return even_lists(layout, heads, listed + averages)
