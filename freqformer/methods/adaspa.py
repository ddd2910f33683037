"""AdaSpa (arXiv 2502.21079): block-sparse attention with masks searched exactly, online.

Runs on any dense checkpoint. A run begins with dense steps. A search computes the exact softmax
mass of every pair of tiles (`kernels/selection/block_scores.py`) from each row's LSE, which changes
little between steps: the first search's dense pass gives it, later ones reuse it, and masks stay
between searches. Each query tile keeps the key tiles with the most mass; easy heads give budget to
hard ones. The paper's: steps {10, 30} of 50 after 10 dense ones, sparsity and recall 0.8, levels.
"""

# choice: the own tile is always kept; sink tiles stand for the text blocks that this model lacks.
# Two more, where the paper is silent, are in `AdaSpa.budgets` and `levels`.

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from freqformer.config import ConfigError, require, require_one_of
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.selection.block_scores import block_mass
from freqformer.methods.base import Method, even_lists, plain_aux
from freqformer.tables.adaspa_memory import (
  LSE_DTYPES,
  LSE_KINDS,
  empty_lse,
  lists_of_bits,
  load_lse,
  store_lse,
  top_bits,
  unpack_bits,
)
from freqformer.tables.dense import dense
from freqformer.tables.topk import fixed_tiles


