"""Sparse-linear attention (SLA, arXiv 2509.24006): the best key tiles exact, the worst skipped, the rest linear.

  out = softmax over critical tiles + project(phi(q_i) sum_marginal phi(k_j) v_j^T / phi(q_i) sum_marginal phi(k_j))

Tiles are ranked by the scores of mean-pooled q and k, per query tile. The projection (d x d, shared by the heads, as in the
authors' code) starts at 0: a fresh layer is its sparse part, and nothing is summed that was not learned. Their code feeds
all keys to the linear part; here, as in the paper, only marginal tiles. Rounding is ours: critical up, negligible down.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.linear.api import FEATURE_MAPS, Segments, linear_attention
from freqformer.methods.base import Method, even_lists, plain_aux
from freqformer.tables.topk import block_topk, pool_tiles


@dataclasses.dataclass(frozen=True)
class SparseLinear(Method):
  """Fields of the method.

  Attributes:
    critical: share of key tiles that get softmax attention, at least one tile.
    negligible: share of key tiles that are skipped; what lies between is linear.
    feature_map: a name of `kernels.linear.api.FEATURE_MAPS`.
  """

  critical: float = 0.05
  negligible: float = 0.10
  feature_map: str = "softmax"

  def __post_init__(self):
    if (
      not 0 < self.critical <= 1
      or not 0 <= self.negligible < 1
      or self.critical + self.negligible > 1
    ):
      raise ValueError(
        f"{self.critical=} must be in (0, 1] and {self.negligible=} in [0, 1), together at most 1."
      )
    if self.feature_map not in FEATURE_MAPS:
      raise ValueError(f"{self.feature_map=} must be one of {tuple(FEATURE_MAPS)}.")

  def budgets(self, tiles: int) -> tuple[int, int]:
    """Critical and negligible key tiles per query tile."""
    critical = math.ceil(self.critical * tiles)
    return critical, min(math.floor(self.negligible * tiles), tiles - critical)

  def build(self, dims, layout, rngs):
    return nnx.Linear(
      dims.head_dim, dims.head_dim, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
    )

  def __call__(self, module, qkv, cond, tables, state):
    layout, block = qkv.layout, qkv.layout.layout.block
    q, k = qkv.rotated()
    pools = [cond.share(pool_tiles(jax.lax.stop_gradient(x), layout)) for x in (q, k)]
    mask, worst = (
      self._rank(sign * pools[0], pools[1], i, layout) for i, sign in enumerate((1, -1))
    )
    out, _ = attention(q, k, qkv.v, mask, implementation=qkv.implementation)
    segments, marginal = (
      Segments.of_tiles(layout.kv_len, block),
      ~(mask.to_tiles() | worst.to_tiles()),
    )
    how = dict(feature_map=self.feature_map, implementation=qkv.other_ops_implementation)
    linear, _ = linear_attention(q, k, qkv.v, segments, reads=marginal, **how)
    aux = plain_aux(mask, layout.layout.n, q.shape[0], q.shape[2], cond.want_masks)
    return out + module(linear).astype(out.dtype), state, aux

  def _rank(self, q_pool, k_pool, which, layout):
    """The lists of the best (or, with -q, worst) tiles, as many as the budget says."""
    budget, none = (
      self.budgets(layout.layout.tiles)[which],
      np.zeros((layout.layout.tiles, 0), np.int32),
    )
    mask = block_topk(q_pool, k_pool, max(budget, 1), none, layout.kv_len, layout.layout.block)
    ids, counts = checkpoint_name(mask.kv_indices, "tables"), jnp.full_like(mask.kv_counts, budget)
    return dataclasses.replace(mask, kv_indices=ids, kv_counts=counts)

  def pairs(self, layout, heads, allocation=None, phase=None):
    """Counts critical tiles of average length."""
    critical, _ = self.budgets(layout.tiles)
    return even_lists(layout, heads, layout.n * critical * layout.n / layout.tiles)
