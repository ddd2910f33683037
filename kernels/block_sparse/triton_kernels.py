"""The Triton kernels of attention: forward, dQ, and dK with dV.

A program keeps `ROWS` rows of one tile and head, and walks that tile's list, `STEP` rows of the
other side at a time. Rows are `[b, n, h, D]`, LSE and delta `[b, h, n]`, lists those of
`operands`. Scores are in log2 units. Sizes and strides are constants. Where `HALVES` is 2, rows
are kept as two arrays of half of the columns (`triton_tuning`).
"""

import triton
import triton.language as tl
from freqformer.kernels.core import log2

HIDDEN = tl.constexpr(log2.HIDDEN)
DEAD = tl.constexpr(log2.DEAD)
LN2 = tl.constexpr(1 / log2.LOG2E)


@triton.jit
def place_of(
  order, ORDERED: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, h: tl.constexpr
):
  """Returns sample, head, tile and part of a program: those of a head together, by `order`."""
  program = tl.program_id(0)
  part = program % PARTS
  tile = (program // PARTS) % TILES
  pair = program // (PARTS * TILES)
  if ORDERED:
    pair = tl.load(order + pair)
  return pair // h, pair % h, tile, part


@triton.jit
def rows_at(
  x,
  sample,
  head,
  first,
  n: tl.constexpr,
  h: tl.constexpr,
  D: tl.constexpr,
  ROWS: tl.constexpr,
  BEGIN: tl.constexpr,
  COLUMNS: tl.constexpr,
):
  """Returns pointers to columns of `ROWS` rows of `[b, n, h, D]` from row `first`, int64.

  The first of them has 64 bits, steps to the others have 32.
  """
  base = x + ((sample.to(tl.int64) * n + first) * h + head) * D + BEGIN
  return base + tl.arange(0, ROWS)[:, None] * (h * D) + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def numbers_at(x, sample, head, first, n: tl.constexpr, h: tl.constexpr, ROWS: tl.constexpr):
  """Returns pointers to `ROWS` numbers of `[b, h, n]` from row `first`, int64."""
  return x + (sample.to(tl.int64) * h + head) * n + first + tl.arange(0, ROWS)


@triton.jit
def list_at(lists, sample, head, lists_b: tl.constexpr, lists_h: tl.constexpr):
  """Returns the pointer to the first list of a sample's head."""
  return lists + sample.to(tl.int64) * lists_b + head.to(tl.int64) * lists_h


@triton.jit
def keys_of(code, cut, block_kv: tl.constexpr, STEP: tl.constexpr):
  """Returns the key tile of an entry, int64 its row where a cut begins, and which keys count."""
  tile = code >> 8
  begin = cut * STEP
  seen = (tl.arange(0, STEP) < (code & 255) - begin)[None, :]
  return tile, tile.to(tl.int64) * block_kv + begin, seen


@triton.jit
def attention_forward(
  q,
  k,
  v,
  codes,
  counts,
  order,
  bias,
  out,
  lse,
  factor: tl.constexpr,
  sign: tl.constexpr,
  BIASED: tl.constexpr,
  ORDERED: tl.constexpr,
  h: tl.constexpr,
  n_q: tl.constexpr,
  n_kv: tl.constexpr,
  D: tl.constexpr,
  block_q: tl.constexpr,
  block_kv: tl.constexpr,
  ROWS: tl.constexpr,
  STEP: tl.constexpr,
  HALVES: tl.constexpr,
  codes_b: tl.constexpr,
  codes_h: tl.constexpr,
  codes_tile: tl.constexpr,
  counts_b: tl.constexpr,
  counts_h: tl.constexpr,
):
  """Writes out and LSE of `ROWS` queries."""
  W: tl.constexpr = D // HALVES
  CUTS: tl.constexpr = block_kv // STEP
  sample, head, tile, part = place_of(order, ORDERED, n_q // block_q, block_q // ROWS, h)
  count = tl.load(counts + sample * counts_b + head * counts_h + tile)
  listed = list_at(codes, sample, head, codes_b, codes_h) + tile.to(tl.int64) * codes_tile
  first = tile.to(tl.int64) * block_q + part * ROWS
  q0 = tl.load(rows_at(q, sample, head, first, n_q, h, D, ROWS, 0, W))
  acc0 = tl.zeros([ROWS, W], tl.float32)
  if HALVES == 2:
    q1 = tl.load(rows_at(q, sample, head, first, n_q, h, D, ROWS, W, W))
    acc1 = tl.zeros([ROWS, W], tl.float32)
  top = tl.full([ROWS], DEAD, tl.float32)
  total = tl.zeros([ROWS], tl.float32)
  steps = count * CUTS
  # An entry is read one step ahead: addresses of the next copies do not wait for it.
  upcoming = tl.load(listed)
  for s in tl.range(0, steps):
    code = upcoming
    upcoming = tl.load(listed + tl.minimum(s + 1, steps - 1) // CUTS)
    kv_tile, row, seen = keys_of(code, s % CUTS, block_kv, STEP)
    k0 = tl.load(rows_at(k, sample, head, row, n_kv, h, D, STEP, 0, W))
    x = tl.dot(q0, k0.T, input_precision="ieee")
    if HALVES == 2:
      k1 = tl.load(rows_at(k, sample, head, row, n_kv, h, D, STEP, W, W))
      x = tl.dot(q1, k1.T, x, input_precision="ieee")
    if sign != 1.0:
      x = x * sign
    x = tl.where(seen, x, HIDDEN)
    if BIASED:
      x = x * factor + tl.load(bias + kv_tile)
      higher = tl.maximum(top, tl.max(x, 1))
      p = tl.exp2(x - higher[:, None])
    else:
      higher = tl.maximum(top, tl.max(x, 1) * factor)
      p = tl.exp2(x * factor - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    v0 = tl.load(rows_at(v, sample, head, row, n_kv, h, D, STEP, 0, W))
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision="ieee")
    if HALVES == 2:
      v1 = tl.load(rows_at(v, sample, head, row, n_kv, h, D, STEP, W, W))
      acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    top = higher
  alive = top > DEAD
  total = tl.where(alive, total, 1.0)
  inverse = tl.where(alive, 1.0 / total, 0.0)[:, None]
  kind = out.dtype.element_ty
  tl.store(rows_at(out, sample, head, first, n_q, h, D, ROWS, 0, W), (acc0 * inverse).to(kind))
  if HALVES == 2:
    tl.store(rows_at(out, sample, head, first, n_q, h, D, ROWS, W, W), (acc1 * inverse).to(kind))
  natural = tl.where(alive, (top + tl.log2(total)) * LN2, float("-inf"))
  tl.store(numbers_at(lse, sample, head, first, n_q, h, ROWS), natural)


@triton.jit
def attention_dq(
  q,
  k,
  v,
  d_out,
  lse,
  delta,
  codes,
  counts,
  order,
  bias,
  dq,
  factor: tl.constexpr,
  sign: tl.constexpr,
  scale: tl.constexpr,
  BIASED: tl.constexpr,
  ORDERED: tl.constexpr,
  h: tl.constexpr,
  n_q: tl.constexpr,
  n_kv: tl.constexpr,
  D: tl.constexpr,
  block_q: tl.constexpr,
  block_kv: tl.constexpr,
  ROWS: tl.constexpr,
  STEP: tl.constexpr,
  HALVES: tl.constexpr,
  codes_b: tl.constexpr,
  codes_h: tl.constexpr,
  codes_tile: tl.constexpr,
  counts_b: tl.constexpr,
  counts_h: tl.constexpr,
):
  """Writes dQ of `ROWS` queries."""
  W: tl.constexpr = D // HALVES
  CUTS: tl.constexpr = block_kv // STEP
  sample, head, tile, part = place_of(order, ORDERED, n_q // block_q, block_q // ROWS, h)
  count = tl.load(counts + sample * counts_b + head * counts_h + tile)
  listed = list_at(codes, sample, head, codes_b, codes_h) + tile.to(tl.int64) * codes_tile
  first = tile.to(tl.int64) * block_q + part * ROWS
  q0 = tl.load(rows_at(q, sample, head, first, n_q, h, D, ROWS, 0, W))
  do0 = tl.load(rows_at(d_out, sample, head, first, n_q, h, D, ROWS, 0, W))
  acc0 = tl.zeros([ROWS, W], tl.float32)
  if HALVES == 2:
    q1 = tl.load(rows_at(q, sample, head, first, n_q, h, D, ROWS, W, W))
    do1 = tl.load(rows_at(d_out, sample, head, first, n_q, h, D, ROWS, W, W))
    acc1 = tl.zeros([ROWS, W], tl.float32)
  lse_rows = tl.load(numbers_at(lse, sample, head, first, n_q, h, ROWS))[:, None]
  delta_rows = tl.load(numbers_at(delta, sample, head, first, n_q, h, ROWS))[:, None]
  steps = count * CUTS
  upcoming = tl.load(listed)
  for s in tl.range(0, steps):
    code = upcoming
    upcoming = tl.load(listed + tl.minimum(s + 1, steps - 1) // CUTS)
    kv_tile, row, seen = keys_of(code, s % CUTS, block_kv, STEP)
    k0 = tl.load(rows_at(k, sample, head, row, n_kv, h, D, STEP, 0, W))
    v0 = tl.load(rows_at(v, sample, head, row, n_kv, h, D, STEP, 0, W))
    x = tl.dot(q0, k0.T, input_precision="ieee")
    dp = tl.dot(do0, v0.T, input_precision="ieee")
    if HALVES == 2:
      k1 = tl.load(rows_at(k, sample, head, row, n_kv, h, D, STEP, W, W))
      v1 = tl.load(rows_at(v, sample, head, row, n_kv, h, D, STEP, W, W))
      x = tl.dot(q1, k1.T, x, input_precision="ieee")
      dp = tl.dot(do1, v1.T, dp, input_precision="ieee")
    if sign != 1.0:
      x = x * sign
    # Scaled before it is hidden: the factor then stays part of a fused multiply-add.
    x = x * factor - lse_rows
    if BIASED:
      x += tl.load(bias + kv_tile)
    p = tl.exp2(tl.where(seen, x, HIDDEN))
    ds = (p * (dp - delta_rows)).to(k0.dtype)
    acc0 = tl.dot(ds, k0, acc0, input_precision="ieee")
    if HALVES == 2:
      acc1 = tl.dot(ds, k1, acc1, input_precision="ieee")
  kind = dq.dtype.element_ty
  tl.store(rows_at(dq, sample, head, first, n_q, h, D, ROWS, 0, W), (acc0 * scale).to(kind))
  if HALVES == 2:
    tl.store(rows_at(dq, sample, head, first, n_q, h, D, ROWS, W, W), (acc1 * scale).to(kind))


@triton.jit
def attention_dkv(
  q,
  k,
  v,
  d_out,
  lse,
  delta,
  starts,
  counts,
  readers,
  lengths,
  order,
  bias,
  dk,
  dv,
  factor: tl.constexpr,
  sign: tl.constexpr,
  scale: tl.constexpr,
  BIASED: tl.constexpr,
  ORDERED: tl.constexpr,
  h: tl.constexpr,
  n_q: tl.constexpr,
  n_kv: tl.constexpr,
  D: tl.constexpr,
  block_q: tl.constexpr,
  block_kv: tl.constexpr,
  ROWS: tl.constexpr,
  STEP: tl.constexpr,
  HALVES: tl.constexpr,
  readers_b: tl.constexpr,
  readers_h: tl.constexpr,
  counts_b: tl.constexpr,
  counts_h: tl.constexpr,
  lengths_b: tl.constexpr,
):
  """Writes dK and dV of `ROWS` keys: 0 where they are padding."""
  W: tl.constexpr = D // HALVES
  CUTS: tl.constexpr = block_q // STEP
  sample, head, tile, part = place_of(order, ORDERED, n_kv // block_kv, block_kv // ROWS, h)
  own = sample * counts_b + head * counts_h + tile
  count = tl.load(counts + own)
  read_by = list_at(readers, sample, head, readers_b, readers_h) + tl.load(starts + own)
  first = tile.to(tl.int64) * block_kv + part * ROWS
  k0 = tl.load(rows_at(k, sample, head, first, n_kv, h, D, ROWS, 0, W))
  v0 = tl.load(rows_at(v, sample, head, first, n_kv, h, D, ROWS, 0, W))
  dk0 = tl.zeros([ROWS, W], tl.float32)
  dv0 = tl.zeros([ROWS, W], tl.float32)
  if HALVES == 2:
    k1 = tl.load(rows_at(k, sample, head, first, n_kv, h, D, ROWS, W, W))
    v1 = tl.load(rows_at(v, sample, head, first, n_kv, h, D, ROWS, W, W))
    dk1 = tl.zeros([ROWS, W], tl.float32)
    dv1 = tl.zeros([ROWS, W], tl.float32)
  if BIASED:
    tile_bias = tl.load(bias + tile)
  for s in tl.range(0, count * CUTS):
    row = tl.load(read_by + s // CUTS).to(tl.int64) * block_q + (s % CUTS) * STEP
    q0 = tl.load(rows_at(q, sample, head, row, n_q, h, D, STEP, 0, W))
    x = tl.dot(k0, q0.T, input_precision="ieee")
    if HALVES == 2:
      q1 = tl.load(rows_at(q, sample, head, row, n_q, h, D, STEP, W, W))
      x = tl.dot(k1, q1.T, x, input_precision="ieee")
    if sign != 1.0:
      x = x * sign
    x = x * factor - tl.load(numbers_at(lse, sample, head, row, n_q, h, STEP))[None, :]
    if BIASED:
      x += tile_bias
    p = tl.exp2(x)
    do0 = tl.load(rows_at(d_out, sample, head, row, n_q, h, D, STEP, 0, W))
    dv0 = tl.dot(p.to(do0.dtype), do0, dv0, input_precision="ieee")
    dp = tl.dot(v0, do0.T, input_precision="ieee")
    if HALVES == 2:
      do1 = tl.load(rows_at(d_out, sample, head, row, n_q, h, D, STEP, W, W))
      dv1 = tl.dot(p.to(do1.dtype), do1, dv1, input_precision="ieee")
      dp = tl.dot(v1, do1.T, dp, input_precision="ieee")
    ds = p * (dp - tl.load(numbers_at(delta, sample, head, row, n_q, h, STEP))[None, :])
    ds = ds.to(q0.dtype)
    dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
    if HALVES == 2:
      dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
  length = tl.load(lengths + sample * lengths_b + tile) - part * ROWS
  seen = (tl.arange(0, ROWS) < length)[:, None]
  kind = dk.dtype.element_ty
  dk0 = tl.where(seen, dk0 * scale, 0.0).to(kind)
  dv0 = tl.where(seen, dv0, 0.0).to(kind)
  tl.store(rows_at(dk, sample, head, first, n_kv, h, D, ROWS, 0, W), dk0)
  tl.store(rows_at(dv, sample, head, first, n_kv, h, D, ROWS, 0, W), dv0)
  if HALVES == 2:
    dk1 = tl.where(seen, dk1 * scale, 0.0).to(kind)
    dv1 = tl.where(seen, dv1, 0.0).to(kind)
    tl.store(rows_at(dk, sample, head, first, n_kv, h, D, ROWS, W, W), dk1)
    tl.store(rows_at(dv, sample, head, first, n_kv, h, D, ROWS, W, W), dv1)