@dataclasses.dataclass(frozen=True)
class AdaSpa(Method):
  """Fields of the method; a step may be a share of the run: 0.2 of 50 steps is step 10.

  Attributes:
    sparsity: share of key tiles that a head at the base level does not list.
    warmup: number of dense steps before anything is searched.
    search: steps that search, ascending; all up to the first are dense, its own output included.
    recall: a head whose base mask keeps more than this share of its softmax mass counts as easy.
    adaptive: gives tiles of easy heads to hard ones (three levels); otherwise all have the base.
    sink: first tiles that every list holds, inside the budget. The own tile is always listed.
    lse_cache: "row" keeps each row's LSE between searches, "tile" one mean per query tile (smaller,
      approximate: all rows of a tile then weigh as if their LSE were equal).
    lse_dtype: "bfloat16", "float32", or "uint8" (rows only: steps within a tile's range).
  """

  sparsity: float = 0.8
  warmup: int | float = 0.2
  search: tuple[int | float, ...] = (0.2, 0.6)
  recall: float = 0.8
  adaptive: bool = True
  sink: int = 0
  lse_cache: str = "row"
  lse_dtype: str = "bfloat16"

  shares_state = True
  usual_phase = "reuse"

  def __post_init__(self):
    require(self, "sparsity", least=0, below=1)
    require(self, "recall", least=0, most=1)
    require(self, "sink", least=0)
    require_one_of(self, "lse_cache", LSE_KINDS)
    require_one_of(self, "lse_dtype", LSE_DTYPES)
    if self.lse_cache == "tile" and self.lse_dtype == "uint8":
      raise ValueError(
        "lse_dtype='uint8' needs lse_cache='row': it holds steps within a tile's range."
      )
    if not self.search:
      raise ValueError("search=() names no step that searches; give at least one, e.g. (0.2, 0.6).")
    for name, values in (("warmup", (self.warmup,)), ("search", self.search)):
      if any(v < 0 or isinstance(v, float) and v >= 1 for v in values):
        raise ValueError(
          f"{name}={getattr(self, name)} must hold steps (integers >= 0) or shares of the run in "
          "[0, 1)."
        )

  def _steps(self, steps: int) -> tuple[int, tuple[int, ...]]:
    """Warm-up steps and search steps in a run of `steps`; shares on one step are one search."""

    def at(v):
      return int(v * steps + 1e-6) if isinstance(v, float) else v

    return at(self.warmup), tuple(dict.fromkeys(at(v) for v in self.search))

  def check_run(self, steps):
    warmup, search = self._steps(steps)
    if warmup > steps:
      raise ConfigError(
        f"adaspa.warmup={self.warmup} is longer than the run of {steps} steps; lower it or give a "
        "share such as 0.2."
      )
    if list(search) != sorted(search):
      raise ConfigError(
        f"adaspa.search={self.search} means steps {search} of {steps}; give them in ascending "
        "order."
      )
    if search[-1] >= steps:
      raise ConfigError(
        f"adaspa.search step {search[-1]} comes after the last step of a run of {steps} "
        f"(0..{steps - 1}); lower it or give shares such as 0.6."
      )
    if search[0] < warmup:
      raise ConfigError(
        f"adaspa.search step {search[0]} lies in the warm-up of {warmup} dense steps; search at "
        f"{warmup} or later."
      )

  def phase(self, step, steps):
    search = self._steps(steps)[1]
    if step <= search[0]:
      return "search_first" if step == search[0] else "warmup"
    return "search" if step in search else "reuse"

  def refuses_dense(self, phase):
    if phase in ("search_first", "search"):
      return "it searches there (adaspa.search), and later evaluations need what it finds"
    return None

  def budgets(self, layout) -> tuple[int, int, int]:
    """Key tiles per query tile of heads at the (high, base, low) sparsity level.

    The paper's levels (1 + s) / 2, s, (3 s - 1) / 2 are the base density 1 - s and half of it less
    or more: in whole tiles, the base and half of it (rounded down) moved.

    Raises:
      ConfigError: if the density rounds to no tile or to fewer than the own and sink tiles.
    """
    tiles = layout.tiles
    base = int((1 - self.sparsity) * tiles + 0.5)
    least = min(self.sink + 1, tiles)
    if base < 1:
      raise ConfigError(
        f"adaspa.sparsity={self.sparsity} of {tiles} tiles rounds to no tile per query tile; "
        f"lower it to {math.floor(1000 * (1 - 0.5 / tiles)) / 1000:g} or less, or use smaller "
        f"tiles (attention.block={layout.block})."
      )
    if base < least:
      raise ConfigError(
        f"adaspa.sparsity={self.sparsity} of {tiles} tiles leaves {base} per query tile, fewer "
        f"than the own tile and sink={self.sink}; lower one of them."
      )
    # choice: a hard head takes no more tiles than there are (the low level may be below 0), an easy
    # head keeps own and sink tiles. Both are cut alike: the mean over heads is exactly the base.
    moved = min(base // 2, tiles - base, base - least) if self.adaptive else 0
    return base - moved, base, base + moved

  def build(self, dims, layout, rngs):
    self.budgets(layout)

  def tables(self, layout):
    self.budgets(layout)
    return {"dense": dense(layout), "fixed": fixed_tiles(layout, self.sink)}

  def init_state(self, batch, dims, layout):
    bits = jnp.zeros((batch, dims.heads, layout.tiles, -(-layout.tiles // 8)), jnp.uint8)
    return {"bits": bits, **empty_lse(self.lse_cache, self.lse_dtype, bits.shape[:2], layout)}

  def __call__(self, module, qkv, cond, tables, state):
    arrays = qkv.layout
    b, _, h, _ = qkv.q.shape
    q, k = qkv.rotated()
    own = slice(b // 2 if cond.guided else b)  # the half whose masks both run with

    def find(lse):
      return self.find(q[own], k[own], lse, arrays, tables["fixed"], qkv.other_ops_implementation)

    found = {}
    mask = tables["dense"]
    if cond.phase == "search":
      bits, found = find(load_lse(self.lse_cache, state, arrays))
      state = {**state, "bits": bits}
    if cond.phase in ("search", "reuse"):
      mask = self.mask(state["bits"], arrays)
      if cond.guided and mask.kv_counts.shape[0] > 1:
        mask = dataclasses.replace(
          mask,
          kv_indices=jnp.concatenate([mask.kv_indices] * 2),
          kv_counts=jnp.concatenate([mask.kv_counts] * 2),
        )
    out, lse = attention(q, k, qkv.v, mask, implementation=qkv.implementation)
    if cond.phase == "search_first":
      bits, found = find(lse[own])
      state = {"bits": bits, **store_lse(self.lse_cache, self.lse_dtype, lse[own], arrays)}
    aux = plain_aux(mask, arrays.n, b, h, cond.want_masks) | found
    if found:  # a search costs q k^T, half of dense attention, of its own samples
      aux["cost"] += np.float32(0.5 * len(found["recall"]) / b)
    return out, state, aux

  def find(self, q, k, lse, arrays, fixed, implementation=None):
    """Searches for the key tiles of largest exact block mass and each head's level by its recall.

    Args:
      q, k: `[b, n_buffer, h, d]`, normed and rotated.
      lse: `[b, h, n_buffer]` or `[b, h, tiles]`, fresh or cached.
      arrays: of the layout.
      fixed: int `[tiles, f]`, tiles that a query tile always lists.
      implementation: of `block_mass`.

    Returns:
      bits uint8 `[b, h, tiles, ceil(tiles / 8)]`, and `[b, h]` under "recall" (share of the mass
      that the base budget keeps) and "level" (0, 1, 2 for high, base, low sparsity).
    """
    layout = arrays.layout
    fixed = jnp.asarray(fixed)
    counts = self.budgets(layout)

    def keep(mass, tile):
      bits = top_bits(mass, counts, fixed[jnp.minimum(tile, layout.tiles - 1)])
      kept = jnp.where(unpack_bits(bits[:, 1], layout.tiles), mass, 0)
      return {"bits": bits, "kept": kept.sum(-1), "all": mass.sum(-1)}

    found = block_mass(
      q, k, lse, arrays.kv_len, layout.block, reduce=keep, implementation=implementation
    )
    recall = found["kept"].sum(-1) / found["all"].sum(-1)
    level = levels(recall, self.recall)
    bits = jnp.take_along_axis(found["bits"], level[:, :, None, None, None], 3)[:, :, :, 0]
    return bits, {"recall": recall, "level": level}

  def mask(self, bits, arrays) -> BlockMask:
    """Builds the lists of one layer's bits."""
    layout = arrays.layout
    return lists_of_bits(bits, self.budgets(layout)[2], arrays.kv_len, layout.block)

  def pairs(self, layout, heads, allocation=None, phase=None):
    """Counts dense steps as dense, others with the base budget of average tiles, the mean of heads.

    Heads differ (`budgets`), as only a search tells: where whole heads are dealt to devices
    beforehand, the busiest one may have 1.5 times the mean attention.
    """
    if phase in ("", "warmup", "search_first"):
      return even_lists(layout, heads, layout.n**2)
    return even_lists(layout, heads, layout.n * self.budgets(layout)[1] * layout.n / layout.tiles)


def levels(recall: jax.Array, threshold: float) -> jax.Array:
  """Returns each head's level, int32 `[b, h]`: 0 gives tiles, 1 keeps its budget, 2 takes tiles.

  n = heads with recall > threshold; the n best give, the n worst take (AdaSpa).
  """
  # choice: n is at most h // 2, so that no head does both; ties go by the head's number.
  heads = recall.shape[-1]
  rank = jnp.argsort(jnp.argsort(-recall, -1, stable=True), -1, stable=True)
  n = jnp.minimum((recall > threshold).sum(-1, keepdims=True), heads // 2)
  return jnp.where(rank < n, 0, jnp.where(rank >= heads - n, 2, 1)).astype(jnp.int32)
