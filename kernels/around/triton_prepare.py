"""The Triton kernel of `kernels.around.prepare`: one pass over the joint projection.

The kernel is bound by memory. A program takes one tile of one head. It walks over the tile's tokens
`ROWS` at a time, q, k and v together, so that rotary's tables are read once for all of them. Then
come products of the whole tile, whose rows are in a cache by now: coarse tokens, and filtered ones.
Channels are two halves, so that rotary's pairs meet in one thread.
"""

import triton
import triton.language as tl
from freqformer.kernels.around import prepare as definition

EPS = tl.constexpr(definition.EPS)
# Weights of a product are below 16. Times this, the rest of one still has all bits of a float16.
LIFT = tl.constexpr(2048.0)


@triton.jit
def place_of(h: tl.constexpr, TILES: tl.constexpr):
  """Returns sample, tile and head of a program: the heads of a tile share rotary's tables."""
  program = tl.program_id(0)
  return program // (h * TILES), (program // h) % TILES, program % h


@triton.jit
def rows_at(x, rows, step: tl.constexpr, HALF: tl.constexpr):
  """Returns pointers to the first half of the channels of `rows`, which are `step` numbers apart.

  `x` points to the first row of a tile, with 64 bits; steps inside the tile have 32.
  """
  return x + rows[:, None] * step + tl.arange(0, HALF)[None, :]


@triton.jit
def channels_of(x, HALF: tl.constexpr):
  """Returns both halves of `2 * HALF` numbers, as rows to broadcast."""
  columns = tl.arange(0, HALF)
  return tl.load(x + columns)[None, :], tl.load(x + HALF + columns)[None, :]


@triton.jit
def with_bias(first, second, bias, HALF: tl.constexpr):
  """Returns both halves of rows with the projection's bias, in float32."""
  bias0, bias1 = channels_of(bias, HALF)
  return first.to(tl.float32) + bias0, second.to(tl.float32) + bias1


@triton.jit
def inverse_norm(first, second, HALF: tl.constexpr):
  """Returns what each row is multiplied by to be normed on its own."""
  return tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + EPS)


@triton.jit
def norm_and_turn(first, second, inverse, gains, cos, sin, HALF: tl.constexpr):
  """Returns both halves of rows, normed by `inverse` `[rows]` and rotated."""
  gain0, gain1 = channels_of(gains, HALF)
  first = first * (inverse[:, None] * gain0)
  second = second * (inverse[:, None] * gain1)
  return first * cos - second * sin, second * cos + first * sin


@triton.jit
def store_halves(pointers, first, second, seen, HALF: tl.constexpr):
  """Rounds both halves of rows and stores those that are `seen`."""
  kind = pointers.dtype.element_ty
  tl.store(pointers, first.to(kind), seen)
  tl.store(pointers + HALF, second.to(kind), seen)


@triton.jit
def rounded(x, seen, kind: tl.constexpr):
  """Returns numbers as they are rounded where they are `seen`, others as 0; float32."""
  return tl.where(seen, x.to(kind).to(tl.float32), 0.0)


@triton.jit
def product(
  matrix,
  rows,
  seen,
  x,
  block: tl.constexpr,
  step: tl.constexpr,
  COUNT: tl.constexpr,
  HALF: tl.constexpr,
  CHUNK: tl.constexpr,
):
  """Multiplies `COUNT` rows of a float32 matrix `[..., block]` by a tile; returns float32 halves.

  `x` points to the tile, whose rows are `step` numbers apart and have 16 bits each. The matrix is
  taken as two terms of as many, rounded and the rest: the product is that of float32 to 2^-16.
  """
  FACTOR: tl.constexpr = LIFT if x.dtype.element_ty == tl.float16 else 1.0
  y0 = tl.zeros([COUNT, HALF], tl.float32)
  y1 = tl.zeros([COUNT, HALF], tl.float32)
  # A part of the tile at a time: the whole one would fill registers.
  for begin in tl.range(0, block, CHUNK):
    part = begin + tl.arange(0, CHUNK)
    weights = tl.load(matrix + rows[:, None] * block + part[None, :], seen[:, None], other=0.0)
    pointers = rows_at(x, part, step, HALF)
    x0 = tl.load(pointers)
    x1 = tl.load(pointers + HALF)
    weights *= FACTOR
    high = weights.to(x0.dtype)
    low = (weights - high.to(tl.float32)).to(x0.dtype)
    y0 = tl.dot(low, x0, y0, input_precision="ieee")
    y1 = tl.dot(low, x1, y1, input_precision="ieee")
    y0 = tl.dot(high, x0, y0, input_precision="ieee")
    y1 = tl.dot(high, x1, y1, input_precision="ieee")
  return y0 / FACTOR, y1 / FACTOR


