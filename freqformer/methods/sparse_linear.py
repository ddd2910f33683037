"""Sparse-linear attention (SLA, arXiv 2509.24006): best tiles exact, worst skipped, rest linear.

  out = softmax over critical tiles
        + project(phi(q_i) sum_marginal phi(k_j) v_j^T / phi(q_i) sum_marginal phi(k_j))

Mean-pooled q and k rank tiles per query tile. The projection (d x d, shared by the heads, as in the
authors' code) starts at 0. Only marginal tiles are linear, as in the paper; in their code all are.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from freqformer.config import require, require_one_of
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.linear.api import FEATURE_MAPS, Segments, linear_attention
from freqformer.methods.base import Method, attend, even_lists
from freqformer.tables.topk import block_topk, pool_tiles


@dataclasses.dataclass(frozen=True)
class SparseLinear(Method):
  """Fields of the method.

  Attributes:
    critical: share of key tiles that get softmax attention, at least one tile.
    negligible: share of key tiles that are skipped; those between are linear.
    feature_map: a name of `kernels.linear.api.FEATURE_MAPS`.
  """

  critical: float = 0.05
  negligible: float = 0.10
  feature_map: str = "softmax"

  def __post_init__(self):
    require(self, "critical", above=0, most=1)
    require(self, "negligible", least=0, below=1)
    if self.critical + self.negligible > 1:
      raise ValueError(f"{self.critical=} and {self.negligible=} must be together at most 1.")
    require_one_of(self, "feature_map", FEATURE_MAPS)

  def budgets(self, tiles: int) -> tuple[int, int]:
    """Critical and negligible key tiles per query tile."""
    # choice: critical is rounded up, negligible down.
    critical = math.ceil(self.critical * tiles)
    return critical, min(math.floor(self.negligible * tiles), tiles - critical)

  def build(self, dims, layout, rngs):
    return nnx.Linear(
      dims.head_dim, dims.head_dim, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
    )

  def __call__(self, module, qkv, cond, tables, state):
    arrays = qkv.layout
    q, k = qkv.rotated()
    q_pool = cond.share(pool_tiles(jax.lax.stop_gradient(q), arrays))
    k_pool = cond.share(pool_tiles(jax.lax.stop_gradient(k), arrays))
    critical, negligible = self.budgets(arrays.tiles)
    others = qkv.other_ops_implementation
    mask = _best_tiles(q_pool, k_pool, critical, arrays, others)
    worst = _best_tiles(-q_pool, k_pool, negligible, arrays, others)
    out, aux = attend(qkv, mask, cond, (q, k))
    linear, _ = linear_attention(
      q,
      k,
      qkv.v,
      Segments.of_tiles(arrays.kv_len, arrays.block),
      reads=~(mask.to_tiles() | worst.to_tiles()),
      feature_map=self.feature_map,
      implementation=others,
    )
    return out + module(linear).astype(out.dtype), state, aux

  def pairs(self, layout, heads, allocation=None, phase=None):
    """Counts critical tiles of average length."""
    critical, _ = self.budgets(layout.tiles)
    return even_lists(layout, heads, layout.n * critical * layout.n / layout.tiles)


def _best_tiles(q_pool, k_pool, budget: int, arrays, implementation) -> BlockMask:
  """Lists the `budget` key tiles of largest pooled score (perhaps none) per query tile."""
  unfixed = np.zeros((arrays.tiles, 0), np.int32)
  mask = block_topk(q_pool, k_pool, max(budget, 1), unfixed, arrays, implementation)
  return dataclasses.replace(mask, kv_counts=jnp.full_like(mask.kv_counts, budget))
