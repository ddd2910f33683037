"""The portable implementation: plain XLA, any device, any shape. The CPU's and TPU's path.

A row of work is a head's query tile and its list. Rows run in small groups by falling list length,
so that a group's loop (a dynamic bound) does little for shorter lists; empty rows do not run. Each
step gathers a chunk of listed tiles and does dense matmuls: no more of K or V is ever copied.
Matmuls mask: keys carry one more column, 0 (or the tile's bias) in valid rows and `_HIDDEN` in
padding, queries a 1 there, and slots behind a list's count read one more tile, hidden as a whole.
Keys and values may have fewer heads than queries: nothing is repeated for them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.core.varying import vary_over, varying_axes
from jax import lax

# On 2 CPU cores (docs/log.md) larger groups leave the cache, smaller ones pay for dispatch.
_GROUP_ROWS = 1024  # query rows that run together
_CHUNK_KEYS = 1024  # keys per step, at most
# Query head i reads head `i // (h // h_kv)` of k and v, whose gradients add up over its readers.
GROUPED_HEADS = True
# Not "reverse": the number of a loop's steps is known to it alone.
SECOND_DERIVATIVES = ("forward",)
# The score of what may not be seen. Finite: it survives a matmul on devices that split floats, and
# where a row has seen nothing, exp(_HIDDEN - score) is still 0 for every true score.
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Rows of work and the tiles they list; flat tiles are `(sample * h + head) * tiles + tile`.

  Those of keys and values count the heads that these have, `h_kv`.

  Attributes:
    rows: int32 `[groups, g]`, row ids by falling count, then filler.
    counts: int32 `[groups, g]`.
    lists: int32 `[table rows, max_kv]`, or None for all tiles in order.
    table_row: int32 `[groups, g]`, into `lists`.
    first_tile: int32 `[groups, g]`, flat number of key tile 0 of the row's sample and key head.
    hidden_tile: flat number of the tile behind the last.
    chunk: key tiles per step.
  """

  rows: jax.Array
  counts: jax.Array
  lists: jax.Array | None
  table_row: jax.Array
  first_tile: jax.Array
  hidden_tile: int
  chunk: int

  @classmethod
  def of(cls, mask, b, h, h_kv):
    num_rows = b * h * mask.q_tiles
    table_b, table_h = mask.kv_counts.shape[:2]
    counts = jnp.broadcast_to(jnp.asarray(mask.kv_counts), (b, h, mask.q_tiles)).reshape(-1)
    group = max(1, min(num_rows, _GROUP_ROWS // mask.block_q))
    order = jnp.argsort(-counts, stable=True).astype(jnp.int32)
    # Filler is out of bounds, hence never stored.
    filler = jnp.arange(num_rows, num_rows + -num_rows % group, dtype=jnp.int32)
    rows = jnp.concatenate([order, filler]).reshape(-1, group)
    sample_head, tile = jnp.divmod(jnp.minimum(rows, num_rows - 1), mask.q_tiles)
    sample, head = jnp.divmod(sample_head, h)
    table = (sample if table_b > 1 else 0) * table_h + (head if table_h > 1 else 0)
    steps = max(1, -(-mask.max_kv * mask.block_kv // _CHUNK_KEYS))
    indices = mask.kv_indices
    return cls(
      rows=rows,
      counts=jnp.take(counts, rows, mode="fill", fill_value=0),
      lists=None if indices is None else jnp.asarray(indices).reshape(-1, mask.max_kv),
      table_row=table * mask.q_tiles + tile,
      first_tile=(sample * h_kv + head // (h // h_kv)) * mask.kv_tiles,
      hidden_tile=b * h_kv * mask.kv_tiles,
      # Equal chunks: a list of 9 is 5 + 4, not 8 + 1.
      chunk=max(1, math.ceil(mask.max_kv / steps)),
    )

  def live_groups(self):
    """Returns the number of groups with anything to do; sorted rows put them first."""
    return (self.counts[:, 0] > 0).sum(dtype=jnp.int32)

  def steps(self, group):
    """Returns the number of chunks that the longest list of a group needs."""
    return (self.counts[group, 0] + self.chunk - 1) // self.chunk

  def tiles(self, group, step):
    """Returns the flat key tiles of one chunk of each row's list: int32 `[g, chunk]`."""
    slots = step * self.chunk + jnp.arange(self.chunk, dtype=jnp.int32)
    ids = slots[None]
    if self.lists is not None:
      ids = self.lists[self.table_row[group]].at[:, slots].get(mode="clip")
    return jnp.where(
      slots < self.counts[group][:, None], self.first_tile[group][:, None] + ids, self.hidden_tile
    )


def _view(x, block, tiles):
  """Returns `[b, n, h, d]` as `[b, tiles, block, h, d]`: no copy unless n ends inside a tile."""
  b, n, h, d = x.shape
  return jnp.pad(x, ((0, 0), (0, tiles * block - n), (0, 0), (0, 0))).reshape(b, tiles, block, h, d)


def _unview(x, n):
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :n]


def _row_view(x, block, tiles):
  """Returns one number per query row, `[b, h, n]`, as `[b * h * tiles, block]`."""
  return jnp.pad(x, ((0, 0), (0, 0), (0, tiles * block - x.shape[-1]))).reshape(-1, block)


def _at(view, flat):
  """Returns a view's tiles by flat number, to read or update; behind the last is out of bounds."""
  sample_head, tile = jnp.divmod(flat, view.shape[1])
  sample, head = jnp.divmod(sample_head, view.shape[3])
  return view.at[sample, tile, :, head]


def _read(view, flat):
  """Returns `[..., block, d]` of flat tiles `[...]`, in at least float32; zeros out of bounds."""
  x = _at(view, flat).get(mode="fill", fill_value=0)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _key_tiles(k, mask):
  """Returns `[b * h * kv_tiles + 1, block_kv, d + 1]`, padding rows zeroed, last tile hidden."""
  _, n, _, d = k.shape
  block = mask.block_kv
  dtype = jnp.promote_types(k.dtype, jnp.float32)
  # The buffer may end inside its last tile.
  bound = np.clip(n - np.arange(mask.kv_tiles) * block, 0, block).astype(np.int32)
  kv_len = jnp.minimum(jnp.asarray(mask.kv_len), bound).reshape(-1, 1, mask.kv_tiles, 1)
  valid = (jnp.arange(block, dtype=jnp.int32) < kv_len)[..., None]
  k = _view(k, block, mask.kv_tiles).astype(dtype).transpose(0, 3, 1, 2, 4)
  bias = jnp.zeros(mask.kv_tiles)
  if mask.kv_bias is not None:
    bias = jnp.maximum(jnp.asarray(mask.kv_bias), _HIDDEN)
  column = jnp.where(valid, bias[:, None, None].astype(dtype), _HIDDEN)
  column = jnp.broadcast_to(column, (*k.shape[:-1], 1))
  tiles = jnp.concatenate([jnp.where(valid, k, 0), column], -1).reshape(-1, block, d + 1)
  hidden = jnp.zeros((1, block, d + 1), dtype).at[..., d].set(_HIDDEN)
  return jnp.concatenate([tiles, hidden])


def _join(x):
  """Returns the tiles of a chunk in a row: `[g, c, block, d]` as `[g, c * block, d]`."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _with_one(queries):
  """Returns queries `[g, i, d + 1]` that let the masking column of the keys through."""
  return jnp.pad(queries, ((0, 0), (0, 0), (0, 1)), constant_values=1)


def _dot(equation, x, y):
  return jnp.einsum(equation, x, y, precision="highest")


def forward(q, k, v, mask, *, scale):
  """Returns out and LSE by an online softmax over chunks."""
  b, n_q, h, _ = q.shape
  plan = _Plan.of(mask, b, h, k.shape[2])
  varying = varying_axes((q, k, v, mask))
  k_tiles = _key_tiles(k, mask)
  q = _view(q, mask.block_q, mask.q_tiles)
  v = _view(v, mask.block_kv, mask.kv_tiles)

  def group(i, carry):
    outs, lses = carry
    rows = plan.rows[i]
    queries = _read(q, rows) * scale
    keyed = _with_one(queries)

    def step(j, carry):
      out, top, total = carry
      ids = plan.tiles(i, j)
      scores = _dot("gid,gjd->gij", keyed, _join(k_tiles[ids]))
      new = jnp.maximum(top, scores.max(-1))
      p = jnp.exp(scores - new[..., None])
      shrink = jnp.exp(top - new)
      out = out * shrink[..., None] + _dot("gij,gjd->gid", p, _join(_read(v, ids)))
      return out, new, total * shrink + p.sum(-1)

    top = jnp.full(queries.shape[:2], _HIDDEN, queries.dtype)
    start = vary_over(varying, (jnp.zeros_like(queries), top, jnp.zeros_like(top)))
    out, top, total = lax.fori_loop(0, plan.steps(i), step, start)
    some = top > _HIDDEN / 2
    out = jnp.where(some[..., None], out / total[..., None], 0).astype(q.dtype)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    outs = _at(outs, rows).set(out, unique_indices=True)
    return outs, lses.at[rows].set(lse, unique_indices=True)

  empty = jnp.full((b * h * mask.q_tiles, mask.block_q), -jnp.inf, k_tiles.dtype)
  start = vary_over(varying, (jnp.zeros_like(q), empty))
  out, lse = lax.fori_loop(0, plan.live_groups(), group, start)
  return _unview(out, n_q), lse.reshape(b, h, -1)[..., :n_q]


def backward(q, k, v, mask, lse, delta, d_out, *, scale):
  """Returns dq, dk, dv by one pass over the same rows; dK and dV add up in a fixed order.

  Scores are transposed, keys first, so that dK and dV are plain matmuls. Queries first, XLA's CPU
  matmul would contract both operands over their slow axis, at a quarter of the speed.
  """
  b, n_q, h, d = q.shape
  n_kv, h_kv = k.shape[1:3]
  plan = _Plan.of(mask, b, h, h_kv)
  varying = varying_axes((q, k, v, mask, lse, delta, d_out))
  k_tiles = _key_tiles(k, mask)
  q, d_out = (_view(x, mask.block_q, mask.q_tiles) for x in (q, d_out))
  v = _view(v, mask.block_kv, mask.kv_tiles)
  lse = jnp.where(lse > -jnp.inf, lse, 0)  # rows without keys: their P is 0, every key is hidden
  lse, delta = (_row_view(x, mask.block_q, mask.q_tiles) for x in (lse, delta))

  def group(i, carry):
    dq, *dkv = carry
    rows = plan.rows[i]
    queries = _read(q, rows) * scale
    d_rows = _read(d_out, rows)
    lse_rows, delta_rows = (x.at[rows].get(mode="clip")[:, None] for x in (lse, delta))
    keyed = _with_one(queries)

    def step(j, carry):
      dq, dk, dv = carry
      ids = plan.tiles(i, j)
      keys = _join(k_tiles[ids])
      p = jnp.exp(_dot("gjd,gid->gji", keys, keyed) - lse_rows)
      ds = p * (_dot("gjd,gid->gji", _join(_read(v, ids)), d_rows) - delta_rows)
      dq += _dot("gji,gjd->gid", ds, keys)
      shape = (*ids.shape, mask.block_kv, d)
      # The hidden tile's gradient is out of bounds and dropped.
      dk = dk.at[ids].add(_dot("gji,gid->gjd", ds, queries).reshape(shape))
      dv = dv.at[ids].add(_dot("gji,gid->gjd", p, d_rows).reshape(shape))
      return dq, dk, dv

    start = vary_over(varying, (jnp.zeros_like(keyed), *dkv))
    new, *dkv = lax.fori_loop(0, plan.steps(i), step, start)
    return _at(dq, rows).set(new[..., :d] * scale, unique_indices=True), *dkv

  zeros = jnp.zeros((plan.hidden_tile, mask.block_kv, d), k_tiles.dtype)
  start = vary_over(varying, (jnp.zeros(q.shape, zeros.dtype), zeros, zeros))
  dq, *dkv = lax.fori_loop(0, plan.live_groups(), group, start)
  dk, dv = (x.reshape(b, h_kv, -1, d)[:, :, :n_kv].transpose(0, 2, 1, 3) for x in dkv)
  return _unview(dq, n_q), dk, dv