@triton.jit
def coarse_rows(
  x,
  bias,
  gains,
  matrix,
  places,
  cell_cos,
  cell_sin,
  inverses,
  result,
  NORMED: tl.constexpr,
  OVER_HEADS: tl.constexpr,
  h: tl.constexpr,
  D: tl.constexpr,
  block: tl.constexpr,
  cells: tl.constexpr,
  CELLS: tl.constexpr,
  CHUNK: tl.constexpr,
):
  """Writes the coarse tokens of a tile of one head to the rows of `result` that `places` says."""
  HALF: tl.constexpr = D // 2
  columns = tl.arange(0, HALF)[None, :]
  for begin in tl.range(0, cells, CELLS):
    rows = begin + tl.arange(0, CELLS)
    seen = rows < cells
    first, second = product(matrix, rows, seen, x, block, 3 * h * D, CELLS, HALF, CHUNK)
    first, second = with_bias(first, second, bias, HALF)  # compression keeps constants
    place = tl.load(places + rows, seen, other=-1)
    here = place >= 0
    if NORMED:
      if OVER_HEADS:
        inverse = tl.load(inverses + place, here, other=0.0)
      else:
        inverse = inverse_norm(first, second, HALF)
      at = place[:, None] * HALF + columns
      cos = tl.load(cell_cos + at, here[:, None], other=0.0)
      sin = tl.load(cell_sin + at, here[:, None], other=0.0)
      first, second = norm_and_turn(first, second, inverse, gains, cos, sin, HALF)
    # Coarse tokens of a tile need not lie together: each has an address of its own.
    pointers = result + place.to(tl.int64)[:, None] * (h * D) + columns
    store_halves(pointers, first, second, here[:, None], HALF)


@triton.jit
def filtered_rows(
  x,
  gains,
  matrix,
  cos,
  sin,
  result,
  NORMED: tl.constexpr,
  h: tl.constexpr,
  D: tl.constexpr,
  block: tl.constexpr,
  FILTERED: tl.constexpr,
  CHUNK: tl.constexpr,
):
  """Writes a tile's tokens in a band; `cos`, `sin` and `result` begin at the tile."""
  HALF: tl.constexpr = D // 2
  for begin in tl.range(0, block, FILTERED):
    rows = begin + tl.arange(0, FILTERED)
    seen = rows < block
    first, second = product(matrix, rows, seen, x, block, 3 * h * D, FILTERED, HALF, CHUNK)
    if NORMED:
      inverse = inverse_norm(first, second, HALF)
      cosines = tl.load(rows_at(cos, rows, HALF, HALF))
      sines = tl.load(rows_at(sin, rows, HALF, HALF))
      first, second = norm_and_turn(first, second, inverse, gains, cosines, sines, HALF)
    pointers = rows_at(result, rows, h * D, HALF)
    store_halves(pointers, first, second, True, HALF)


