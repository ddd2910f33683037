"""A float32 oracle for a few rows of a large call: attention, LSE and gradients, never n x n.

`kernels/block_sparse/reference.py` holds the whole matrix, which calls of real size do not allow.
Forward and dQ of a row need only that row's list. dK and dV of a key row need every query row that
lists it; their probabilities are rebuilt from the LSE and output under test, which are checked
first. With a `round_to` dtype the same formulas are the plain low-precision computation, the error
model that tolerances come from.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.table import BlockMask

# choice: relative errors that are tolerated whatever the plain computation's error is.
FLOAT32_TOLERANCE = 1e-5
LSE_TOLERANCE = 5e-3


def relative_error(got, want) -> float:
  """Returns RMS error over RMS size; NaN if anything is, or if -inf stands elsewhere in one."""
  got = np.asarray(got, np.float64)
  want = np.asarray(want, np.float64)
  finite = np.isfinite(want)
  if not (got[~finite] == want[~finite]).all():
    return math.nan
  if not finite.any():
    return 0.0
  error = np.mean((got[finite] - want[finite]) ** 2)
  return float(np.sqrt(error) / (np.sqrt(np.mean(want[finite] ** 2)) + 1e-30))


def compared(name: str, got, want, plain) -> tuple[dict, bool]:
  """Compares a result with the right one, and its error with the plain computation's.

  Returns:
    fields of a row, and whether the error is at most twice the plain one's (a NaN never is).
  """
  error = relative_error(got, want)
  plain_error = relative_error(plain, want)
  fields = {f"error_{name}": error, f"plain_error_{name}": plain_error}
  return fields, error <= max(2 * plain_error, FLOAT32_TOLERANCE)


def pick_rows(
  mask: BlockMask, shape: tuple[int, ...], count: int = 64, seed: int = 0, keys: bool = False
) -> np.ndarray:
  """Draws valid rows, the first and last sample, head and row among them.

  Args:
    mask: in NumPy.
    shape: `[b, n, h, d]` of q, or of k with `keys`.
    keys: rows of k and v instead of q.

  Returns:
    `(sample, head, row)`: int32 `[count, 3]`.
  """
  rng = np.random.default_rng(seed)
  b, _, h, _ = shape
  lengths = np.atleast_2d(np.asarray(mask.kv_len if keys else mask.q_len()))
  block = mask.block_kv if keys else mask.block_q
  samples = rng.integers(0, b, count)
  heads = rng.choice(np.unique([0, h // 2, h - 1]), count)
  samples[:2] = (0, b - 1)
  heads[:2] = (0, h - 1)
  rows = []
  for i, sample in enumerate(samples):
    own = lengths[min(sample, len(lengths) - 1)]
    valid = np.flatnonzero(np.arange(block) < own[:, None])
    rows.append(valid[[0, -1][i]] if i < 2 else rng.choice(valid))
  return np.stack([samples, heads, rows], -1).astype(np.int32)


def _wide(x):
  return x.astype(jnp.float32)


def _dot(equation, *operands):
  return jnp.einsum(equation, *operands, precision="highest")


def _at(array, *index):
  """Returns an entry of an array that may be broadcast along leading axes of size 1."""
  where = zip(array.shape, index, strict=False)
  return array[tuple(jnp.where(size > 1, i, 0) for size, i in where)]


def _lengths(mask, sample):
  """Returns the valid rows of a sample's key tiles."""
  return mask.kv_len if mask.kv_len.ndim == 1 else _at(mask.kv_len, sample)


def _rounded(round_to):
  """Returns a function that rounds to a dtype and back; to nothing if the dtype is None."""
  return lambda x: x if round_to is None else x.astype(round_to).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="round_to")
