"""A float32 oracle for a few rows of a large call: attention, LSE and gradients from the lists, never n x n.

Forward and dQ of a row need only that row's list. dK and dV of a key row need every query row that lists it; their
probabilities are rebuilt from the LSE and output under test, which are checked first.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.table import BlockMask


@dataclasses.dataclass(frozen=True)
class Error:
  """How far `got` is from `want`: RMS error over RMS size, and the largest difference; NaN if anything is NaN."""

  relative: float
  largest: float

  @classmethod
  def of(cls, got, want) -> "Error":
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    if not (got[~finite] == want[~finite]).all():  # -inf stands where -inf stands
      return cls(math.nan, math.nan)
    if not finite.any():
      return cls(0.0, 0.0)
    off, size = got[finite] - want[finite], np.sqrt(np.mean(want[finite] ** 2))
    return cls(float(np.sqrt(np.mean(off**2)) / (size + 1e-30)), float(np.abs(off).max()))


def pick_rows(
  mask: BlockMask, shape: tuple[int, ...], count: int = 64, seed: int = 0, keys: bool = False
) -> np.ndarray:
  """`(sample, head, row)` of valid rows: int32 `[count, 3]`, first and last sample, head and row among them.

  Args:
    mask: in NumPy.
    shape: `[b, n, h, d]` of q, or of k with `keys`.
    count: rows.
    seed: of the draw.
    keys: rows of k and v instead of q.
  """
  rng, (b, _, h, _) = np.random.default_rng(seed), shape
  lengths = np.atleast_2d(np.asarray(mask.kv_len if keys else mask.q_len()))
  block = mask.block_kv if keys else mask.block_q
  samples, heads = rng.integers(0, b, count), rng.choice(np.unique([0, h // 2, h - 1]), count)
  samples[:2], heads[:2] = (0, b - 1), (0, h - 1)
  rows = []
  for i, sample in enumerate(samples):
    own = lengths[min(sample, len(lengths) - 1)]
    alive = np.flatnonzero(own)
    tile = alive[0] if i == 0 else alive[-1] if i == 1 else rng.choice(alive)
    rows.append(tile * block + (own[tile] - 1 if i == 1 else rng.integers(own[tile])))
  return np.stack([samples, heads, rows], -1).astype(np.int32)


def _wide(x):
  return x.astype(jnp.float32)


def _dot(equation, *operands):
  return jnp.einsum(equation, *operands, precision="highest")


def _at(array, *index):
  """An entry of an array that may be broadcast along leading axes of size 1."""
  return array[
    tuple(jnp.where(size > 1, i, 0) for size, i in zip(array.shape, index, strict=False))
  ]


def _row(q, k, v, mask, scale, rounded, where):
  """Keys, values, scores and what is seen of one query row."""
  sample, head, row = where
  ids = _at(mask.indices(), sample, head, row // mask.block_q)
  count = _at(mask.kv_counts, sample, head, row // mask.block_q)
  lengths = mask.kv_len if mask.kv_len.ndim == 1 else _at(mask.kv_len, sample)
  inside = jnp.arange(mask.block_kv, dtype=jnp.int32)
  rows = ids[:, None] * mask.block_kv + inside
  seen = (
    (jnp.arange(mask.max_kv) < count)[:, None]
    & (inside < lengths[ids][:, None])
    & (rows < k.shape[1])
  )
  rows = jnp.minimum(rows, k.shape[1] - 1)
  keys, values = (_wide(x[sample, :, head][rows]) for x in (k, v))
  scores = rounded(_dot("d,tjd->tj", _wide(q[sample, row, head]), keys)) * scale
  if mask.kv_bias is not None:
    scores = scores + mask.kv_bias[ids][:, None]
  return keys, values, jnp.where(seen, rounded(scores), -jnp.inf)


@functools.partial(jax.jit, static_argnames=("scale", "round_to"))
def query_rows(inputs, mask, where, cotangents=None, *, scale=None, round_to=None):
  """Exact out, LSE (and dQ, given cotangents) of some query rows.

  Args:
    inputs: `(q, k, v)`, each `[b, n, h, d]`.
    mask: the table of the call.
    where: int32 `[m, 3]`, (sample, head, row).
    cotangents: `(d_out, d_lse)` of the whole call, `[b, n, h, d]` and `[b, h, n]`, or None.
    scale: default `1 / sqrt(d)`.
    round_to: a dtype: scores, probabilities and results are rounded to it, as the plain computation in that type would.

  Returns:
    out `[m, d]`, lse `[m]`, and dq `[m, d]` where cotangents are given; float32.
  """
  q, k, v = inputs
  mask = jax.tree.map(jnp.asarray, mask)
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  rounded = (
    (lambda x: x) if round_to is None else (lambda x: x.astype(round_to).astype(jnp.float32))
  )

  def one(at):
    keys, values, scores = _row(q, k, v, mask, scale, rounded, at)
    top = jnp.maximum(scores.max(), -1e30)
    lse = jnp.where(scores.max() > -jnp.inf, jnp.log(jnp.exp(scores - top).sum()) + top, -jnp.inf)
    p = rounded(jnp.exp(scores - jnp.maximum(lse, -1e30)))
    out = rounded(_dot("tj,tjd->d", p, values))
    if cotangents is None:
      return out, lse
    (d_out, d_lse), (sample, head, row) = cotangents, at
    d_row = jnp.where(lse > -jnp.inf, _wide(d_out[sample, row, head]), 0)
    delta = _dot("d,d->", d_row, out) - jnp.where(lse > -jnp.inf, d_lse[sample, head, row], 0)
    ds = rounded(p * (rounded(_dot("d,tjd->tj", d_row, values)) - delta))
    return out, lse, rounded(_dot("tj,tjd->d", ds, keys) * scale)

  return jax.lax.map(one, jnp.asarray(where))


@functools.partial(jax.jit, static_argnames=("scale", "round_to"))
def key_rows(inputs, mask, found, cotangents, where, *, scale=None, round_to=None):
  """dK and dV of some key rows, from the output and LSE under test.

  Args:
    inputs: `(q, k, v)`.
    mask: the table of the call.
    found: `(out, lse)` of the call.
    cotangents: `(d_out, d_lse)`.
    where: int32 `[m, 3]`, (sample, head, key row).
    scale, round_to: as in `query_rows`.

  Returns:
    dk and dv `[m, d]`, float32.
  """
  (q, k, v), (out, lse), (d_out, d_lse) = inputs, found, cotangents
  mask = jax.tree.map(jnp.asarray, mask)
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  rounded = (
    (lambda x: x) if round_to is None else (lambda x: x.astype(round_to).astype(jnp.float32))
  )
  ids, n_q = mask.indices(), q.shape[1]
  slots = jnp.arange(mask.max_kv)

  def one(at):
    sample, head, row = at
    tile = row // mask.block_kv
    lengths = mask.kv_len if mask.kv_len.ndim == 1 else _at(mask.kv_len, sample)
    listing = (
      (_at(ids, sample, head) == tile) & (slots < _at(mask.kv_counts, sample, head)[:, None])
    ).any(-1)
    seen = jnp.repeat(listing, mask.block_q)[:n_q] & (row % mask.block_kv < lengths[tile])
    queries, d_rows, outs = (_wide(x[sample, :, head]) for x in (q, d_out, out))
    row_lse = lse[sample, head]
    seen &= row_lse > -jnp.inf
    score = rounded(_dot("id,d->i", queries, _wide(k[sample, row, head]))) * scale
    if mask.kv_bias is not None:
      score = score + mask.kv_bias[tile]
    p = rounded(jnp.where(seen, jnp.exp(rounded(score) - jnp.where(seen, row_lse, 0)), 0))
    d_rows = jnp.where(seen[:, None], d_rows, 0)
    delta = (d_rows * outs).sum(-1) - jnp.where(seen, d_lse[sample, head], 0)
    ds = rounded(p * (rounded(_dot("id,d->i", d_rows, _wide(v[sample, row, head]))) - delta))
    return rounded(_dot("i,id->d", ds, queries) * scale), rounded(_dot("i,id->d", p, d_rows))

  return jax.lax.map(one, jnp.asarray(where))


# ---- the fields of a results row -----------------------------------------------------------------------------------------

_FLOAT32_TOLERANCE = 1e-5


def _at_rows(x, where):
  """Rows `(sample, head, row)` of `[b, n, h, d]` or `[b, h, n]`, gathered on the device."""
  sample, head, row = jnp.asarray(where).T
  return x[sample, row, head] if x.ndim == 4 else x[sample, head, row]


def _fields(name: str, got, want, plain) -> tuple[dict, bool]:
  """An error beside the error of the plain low-precision computation; within tolerance: at most twice that (NaN never is)."""
  error, model = Error.of(got, want), Error.of(plain, want)
  bound = max(2 * model.relative, _FLOAT32_TOLERANCE)
  found = {
    f"error_{name}": error.relative,
    f"error_{name}_max": error.largest,
    f"plain_error_{name}": model.relative,
  }
  return found, bool(error.relative <= bound)


def _model_dtype(dtype):
  """What the plain computation rounds to; None (nothing) in float32."""
  return None if jnp.dtype(dtype).itemsize > 2 else jnp.dtype(dtype)


def forward_error(inputs, mask: BlockMask, found, count: int = 64, seed: int = 0) -> dict:
  """Errors of `(out, lse or None)` on sampled rows, and whether they are within tolerance.

  Args:
    inputs: `(q, k, v)`; mask: in NumPy; found: what the call under test gave; count, seed: of the sample.
  """
  q, out, lse = inputs[0], *found
  where = pick_rows(mask, q.shape, count, seed)
  table = dataclasses.replace(mask, transposed=None)
  want, want_lse = query_rows(inputs, table, where)
  plain, _ = query_rows(inputs, table, where, round_to=_model_dtype(q.dtype))
  fields, correct = _fields("out", _at_rows(out, where), want, plain)
  if lse is not None:
    error = Error.of(_at_rows(lse, where), want_lse)
    fields |= {"error_lse": error.relative, "error_lse_max": error.largest}
    correct &= bool(error.relative <= 5e-3)
  return fields | {"correct": correct, "oracle_rows": count}


def backward_error(inputs, mask: BlockMask, found, cotangents, grads, count: int = 64) -> dict:
  """Errors of `(dq, dk, dv)` (and of `found = (out, lse)`) on sampled query and key rows."""
  (q, k, _), (dq, dk, dv) = inputs, grads
  fields = forward_error(inputs, mask, found, count)
  correct, table, low = (
    fields["correct"],
    dataclasses.replace(mask, transposed=None),
    _model_dtype(q.dtype),
  )
  where = pick_rows(mask, q.shape, count, seed=1)
  want, plain = (query_rows(inputs, table, where, cotangents, round_to=r)[2] for r in (None, low))
  checked = [("dq", _at_rows(dq, where), want, plain)]
  where = pick_rows(mask, k.shape, count, seed=2, keys=True)
  wants, plains = (
    key_rows(inputs, table, found, cotangents, where, round_to=r) for r in (None, low)
  )
  checked += [
    (n, _at_rows(g, where), w, p)
    for n, g, w, p in zip(("dk", "dv"), (dk, dv), wants, plains, strict=True)
  ]
  for name, got, want, plain in checked:
    more, within = _fields(name, got, want, plain)
    fields, correct = fields | more, correct and within
  return fields | {"correct": correct}
