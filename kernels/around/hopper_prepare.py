"""The Hopper kernel of `kernels.around.prepare`: one pass over the joint projection.

The kernel is bound by memory. A thread block is one warpgroup. It takes one tile and some heads,
and brings q, k and v in pieces of 64 rows through a ring of slots; two or three blocks share a
multiprocessor and hide each other's latencies. A piece lies in shared memory as two halves of the
channels, so that rotary's pairs meet in one thread; the weights of compression stay there.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
from freqformer.kernels.around.prepare import EPS
from freqformer.kernels.hopper.launch import launch, streaming_cost, streaming_heads
from freqformer.kernels.hopper.machine import ROWS
from freqformer.kernels.hopper.products import (
  LAYOUT,
  PER_COLUMN,
  PER_ROW,
  over_columns,
  over_rows,
  tiles_type,
)
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

COLUMNS = 32  # of each half, that are worked on at once
HALVES = 2  # of the channels: a head's rotary pairs are (i, i + d / 2)
TERMS = 2  # 16-bit terms of a matrix
# For means, which cross the warps four registers at a time: room for one would cost two barriers.
_REDUCTION_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of a launch on the joint projection `[b, n, 3, h, d]`.

  Attributes:
    block: rows of a tile.
    front: rows of the results before the tokens; without compression they are not written.
    cells: coarse rows per tile as stored, a multiple of 8; 0 without compression.
    in_place: coarse rows go straight to the front of the results; otherwise to their own arrays.
    pooled: means over the tiles' valid rows are asked for.
    filtered: the arrays of "qkv" that are band-filtered, in heads that have a band.
    over_heads: a token is normed by its inverse, which is given, with gains of each head.
  """

  b: int
  n: int
  h: int
  d: int
  block: int
  front: int = 0
  cells: int = 0
  in_place: bool = True
  pooled: bool = False
  filtered: str = ""
  over_heads: bool = False

  @property
  def tiles(self) -> int:
    """Tiles of a sample."""
    return self.n // self.block

  @property
  def pieces(self) -> int:
    """Pieces of 64 rows per tile and array."""
    return self.block // ROWS

  @property
  def arrays(self) -> str:
    """Arrays that are written: v only behind other rows, else it is a slice of the projection."""
    return "qkv" if self.front else "qk"

  @property
  def slots(self) -> int:
    """Slots of the ring: a head's pieces always fall on the same, so that addresses are static."""
    return 3 if self.front else 2 * self.pieces

  @property
  def half(self) -> int:
    """Channels of a half."""
    return self.d // HALVES

  @property
  def chunks(self) -> list:
    """Columns of a half, in turn."""
    return [pl.ds(start, COLUMNS) for start in range(0, self.half, COLUMNS)]

  @property
  def heads(self) -> int:
    """Heads that one thread block walks over."""
    return streaming_heads(self.h, self.b * self.tiles)

  @property
  def flops(self) -> int:
    """FLOPs of the products, with a filter's if every head has a band."""
    rows = ROWS * len(self.arrays) * (self.cells > 0) + self.block * len(self.filtered)
    return TERMS * 2 * self.b * self.h * self.n * rows * self.d

  def results(self, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the types of the results: tokens, coarse rows of their own, means."""
    shapes = {x: (self.b, self.front + self.n, self.h, self.d) for x in self.arrays}
    found = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    if self.cells and not self.in_place:
      cells = jax.ShapeDtypeStruct((self.b, self.tiles, self.cells, self.h, self.d), dtype)
      found |= {f"{x}_cells": cells for x in "qkv"}
    if self.pooled:
      pool = jax.ShapeDtypeStruct((self.b, self.h, self.tiles, HALVES, self.half), jnp.float32)
      found |= {f"{x}_pool": pool for x in "qk"}
    return found

  def scratch(self, dtype) -> dict:
    """Returns shared memory and barriers; all arrays share a swizzle and cut every `COLUMNS`."""
    cut = functools.partial(tiles_type, dtype=dtype, lanes=COLUMNS)
    found = {
      "ring": cut(self.slots, HALVES, ROWS, self.half),
      "full": plgpu.Barrier(num_arrivals=HALVES, num_barriers=self.slots),
      "out": cut(HALVES, ROWS, self.half),
    }
    if self.cells:
      found["weights_sm"] = cut(TERMS, self.pieces, ROWS, ROWS)
      found["weights_full"] = plgpu.Barrier(num_arrivals=TERMS * self.pieces)
    if self.pooled:
      found["pool"] = plgpu.SMEM((HALVES, self.half), jnp.float32)
    return found


def forward(plan: Plan, operands: dict) -> dict:
  """Runs the kernel and returns the arrays of `plan.results`.

  Args:
    operands: by name:
      joint: bf16 `[b, n, 3, h, d]`.
      bias: float32 `[3, h, 2, d / 2]`.
      cos, sin: float32 `[n, d / 2]`.
      gains: float32 `[2, 2, d / 2]`, of q and k, both halves; `[2, h, 2, d / 2]` if
        `plan.over_heads`.
      lengths: int32 `[tiles]`; for means and compression.
      weights: bf16 `[classes, 2, pieces, 64, 64]`, two terms whose sum is the matrix; rows are
        cells. This and the next three: for compression.
      classes: int32 `[tiles]`.
      cell_cos, cell_sin: float32 `[tiles * cells + 64 - cells, d / 2]`.
      filters: bf16 `[classes, bands, pieces of rows, 2 terms, pieces of columns, 64, 64]`. This and
        the next: for filters.
      bands: int32 `[b, h]`, 0 where tokens are left as they are.
      inverses: float32 `[b, 2, n]`, what q and k of a token are multiplied by; if
        `plan.over_heads`.
      cell_inverses: float32 `[b, 2, tiles * cells + 64 - cells]`; with compression, too.
  """
  dtype = operands["joint"].dtype
  results = plan.results(dtype)
  scratch = plan.scratch(dtype)
  names = (*operands, *results, *scratch)

  def prepare(*refs):
    _Block(plan, types.SimpleNamespace(**dict(zip(names, refs, strict=True)))).run()

  prepare.__name__ = "prepare" if plan.front else "norm_rotary"
  found = launch(
    prepare,
    list(operands.values()),
    results.values(),
    scratch.values(),
    blocks=plan.b * plan.tiles * (plan.h // plan.heads),
    cost=streaming_cost(operands, results, plan.flops),
    # All layouts are given, and inferring them would take Mosaic eight seconds of every compile.
    by_lane=True,
    reduction_bytes=_REDUCTION_BYTES * plan.pooled,
  )
  return dict(zip(results, found, strict=True))


class _Block:
  """The work of one thread block; `refs` are named as in `Plan`."""

  def __init__(self, plan, refs):
    self.plan = plan
    self.refs = refs
    program = lax.axis_index("block")
    groups = plan.h // plan.heads
    place = lax.div(program, jnp.int32(groups))
    self.first = lax.rem(program, jnp.int32(groups)) * plan.heads
    self.sample = lax.div(place, jnp.int32(plan.tiles))
    self.tile = lax.rem(place, jnp.int32(plan.tiles))

  def run(self):
    plan = self.plan
    refs = self.refs
    for piece in range(plan.slots):
      self.fetch(self.first, piece)
    if plan.cells:
      self.kind = refs.classes[self.tile]
      if not plan.filtered:
        self.load_weights(refs.weights.at[self.kind])
    if plan.pooled or plan.cells:
      self.valid = refs.lengths[self.tile]

    @pl.loop(0, plan.heads)
    def _head(i):
      for which in range(len(plan.arrays)):
        self.one_array(i, which)

    plgpu.wait_smem_to_gmem(0)

  # ---- memory ------------------------------------------------------------------------------------

  def rows(self, part):
    return pl.ds(self.tile * self.plan.block + part * ROWS, ROWS)

  def fetch(self, head, piece):
    plan = self.plan
    refs = self.refs
    slot = piece % plan.slots
    which, part = divmod(piece, plan.pieces)
    for half in range(HALVES):
      columns = pl.ds(half * plan.half, plan.half)
      source = refs.joint.at[self.sample, self.rows(part), which, head, columns]
      plgpu.copy_gmem_to_smem(source, refs.ring.at[slot, half], refs.full.at[slot])

  def refill(self, i, piece):
    """Refills the slot that `piece` of the block's head `i` leaves free."""
    count = len(self.plan.arrays) * self.plan.pieces
    following = piece + self.plan.slots
    if following < count:
      self.fetch(self.first + i, following)
    else:
      pl.when(i + 1 < self.plan.heads)(lambda: self.fetch(self.first + i + 1, following - count))

  def load_weights(self, source):
    """Brings both terms of 64 rows; all warps that used the last have gone through `store`."""
    refs = self.refs
    for term in range(TERMS):
      for part in range(self.plan.pieces):
        target = refs.weights_sm.at[term, part]
        plgpu.copy_gmem_to_smem(source.at[term, part], target, refs.weights_full)
    plgpu.barrier_wait(refs.weights_full)

  def store(self, target, rows=ROWS):
    """Sends the first rows of the staging to `target`, `[rows, d]`."""
    half = self.plan.half
    plgpu.commit_smem()  # also: every thread has read the piece that is replaced next
    for i in range(HALVES):
      source = self.refs.out.at[i, pl.ds(0, rows)]
      plgpu.copy_smem_to_gmem(source, target.at[:, pl.ds(i * half, half)])

  # ---- work --------------------------------------------------------------------------------------

  def one_array(self, i, which):
    """Brings one array of the block's head `i` to its results; `which`: 0, 1, 2 for q, k, v."""
    plan = self.plan
    refs = self.refs
    head = self.first + i
    pieces = range(which * plan.pieces, (which + 1) * plan.pieces)
    result = getattr(refs, "qkv"[which])
    filtered = "qkv"[which] in plan.filtered
    pooled = plan.pooled and which < 2
    for piece in pieces:
      plgpu.barrier_wait(refs.full.at[piece % plan.slots])
    if plan.cells:
      if plan.filtered and (which == 0 or plan.filtered == "qkv"):
        self.load_weights(refs.weights.at[self.kind])  # the last filters took the weights' place
      self.compress(which, head, result)
    for part, piece in enumerate(pieces):

      def tokens(half, columns, slot=piece % plan.slots):
        return refs.ring.at[slot, half, :, columns][...].astype(jnp.float32)

      tables = [x.at[self.rows(part)] for x in (refs.cos, refs.sin)]
      inverse = None
      if plan.over_heads and which < 2:
        inverse = refs.inverses.at[self.sample, which, self.rows(part)]
      self.finish(tokens, which, head, tables, inverse, pooled_part=part if pooled else None)
      if filtered:
        band = refs.bands[self.sample, head]
        pl.when(band > 0)(functools.partial(self.filter, which, head, band - 1, part, tables))
      rows = pl.ds(plan.front + self.tile * plan.block + part * ROWS, ROWS)
      self.store(result.at[self.sample, rows, head])
      if not filtered:
        self.refill(i, piece)
    if filtered:  # each filtered piece needs all of them
      for piece in pieces:
        self.refill(i, piece)
    if pooled:
      pool_gm = getattr(refs, f"{'qk'[which]}_pool")
      plgpu.copy_smem_to_gmem(refs.pool, pool_gm.at[self.sample, head, self.tile])

  def product(self, which):
    """Multiplies both terms in `weights_sm` by the tile: `(half, columns)` -> `[64, COLUMNS]`."""
    plan = self.plan
    refs = self.refs
    chunks = [(half, columns) for half in range(HALVES) for columns in plan.chunks]
    first_slot = which * plan.pieces % plan.slots

    def multiply(*accumulators):
      # A loop, not unrolled: all addresses at once would cost a hundred registers. Padding adds 0.
      @pl.loop(0, TERMS * lax.div(self.valid + (ROWS - 1), jnp.int32(ROWS)))
      def _product(step):
        part = lax.div(step, jnp.int32(TERMS))
        term = lax.rem(step, jnp.int32(TERMS))
        slot = lax.rem(part + first_slot, jnp.int32(plan.slots))
        for acc, (half, columns) in zip(accumulators, chunks, strict=True):
          plgpu.wgmma(acc, refs.weights_sm.at[term, part], refs.ring.at[slot, half, :, columns])

      return [acc[...] for acc in accumulators]

    found = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, COLUMNS), jnp.float32)] * len(chunks))
    return lambda half, columns: found[half * len(plan.chunks) + plan.chunks.index(columns)]

  def compress(self, which, head, result):
    plan = self.plan
    refs = self.refs
    rows = pl.ds(self.tile * plan.cells, ROWS)
    tables = [x.at[rows] for x in (refs.cell_cos, refs.cell_sin)]
    inverse = None
    if plan.over_heads and which < 2:
      inverse = refs.cell_inverses.at[self.sample, which, rows]
    self.finish(self.product(which), which, head, tables, inverse)
    if plan.in_place:
      target = result.at[self.sample, pl.ds(self.tile * plan.cells, plan.cells), head]
    else:
      target = getattr(refs, f"{'qkv'[which]}_cells").at[self.sample, self.tile, :, head]
    self.store(target, plan.cells)

  def filter(self, which, head, band, part, tables):
    """Replaces a staged piece, of which the mean was taken, by its filtered form."""
    self.load_weights(self.refs.filters.at[self.kind, band, part])
    self.finish(self.product(which), which, head, tables, biased=False)

  def finish(self, read, which, head, tables, inverse=None, pooled_part=None, biased=True):
    """Writes 64 rows, some channels at a time to save registers; only `biased` gets the bias.

    `inverse`: of the norm, a reference to `[64]`; None: the norm is over the head's own channels.
    """
    plan = self.plan
    refs = self.refs

    def column_numbers(ref):
      return over_rows(plgpu.load(ref, layout=PER_COLUMN, optimized=False))

    def bias(half, columns):
      return column_numbers(refs.bias.at[which, head, half, columns]) if biased else 0.0

    def rows(half, columns):
      return read(half, columns) + bias(half, columns)

    normed = which < 2
    if normed:
      gains = refs.gains.at[which, head] if plan.over_heads else refs.gains.at[which]
    if inverse is not None:
      inverse = over_columns(plgpu.load(inverse, layout=PER_ROW, optimized=False), COLUMNS)
    elif normed:
      squares = sum(
        (x * x).sum(axis=1)
        for x in (rows(half, columns) for half in range(HALVES) for columns in plan.chunks)
      )
      inverse = over_columns(lax.rsqrt(squares * (1 / plan.d) + EPS), COLUMNS)
    before = self.pool_before(pooled_part)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # also: every thread has read the means
    for i, columns in enumerate(plan.chunks):
      first, second = (rows(half, columns) for half in range(HALVES))
      if normed:
        pair = (column_numbers(gains.at[half, columns]) for half in range(HALVES))
        first, second = (x * inverse * gain for x, gain in zip((first, second), pair, strict=True))
        cos, sin = (
          plgpu.load(table.at[:, columns], layout=LAYOUT, optimized=False) for table in tables
        )
        first, second = first * cos - second * sin, second * cos + first * sin
      for half, x in enumerate((first, second)):
        x = x.astype(refs.out.dtype)
        refs.out.at[half, :, columns][...] = x
        if pooled_part is not None:
          mean = self.mean(x, pooled_part)
          refs.pool.at[half, columns][...] = mean if pooled_part == 0 else before[half][i] + mean

  def pool_before(self, part):
    """Returns earlier pieces' part of the means, or None; all threads read before one writes."""
    if not part:
      return None
    pool = self.refs.pool
    return [
      [plgpu.load(pool.at[half, columns], layout=PER_COLUMN) for columns in self.plan.chunks]
      for half in range(HALVES)
    ]

  def mean(self, x, part):
    """Returns a piece's share of the mean over the tile's valid rows, float32 `[COLUMNS]`."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), 0, layout=LAYOUT)
    seen = jnp.where(row < self.valid - part * ROWS, x.astype(jnp.float32), 0.0)
    return seen.sum(axis=0) * (1.0 / self.valid.astype(jnp.float32))