@triton.jit
def prepare(
  joint,
  bias,
  gains,
  cos,
  sin,
  lengths,
  inverses,
  matrices,
  classes,
  places,
  cell_cos,
  cell_sin,
  cell_inverses,
  filters,
  bands,
  q,
  k,
  v,
  q_pool,
  k_pool,
  n: tl.constexpr,
  h: tl.constexpr,
  D: tl.constexpr,
  block: tl.constexpr,
  front: tl.constexpr,
  coarse: tl.constexpr,
  cells: tl.constexpr,
  CELLS: tl.constexpr,
  bands_of_class: tl.constexpr,
  FILTER_QK: tl.constexpr,
  FILTER_V: tl.constexpr,
  POOLED: tl.constexpr,
  OVER_HEADS: tl.constexpr,
  ROWS: tl.constexpr,
  FILTERED: tl.constexpr,
  CHUNK: tl.constexpr,
):
  """Writes q, k and v of one tile of one head, with its coarse tokens and means.

  Operands and results are those of `triton_prepare_call`. What the constants leave out is not read
  and not written.

  Args:
    block: rows of a tile.
    front: rows of q, k, v before the tokens; without any, v is not written.
    coarse: coarse tokens of a sample; 0 without compression.
    cells: those of a tile.
    bands_of_class: filters of a class.
    FILTER_QK, FILTER_V: these arrays are filtered in heads with a band.
    CELLS, FILTERED, ROWS: coarse tokens, filtered and other tokens that are worked on at once; the
      latter two divide `block`.
    CHUNK: rows of a tile in one step of a product; divides `block`, too.
  """
  HALF: tl.constexpr = D // 2
  TILES: tl.constexpr = n // block
  STEP: tl.constexpr = 3 * h * D  # from one token of the projection to the next
  sample, tile, head = place_of(h, TILES)
  wide = sample.to(tl.int64)
  kind: tl.constexpr = q.dtype.element_ty

  source = joint + (wide * n + tile * block) * STEP + head * D
  packed = wide * (front + n) * (h * D) + head * D
  tokens = packed + (front + tile.to(tl.int64) * block) * (h * D)
  cos += tile.to(tl.int64) * block * HALF
  sin += tile.to(tl.int64) * block * HALF
  bias += head * D
  gains_q = gains
  gains_k = gains + D
  if OVER_HEADS:
    gains_q = gains + head * D
    gains_k = gains + (h + head) * D
  band = 0
  if FILTER_QK or FILTER_V:
    band = tl.load(bands + sample * h + head)
  # Filtered tokens are written by other threads, below: not here, too, in whatever order.
  plain = band == 0
  if POOLED:
    length = tl.load(lengths + tile)
    # Added up across threads once, behind the loop.
    sum_q0 = tl.zeros([ROWS, HALF], tl.float32)
    sum_q1 = tl.zeros([ROWS, HALF], tl.float32)
    sum_k0 = tl.zeros([ROWS, HALF], tl.float32)
    sum_k1 = tl.zeros([ROWS, HALF], tl.float32)

  for begin in tl.range(0, block, ROWS):
    rows = begin + tl.arange(0, ROWS)
    # All loads come first: they are on their way together.
    pointers = rows_at(source, rows, STEP, HALF)
    q0 = tl.load(pointers)
    q1 = tl.load(pointers + HALF)
    k0 = tl.load(pointers + h * D)
    k1 = tl.load(pointers + h * D + HALF)
    if front > 0:
      v0 = tl.load(pointers + 2 * h * D)
      v1 = tl.load(pointers + 2 * h * D + HALF)
    cosines = tl.load(rows_at(cos, rows, HALF, HALF))
    sines = tl.load(rows_at(sin, rows, HALF, HALF))
    if OVER_HEADS:
      given = inverses + 2 * wide * n + tile * block + rows
      inverse_q = tl.load(given)
      inverse_k = tl.load(given + n)

    first, second = with_bias(q0, q1, bias, HALF)
    if not OVER_HEADS:
      inverse_q = inverse_norm(first, second, HALF)
    first, second = norm_and_turn(first, second, inverse_q, gains_q, cosines, sines, HALF)
    seen = plain if FILTER_QK else True
    store_halves(rows_at(q + tokens, rows, h * D, HALF), first, second, seen, HALF)
    if POOLED:
      valid = (rows < length)[:, None]
      sum_q0 += rounded(first, valid, kind)
      sum_q1 += rounded(second, valid, kind)

    first, second = with_bias(k0, k1, bias + h * D, HALF)
    if not OVER_HEADS:
      inverse_k = inverse_norm(first, second, HALF)
    first, second = norm_and_turn(first, second, inverse_k, gains_k, cosines, sines, HALF)
    store_halves(rows_at(k + tokens, rows, h * D, HALF), first, second, seen, HALF)
    if POOLED:
      sum_k0 += rounded(first, valid, kind)
      sum_k1 += rounded(second, valid, kind)

    if front > 0:
      first, second = with_bias(v0, v1, bias + 2 * h * D, HALF)
      seen = plain if FILTER_V else True
      store_halves(rows_at(v + tokens, rows, h * D, HALF), first, second, seen, HALF)

  if POOLED:
    pool = ((wide * h + head) * TILES + tile) * D + tl.arange(0, HALF)
    tl.store(q_pool + pool, tl.sum(sum_q0, 0) / length)
    tl.store(q_pool + pool + HALF, tl.sum(sum_q1, 0) / length)
    tl.store(k_pool + pool, tl.sum(sum_k0, 0) / length)
    tl.store(k_pool + pool + HALF, tl.sum(sum_k1, 0) / length)

  if coarse > 0:
    number = tl.load(classes + tile)
    matrix = matrices + number * (cells * block)
    given = cell_inverses + 2 * wide * coarse
    first_filter = filters + (number * bands_of_class + band - 1) * (block * block)
    for which in tl.static_range(3):
      if which == 0:
        result = q
        gain = gains_q
        filtered = FILTER_QK
      elif which == 1:
        result = k
        gain = gains_k
        filtered = FILTER_QK
      else:
        result = v
        gain = gains_q  # not read
        filtered = FILTER_V
      coarse_rows(
        source + which * h * D,
        bias + which * h * D,
        gain,
        matrix,
        places + tile * cells,
        cell_cos,
        cell_sin,
        given + which * coarse,
        result + packed,
        which < 2,
        OVER_HEADS,
        h,
        D,
        block,
        cells,
        CELLS,
        CHUNK,
      )
      if filtered:
        if band > 0:
          filtered_rows(
            source + which * h * D,
            gain,
            first_filter,
            cos,
            sin,
            result + tokens,
            which < 2,
            h,
            D,
            block,
            FILTERED,
            CHUNK,
          )
