"""The portable backend: plain XLA, any device, any shape. The CPU's and TPU's path, and fast there.

One row of work = the query tile of one head and its list. Rows run in groups of a few, in order of falling list length, so
that the loop over key chunks of a group (a dynamic bound) does no work for shorter lists and none at all for empty ones.
Each step gathers a chunk of listed tiles and does two dense matmuls: nothing of size n x n, and no gathered copy of K or V
larger than one group's chunk, ever exists.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Chosen by measurement on 2 CPU cores (docs/log.md): larger groups leave the cache, smaller ones pay for dispatch.
_GROUP_ROWS = 1024  # query rows that run together
_CHUNK_KEYS = 1024  # keys per step


def unsupported(q, k, v, mask, target) -> str | None:
  """XLA runs everything."""
  return None


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Rows of work and where their data lie; flat tiles are numbered `(sample * h + head) * tiles + tile`."""

  rows: jax.Array  # int32 [groups, g], row ids by falling count; `num_rows` marks filler
  counts: jax.Array  # int32 [groups, g]
  num_rows: int
  chunk: int  # key tiles per step

  @classmethod
  def of(cls, mask, b, h):
    num_rows = b * h * mask.q_tiles
    counts = jnp.broadcast_to(jnp.asarray(mask.kv_counts), (b, h, mask.q_tiles)).reshape(-1)
    group = max(1, min(num_rows, _GROUP_ROWS // mask.block_q))
    filler = -num_rows % group
    order = jnp.argsort(-counts, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, filler), constant_values=num_rows).reshape(-1, group)
    chunk = max(1, min(mask.max_kv, _CHUNK_KEYS // mask.block_kv))
    return cls(order, jnp.take(counts, order, mode="fill", fill_value=0), num_rows, chunk)


def _tiles(x, block, tiles):
  """`[b, n, h, d] -> [b * h * tiles, block, d]`, in float32 (or float64), zero-padded to whole tiles."""
  b, n, h, d = x.shape
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).transpose(0, 2, 1, 3)
  return jnp.pad(x, ((0, 0), (0, 0), (0, tiles * block - n), (0, 0))).reshape(b * h * tiles, block, d)


def _untile(x, b, h, n):
  """The inverse of `_tiles`, padding dropped: `[b * h * tiles, block, d] -> [b, n, h, d]`."""
  return x.reshape(b, h, -1, x.shape[-1])[:, :, :n].transpose(0, 2, 1, 3)


class _Table:
  """Reads chunks of a `BlockMask` for groups of rows."""

  def __init__(self, mask, plan, b, h, n_kv):
    self.mask, self.plan, self.b, self.h = mask, plan, b, h
    # The buffer may end inside its last tile.
    bound = np.clip(n_kv - np.arange(mask.kv_tiles) * mask.block_kv, 0, mask.block_kv)
    self.kv_len = jnp.minimum(jnp.asarray(mask.kv_len), bound.astype(np.int32)).reshape(-1)
    self.lists = None if mask.kv_indices is None else jnp.asarray(mask.kv_indices).reshape(-1, mask.max_kv)
    self.bias = None if mask.kv_bias is None else jnp.asarray(mask.kv_bias)

  def chunk(self, rows, counts, step):
    """Tiles `step * chunk ...` of each row.

    Returns:
      ids: int32 `[g, c]`, flat key tiles; seen: bool `[g, 1, c * block_kv]`; bias: `[g, 1, c * block_kv]` or 0.
    """
    mask = self.mask
    slots = step * self.plan.chunk + jnp.arange(self.plan.chunk, dtype=jnp.int32)
    sample_head, tile = rows // mask.q_tiles, rows % mask.q_tiles
    sample = jnp.minimum(sample_head // self.h, self.b - 1)
    inside = jnp.minimum(slots, mask.max_kv - 1)
    if self.lists is None:
      ids = jnp.broadcast_to(inside, (rows.shape[0], self.plan.chunk))
    else:
      table_b, table_h = mask.kv_counts.shape[:2]
      head = sample_head % self.h
      lead = (sample if table_b > 1 else 0) * table_h + (head if table_h > 1 else 0)
      ids = self.lists.at[lead * mask.q_tiles + tile].get(mode="clip")[:, inside]
    kv_len = self.kv_len[(sample[:, None] * mask.kv_tiles if mask.kv_len.ndim == 2 and mask.kv_len.shape[0] > 1 else 0) + ids]
    kv_len = jnp.where(slots < counts[:, None], kv_len, 0)
    seen = jnp.arange(mask.block_kv, dtype=jnp.int32) < kv_len[..., None]
    bias = 0 if self.bias is None else jnp.repeat(self.bias[ids], mask.block_kv, axis=-1)[:, None]
    flat = jnp.minimum(sample_head, self.b * self.h - 1)[:, None] * mask.kv_tiles + ids
    return flat, seen.reshape(rows.shape[0], 1, -1), bias

  def steps(self, counts):
    """Chunks that the longest list of a group needs."""
    return (counts.max() + self.plan.chunk - 1) // self.plan.chunk


def _gather(tiles, ids):
  """`[tiles, block, d], [g, c] -> [g, c * block, d]`."""
  return tiles[ids].reshape(ids.shape[0], -1, tiles.shape[-1])


def _dot(equation, x, y):
  return jnp.einsum(equation, x, y, precision="highest")


def forward(q, k, v, mask, scale):
  """Online softmax over chunks; shapes as in `kernels.attention.attention`."""
  (b, n_q, h, _), n_kv = q.shape, k.shape[1]
  plan = _Plan.of(mask, b, h)
  table = _Table(mask, plan, b, h, n_kv)
  q_tiles = _tiles(q, mask.block_q, mask.q_tiles)
  k_tiles, v_tiles = (_tiles(x, mask.block_kv, mask.kv_tiles) for x in (k, v))

  def group(args):
    rows, counts = args
    queries = q_tiles.at[rows].get(mode="clip") * scale

    def step(i, carry):
      out, top, total = carry
      ids, seen, bias = table.chunk(rows, counts, i)
      scores = jnp.where(seen, _dot("gid,gjd->gij", queries, _gather(k_tiles, ids)) + bias, -jnp.inf)
      new = jnp.maximum(top, scores.max(-1))
      safe = jnp.where(new > -jnp.inf, new, 0)
      p = jnp.exp(scores - safe[..., None])
      shrink = jnp.exp(top - safe)
      out = out * shrink[..., None] + _dot("gij,gjd->gid", p, _gather(v_tiles, ids))
      return out, new, total * shrink + p.sum(-1)

    empty = jnp.full(queries.shape[:2], -jnp.inf, queries.dtype)
    out, top, total = lax.fori_loop(0, table.steps(counts), step, (jnp.zeros_like(queries), empty, jnp.zeros_like(empty)))
    some = total > 0
    total = jnp.where(some, total, 1)
    return out / total[..., None], jnp.where(some, top + jnp.log(total), -jnp.inf)

  outs, lses = lax.map(group, (plan.rows, plan.counts))
  back = (
    jnp.zeros(plan.num_rows, jnp.int32)
    .at[plan.rows.reshape(-1)]
    .set(jnp.arange(plan.rows.size, dtype=jnp.int32), mode="drop", unique_indices=True)
  )
  outs, lses = (x.reshape(-1, *x.shape[2:])[back] for x in (outs, lses))
  return _untile(outs, b, h, n_q).astype(q.dtype), _untile(lses[..., None], b, h, n_q)[..., 0].transpose(0, 2, 1)


def backward(q, k, v, mask, scale, lse, delta, d_out):
  """One pass over the same rows: dQ stays with its row, dK and dV are added tile by tile, in a fixed order."""
  (b, n_q, h, _), n_kv = q.shape, k.shape[1]
  plan = _Plan.of(mask, b, h)
  table = _Table(mask, plan, b, h, n_kv)
  q_tiles, do_tiles = (_tiles(x, mask.block_q, mask.q_tiles) for x in (q, d_out))
  k_tiles, v_tiles = (_tiles(x, mask.block_kv, mask.kv_tiles) for x in (k, v))
  lse = jnp.where(lse > -jnp.inf, lse, 0)  # rows without keys: their P is 0 by the mask
  lse, delta = (_tiles(x.transpose(0, 2, 1)[..., None], mask.block_q, mask.q_tiles) for x in (lse, delta))

  def group(carry, args):
    rows, counts = args
    queries, d_rows, lse_rows, delta_rows = (x.at[rows].get(mode="clip") for x in (q_tiles, do_tiles, lse, delta))

    def step(i, carry):
      dq, dk, dv = carry
      ids, seen, bias = table.chunk(rows, counts, i)
      keys, values = _gather(k_tiles, ids), _gather(v_tiles, ids)
      scores = _dot("gid,gjd->gij", queries * scale, keys) + bias
      p = jnp.where(seen, jnp.exp(scores - lse_rows), 0)
      ds = p * (_dot("gid,gjd->gij", d_rows, values) - delta_rows) * scale
      dq += _dot("gij,gjd->gid", ds, keys)
      shape = (*ids.shape, *k_tiles.shape[1:])
      dk = dk.at[ids].add(_dot("gij,gid->gjd", ds, queries).reshape(shape))
      dv = dv.at[ids].add(_dot("gij,gid->gjd", p, d_rows).reshape(shape))
      return dq, dk, dv

    dq, dk, dv = lax.fori_loop(0, table.steps(counts), step, (jnp.zeros_like(queries), *carry))
    return (dk, dv), dq

  (dk, dv), dq = lax.scan(group, (jnp.zeros_like(k_tiles), jnp.zeros_like(v_tiles)), (plan.rows, plan.counts))
  dq = jnp.zeros_like(q_tiles).at[plan.rows.reshape(-1)].set(dq.reshape(-1, *dq.shape[2:]), mode="drop", unique_indices=True)
  return _untile(dq, b, h, n_q), _untile(dk, b, h, n_kv), _untile(dv, b, h, n_kv)
