"""Exact softmax mass per (query tile, key tile), from a row LSE that is already known.

mass[I, J] is the sum of exp(scale q_i k_j - LSE_i) over valid rows i of I and keys j of J. With
the true LSE a query tile's masses sum to its valid rows; with one of another denoising step, or one
per tile, they need not (AdaSpa, arXiv 2502.21079, searches so). One pass without v, 2 of
attention's 4 FLOPs. Only scores of a group of query tiles against a chunk of keys exist. `forward`
passes scores through memory; on Hopper they stay in registers (`hopper_block_scores.py`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from freqformer.kernels.core.op import Op, Split
from freqformer.kernels.core.target import current_target
from jax import lax

# Scores of one step. On 2 CPU cores 1,024 x 1,024 was fastest; on a GPU, where each step is a few
# launches, it must be larger. choice: 2^26 (256 MB) is a guess that has not been measured.
_SCORES = {"cpu": 1 << 20}
_SCORES_ELSEWHERE = 1 << 26
_GROUP_ROWS = 1024  # query rows that run together, at most
# exp's argument is cut here: scores may far exceed a cached LSE; infinities do not compare.
LARGEST_EXPONENT = 60.0

BLOCK_MASS = Op(
  name="block mass",
  implementations={"hopper": "selection.hopper_block_scores", "xla": "selection.block_scores"},
  forward=Split(("b.h.", "b.h.", "bh.", "b."), "bh"),
)


def block_mass(
  q: jax.Array,
  k: jax.Array,
  lse: jax.Array,
  kv_len: jax.typing.ArrayLike,
  block: int,
  *,
  scale: float | None = None,
  reduce: Callable | None = None,
  implementation: str | None = None,
) -> Any:
  """Returns the mass of every pair of tiles, or what `reduce` makes of it.

  Args:
    q, k: `[b, n, h, d]`, one buffer of tiles; what padding rows hold is not seen.
    lse: natural log, any float dtype: `[b, h, n]` per row, or `[b, h, tiles]` one for all rows of a
      query tile (told apart by their length; a row whose LSE is not finite counts nothing).
    kv_len: int32 `[tiles]` or `[b, tiles]`, valid rows per tile, valid first: of keys and queries.
    block: rows of a tile.
    scale: multiplies q k^T; default `1 / sqrt(d)`.
    reduce: `(mass [g, tiles], query tiles int32 [g]) -> pytree of [g, ...]`, row by row; applied
      group by group, so that masses of all heads never exist together. A group may hold tiles of
      several heads, and rows that are not query tiles, whose results are dropped.
    implementation: of `BLOCK_MASS.implementations`; None: the first that supports the call.

  Returns:
    float32 `[b, h, tiles, tiles]`, or `reduce`'s pytree with leading `[b, h, tiles]`.

  Raises:
    ValueError: if shapes contradict each other, or the implementation is unknown.
    NotImplementedError: if the named implementation does not support the call, with the reason.
  """
  b, n, h, d = q.shape
  kv_len = jnp.atleast_2d(jnp.asarray(kv_len))
  tiles = kv_len.shape[-1]
  if q.shape != k.shape or n != tiles * block:
    raise ValueError(
      f"block_mass takes q, k over one buffer of {tiles} tiles of {block} rows; got {q.shape=}, "
      f"{k.shape=}."
    )
  if lse.shape not in ((b, h, n), (b, h, tiles)):
    raise ValueError(
      f"lse must be [b, h, n] = {(b, h, n)} or [b, h, tiles] = {(b, h, tiles)}, got {lse.shape}."
    )
  scale = 1.0 / math.sqrt(d) if scale is None else float(scale)
  name = BLOCK_MASS.choose(q, block, implementation=implementation)
  return BLOCK_MASS.run(name, (q, k, lse, kv_len), block=block, scale=scale, reduce=reduce)


def row_shifts(lse: jax.Array, kv_len: jax.Array, block: int) -> jax.Array:
  """Returns each row's LSE, infinite where it counts nothing: float32 `[b, h, tiles, block]`."""
  b, h, tiles = *lse.shape[:2], kv_len.shape[-1]
  valid = jnp.arange(block) < kv_len[:, None, :, None]
  shifts = jnp.broadcast_to(lse.astype(jnp.float32).reshape(b, h, tiles, -1), (b, h, tiles, block))
  return jnp.where(valid & jnp.isfinite(shifts), shifts, jnp.inf)


def forward(q, k, lse, kv_len, *, block, scale, reduce):
  """Computes head after head, group after group."""
  b, _, h, d = q.shape
  tiles = kv_len.shape[-1]
  group = max(1, min(tiles, _GROUP_ROWS // block))
  filler = -tiles % group
  numbers = jnp.arange(tiles + filler, dtype=jnp.int32).reshape(-1, group)

  def one_head(i):
    sample, head = i // h, i % h
    lengths = kv_len[sample if len(kv_len) > 1 else 0]
    valid = jnp.arange(block) < lengths[:, None]
    queries, keys = (_rows_of(x, sample, head).reshape(tiles, block, d) for x in (q, k))
    shifts = row_shifts(lse[sample, head][None, None], lengths[None], block)[0, 0]
    queries = jnp.pad(queries, ((0, filler), (0, 0), (0, 0)))
    shifts = jnp.pad(shifts, ((0, filler), (0, 0)), constant_values=jnp.inf)

    def rows(args):
      queries, shifts, tile = args
      mass = _row_mass(queries, shifts, keys, valid, scale)
      return mass if reduce is None else reduce(mass, tile)

    groups = queries.reshape(-1, group, block, d), shifts.reshape(-1, group, block), numbers
    found = lax.map(rows, groups)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tiles], found)

  found = lax.map(one_head, jnp.arange(b * h))
  return jax.tree.map(lambda x: x.reshape(b, h, *x.shape[1:]), found)


def _rows_of(x, sample, head):
  """Returns one head's rows: `[b, n, h, d] -> [n, d]`."""
  _, n, _, d = x.shape
  return lax.dynamic_slice(x, (sample, 0, head, 0), (1, n, 1, d)).reshape(n, d)


def _row_mass(queries, shifts, keys, valid, scale):
  """Returns the mass `[g, tiles]` of queries `[g, block, d]` on keys `[tiles, block, d]`."""
  group, block, _ = queries.shape
  tiles = keys.shape[0]
  scores = _SCORES.get(current_target().platform, _SCORES_ELSEWHERE)
  most = max(1, scores // (group * block * block))
  chunk = -(-tiles // -(-tiles // most))  # equal chunks

  def in_chunks(x):
    x = jnp.pad(x, ((0, -tiles % chunk),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(-1, chunk * block, *x.shape[2:])

  def step(args):
    keys, seen = args
    scores = jnp.einsum(
      "gid,jd->gij", queries, keys, precision="highest", preferred_element_type=jnp.float32
    )
    exponents = jnp.minimum(scores * scale - shifts[..., None], LARGEST_EXPONENT)
    p = jnp.where(seen, jnp.exp(exponents), 0)
    # Rows first: one fast reduction, then a small one.
    return p.sum(1).reshape(group, chunk, block).sum(-1)

  keys = jnp.where(valid[..., None], keys, 0)
  found = lax.map(step, (in_chunks(keys), in_chunks(valid)))
  return found.transpose(1, 0, 2).reshape(group, -1)[:, :tiles]