def query_rows(inputs, mask, where, cotangents=None, *, round_to=None):
  """Computes out, LSE (and dQ, given cotangents) of some query rows.

  Args:
    inputs: `(q, k, v)`, each `[b, n, h, d]`.
    where: int32 `[m, 3]`, (sample, head, row).
    cotangents: `(d_out, d_lse)` of the whole call, `[b, n, h, d]` and `[b, h, n]`.
    round_to: a dtype to which scores, probabilities and results are rounded.

  Returns:
    out `[m, d]`, lse `[m]`, and dq `[m, d]` where cotangents are given; float32.
  """
  q, k, v = inputs
  mask = jax.tree.map(jnp.asarray, mask)
  scale = 1 / math.sqrt(q.shape[-1])
  rounded = _rounded(round_to)
  inside = jnp.arange(mask.block_kv, dtype=jnp.int32)

  def one(at):
    sample, head, row = at
    ids = _at(mask.indices(), sample, head, row // mask.block_q)
    count = _at(mask.kv_counts, sample, head, row // mask.block_q)
    rows = ids[:, None] * mask.block_kv + inside
    listed = (jnp.arange(mask.max_kv) < count)[:, None]
    seen = listed & (inside < _lengths(mask, sample)[ids][:, None]) & (rows < k.shape[1])
    rows = jnp.minimum(rows, k.shape[1] - 1)
    keys = _wide(k[sample, :, head][rows])
    values = _wide(v[sample, :, head][rows])
    scores = rounded(_dot("d,tjd->tj", _wide(q[sample, row, head]), keys)) * scale
    if mask.kv_bias is not None:
      scores = scores + mask.kv_bias[ids][:, None]
    scores = jnp.where(seen, rounded(scores), -jnp.inf)
    alive = scores.max() > -jnp.inf
    top = jnp.where(alive, scores.max(), 0)
    lse = jnp.where(alive, jnp.log(jnp.exp(scores - top).sum()) + top, -jnp.inf)
    p = rounded(jnp.exp(scores - jnp.where(alive, lse, 0)))
    out = rounded(_dot("tj,tjd->d", p, values))
    if cotangents is None:
      return out, lse
    d_row = jnp.where(alive, _wide(cotangents[0][sample, row, head]), 0)
    delta = _dot("d,d->", d_row, out) - jnp.where(alive, cotangents[1][sample, head, row], 0)
    ds = rounded(p * (rounded(_dot("d,tjd->tj", d_row, values)) - delta))
    return out, lse, rounded(_dot("tj,tjd->d", ds, keys) * scale)

  return jax.lax.map(one, jnp.asarray(where))


@functools.partial(jax.jit, static_argnames="round_to")
def key_rows(inputs, mask, found, cotangents, where, *, round_to=None):
  """Computes dK and dV `[m, d]` of some key rows, from `found = (out, lse)` under test.

  The other arguments are as in `query_rows`.
  """
  q, k, v = inputs
  out, lse = found
  d_out, d_lse = cotangents
  mask = jax.tree.map(jnp.asarray, mask)
  scale = 1 / math.sqrt(q.shape[-1])
  rounded = _rounded(round_to)
  slots = jnp.arange(mask.max_kv)

  def one(at):
    sample, head, row = at
    tile = row // mask.block_kv
    counted = slots < _at(mask.kv_counts, sample, head)[:, None]
    listing = ((_at(mask.indices(), sample, head) == tile) & counted).any(-1)
    row_lse = lse[sample, head]
    seen = jnp.repeat(listing, mask.block_q)[: q.shape[1]] & (row_lse > -jnp.inf)
    seen &= row % mask.block_kv < _lengths(mask, sample)[tile]
    queries = _wide(q[sample, :, head])
    scores = rounded(_dot("id,d->i", queries, _wide(k[sample, row, head]))) * scale
    if mask.kv_bias is not None:
      scores = scores + mask.kv_bias[tile]
    p = rounded(jnp.where(seen, jnp.exp(rounded(scores) - jnp.where(seen, row_lse, 0)), 0))
    d_rows = jnp.where(seen[:, None], _wide(d_out[sample, :, head]), 0)
    delta = (d_rows * _wide(out[sample, :, head])).sum(-1)
    delta = delta - jnp.where(seen, d_lse[sample, head], 0)
    ds = rounded(p * (rounded(_dot("id,d->i", d_rows, _wide(v[sample, row, head]))) - delta))
    return rounded(_dot("i,id->d", ds, queries) * scale), rounded(_dot("i,id->d", p, d_rows))

  return jax.lax.map(one, jnp.asarray(where))


def _sampled(x, where):
  """Returns rows `(sample, head, row)` of `[b, n, h, d]` or `[b, h, n]`."""
  sample, head, row = jnp.asarray(where).T
  return x[sample, row, head] if x.ndim == 4 else x[sample, head, row]


def _low(dtype):
  """Returns the type to which the plain computation rounds; None in float32."""
  return None if jnp.dtype(dtype).itemsize > 2 else jnp.dtype(dtype)


def forward_error(inputs, mask: BlockMask, found, count: int = 64) -> dict:
  """Compares `found = (out, lse or None)` of a forward pass on sampled rows.

  Returns:
    errors, and `correct`: all of them within tolerance.
  """
  out, lse = found
  where = pick_rows(mask, inputs[0].shape, count)
  table = dataclasses.replace(mask, transposed=None)
  want, want_lse = query_rows(inputs, table, where)
  plain, _ = query_rows(inputs, table, where, round_to=_low(out.dtype))
  fields, correct = compared("out", _sampled(out, where), want, plain)
  if lse is not None:
    fields["error_lse"] = relative_error(_sampled(lse, where), want_lse)
    correct &= fields["error_lse"] <= LSE_TOLERANCE
  return fields | {"correct": correct}


def backward_error(inputs, mask: BlockMask, found, cotangents, grads, count: int = 64) -> dict:
  """Compares `grads = (dq, dk, dv)`, and `found = (out, lse)`, on sampled query and key rows."""
  q, k, _ = inputs
  table = dataclasses.replace(mask, transposed=None)
  precisions = (None, _low(q.dtype))
  row = forward_error(inputs, mask, found, count)
  queries = pick_rows(mask, q.shape, count, seed=1)
  keys = pick_rows(mask, k.shape, count, seed=2, keys=True)
  dq = [query_rows(inputs, table, queries, cotangents, round_to=r)[2] for r in precisions]
  dk_dv = [key_rows(inputs, table, found, cotangents, keys, round_to=r) for r in precisions]
  dk, dv = zip(*dk_dv, strict=True)
  compares = (("dq", queries, dq), ("dk", keys, dk), ("dv", keys, dv))
  for got, (name, where, (want, plain)) in zip(grads, compares, strict=True):
    fields, correct = compared(name, _sampled(got, where), want, plain)
    row |= fields | {"correct": row["correct"] and correct}
  return row
