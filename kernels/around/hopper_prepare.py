"""The Hopper kernel of `kernels.around.prepare`: one pass over the joint projection, bound by memory.

A thread block is one warpgroup. It takes one tile and some heads, and brings q, k and v in pieces of 64 rows through a ring of
slots; two or three blocks share a multiprocessor and hide each other's latencies. A piece lies in shared memory as two halves
of the channels, so that rotary's pairs meet in one thread; the weights of compression stay there for all heads of the block.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
from freqformer.kernels.hopper import parts
from freqformer.kernels.hopper.launch import launch, streaming_cost
from freqformer.kernels.hopper.parts import LAYOUT, ROWS
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

EPS = 1e-6
# As many thread blocks as run at once on 132 multiprocessors, times four: the last round is then at least four fifths full.
BLOCKS = 4 * 2 * 132
COLUMNS = 32  # of each half, that are worked on at once
_REDUCED = LAYOUT.reduce(0)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of a launch.

  Attributes:
    b, n, h, d: of the joint projection `[b, n, 3, h, d]`.
    block: rows of a tile.
    front: rows of the results before the tokens.
    cells: coarse rows per tile as stored, a multiple of 8; 0 without compression.
    in_place: coarse rows go straight to the front of the results; otherwise to arrays of their own.
    pooled: whether means over the tiles' valid rows are asked for.
    filtered: which of "qkv" are band-filtered, in heads that have a band.
    share: heads that one thread block walks over; 0: as many as leave enough blocks.
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
  share: int = 0

  @property
  def tiles(self):
    return self.n // self.block

  @property
  def pieces(self):
    """Pieces of 64 rows per tile and array."""
    return self.block // ROWS

  @property
  def arrays(self):
    """v is written where coarse tokens go with it; tokens alone are a slice of the projection."""
    return "qkv" if self.cells else "qk"

  @property
  def slots(self):
    """Of the ring: a head's pieces fall on the same slots every time, so that addresses are known when it is compiled."""
    return 3 if self.cells else 2 * self.pieces

  @property
  def half(self):
    return self.d // 2

  @property
  def chunks(self):
    """Columns of a half, in turn."""
    return [pl.ds(start, COLUMNS) for start in range(0, self.half, COLUMNS)]

  @property
  def heads(self):
    """Heads that one thread block walks over."""
    if self.share:
      return self.share
    dividing = [heads for heads in range(1, self.h + 1) if self.h % heads == 0]
    return max(
      (heads for heads in dividing if self.b * self.tiles * (self.h // heads) >= BLOCKS), default=1
    )

  @property
  def flops(self):
    """Of products, in two terms: with the compression's matrix, and with a filter's if every head has a band."""
    rows = ROWS * len(self.arrays) * (self.cells > 0) + self.block * len(self.filtered)
    return 4 * self.b * self.h * self.n * rows * self.d

  def operands(self) -> tuple[str, ...]:
    names = ["joint", "bias", "cos", "sin", "gains"]
    names += ["lengths"] * (self.pooled or self.cells > 0)
    names += ["weights", "classes", "cell_cos", "cell_sin"] * (self.cells > 0)
    return (*names, *(("filters", "bands") if self.filtered else ()))

  def results(self, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    b, h, d = self.b, self.h, self.d
    found = {x: jax.ShapeDtypeStruct((b, self.front + self.n, h, d), dtype) for x in self.arrays}
    if self.cells and not self.in_place:
      found |= {
        f"{x}_cells": jax.ShapeDtypeStruct((b, self.tiles, self.cells, h, d), dtype) for x in "qkv"
      }
    if self.pooled:
      found |= {
        f"{x}_pool": jax.ShapeDtypeStruct((b, h, self.tiles, 2, self.half), jnp.float32)
        for x in "qk"
      }
    return found

  def scratch(self, dtype) -> dict:
    found = {
      "ring": _columns_type(self.slots, 2, ROWS, self.half, dtype=dtype),
      "full": plgpu.Barrier(num_arrivals=2, num_barriers=self.slots),
      "out": _columns_type(2, ROWS, self.half, dtype=dtype),
    }
    if self.cells:
      found["weights_sm"] = _columns_type(2, self.pieces, ROWS, ROWS, dtype=dtype)
      found["weights_full"] = plgpu.Barrier(num_arrivals=2 * self.pieces)
    if self.pooled:
      found["pool"] = plgpu.SMEM((2, self.half), jnp.float32)
    return found


def _columns_type(*shape, dtype):
  """Shared memory that can be cut every `COLUMNS` columns; operands of one product must share a swizzle, so it serves all."""
  transforms = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(2 * COLUMNS))
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def forward(plan: Plan, operands: dict) -> dict:
  """Runs the kernel.

  Args:
    operands: by the names of `plan.operands()`: joint bf16 `[b, n, 3, h, d]`; bias float32 `[3, h, 2, d / 2]`; cos, sin
      float32 `[n, d / 2]`; gains float32 `[2, 2, d / 2]` (q and k, both halves); lengths int32 `[tiles]`; weights bf16
      `[classes, 2, pieces, 64, 64]` (two terms whose sum is the matrix; rows are cells); classes int32 `[tiles]`; cell_cos,
      cell_sin float32 `[tiles * cells + 64 - cells, d / 2]`; filters bf16 `[classes, 2, pieces, 2, pieces, 64, 64]` (bands;
      pieces of rows, terms, pieces of columns); bands int32 `[b, h]`, 0 where v is left as it is.

  Returns:
    The arrays of `plan.results`.
  """
  dtype = operands["joint"].dtype
  results, scratch = plan.results(dtype), plan.scratch(dtype)
  names = (*plan.operands(), *results, *scratch)

  def prepare(*refs):
    _Block(plan, types.SimpleNamespace(**dict(zip(names, refs, strict=True)))).run()

  prepare.__name__ = "prepare" if plan.cells else "norm_rotary"
  taken, blocks = (
    [operands[name] for name in plan.operands()],
    plan.b * plan.tiles * (plan.h // plan.heads),
  )
  cost = streaming_cost(taken, results, plan.flops)
  # By lane: all layouts are given, and inferring them would take Mosaic eight seconds of every compile. Means cross the warps,
  # four registers at a time: with room for one, each would cost two barriers.
  options = {"by_lane": True, "reduction_bytes": 4096 * plan.pooled}
  found = launch(
    prepare, taken, results.values(), scratch.values(), blocks=blocks, cost=cost, **options
  )
  return dict(zip(results, found, strict=True))


class _Block:
  """What one thread block does; `refs` are named as in `Plan`."""

  def __init__(self, plan, refs):
    self.plan, self.refs = plan, refs
    program, groups = lax.axis_index("block"), plan.h // plan.heads
    rest = lax.div(program, jnp.int32(groups))
    self.first = lax.rem(program, jnp.int32(groups)) * plan.heads
    self.sample, self.tile = (
      lax.div(rest, jnp.int32(plan.tiles)),
      lax.rem(rest, jnp.int32(plan.tiles)),
    )

  def run(self):
    plan, refs = self.plan, self.refs
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

  # ---- memory --------------------------------------------------------------------------------------------------------

  def rows(self, part):
    return pl.ds(self.tile * self.plan.block + part * ROWS, ROWS)

  def fetch(self, head, piece):
    """Starts the copy of one of a head's pieces."""
    plan, refs, slot = self.plan, self.refs, piece % self.plan.slots
    which, part = divmod(piece, plan.pieces)
    for half in range(2):
      source = refs.joint.at[
        self.sample, self.rows(part), which, head, pl.ds(half * plan.half, plan.half)
      ]
      plgpu.copy_gmem_to_smem(source, refs.ring.at[slot, half], refs.full.at[slot])

  def fetch_behind(self, i, piece):
    """Refills the slot that `piece` of the block's head i leaves free."""
    count, following = len(self.plan.arrays) * self.plan.pieces, piece + self.plan.slots
    if following < count:
      self.fetch(self.first + i, following)
    else:
      pl.when(i + 1 < self.plan.heads)(lambda: self.fetch(self.first + i + 1, following - count))

  def load_weights(self, source):
    """Brings both terms of 64 rows of a matrix. Whoever still used the last ones has gone through `store` since."""
    refs = self.refs
    for term in range(2):
      for part in range(self.plan.pieces):
        plgpu.copy_gmem_to_smem(
          source.at[term, part], refs.weights_sm.at[term, part], refs.weights_full
        )
    plgpu.barrier_wait(refs.weights_full)

  def store(self, target, rows=ROWS):
    """Sends the first rows of the staging to `target`, `[rows, d]`."""
    refs, half = self.refs, self.plan.half
    plgpu.commit_smem()  # also: every thread has read the piece that is replaced next
    for i in range(2):
      plgpu.copy_smem_to_gmem(refs.out.at[i, pl.ds(0, rows)], target.at[:, pl.ds(i * half, half)])

  # ---- work ----------------------------------------------------------------------------------------------------------

  def one_array(self, i, which):
    plan, refs, head = self.plan, self.refs, self.first + i
    pieces = range(which * plan.pieces, (which + 1) * plan.pieces)
    result = getattr(refs, "qkv"[which])
    for piece in pieces:
      plgpu.barrier_wait(refs.full.at[piece % plan.slots])
    if plan.cells:
      if plan.filtered and (
        which == 0 or plan.filtered == "qkv"
      ):  # the last filters took the weights' place
        self.load_weights(refs.weights.at[self.kind])
      self.compress(which, head, result)
    filtered = "qkv"[which] in plan.filtered
    for part, piece in enumerate(pieces):

      def tokens(half, columns, slot=piece % plan.slots):
        return refs.ring.at[slot, half, :, columns][...].astype(jnp.float32)

      tables = [x.at[self.rows(part)] for x in (refs.cos, refs.sin)]
      self.finish(tokens, which, head, tables, part if plan.pooled and which < 2 else None)
      if filtered:
        band = refs.bands[self.sample, head]
        pl.when(band > 0)(functools.partial(self.filter, which, head, band - 1, part, tables))
      rows = pl.ds(plan.front + self.tile * plan.block + part * ROWS, ROWS)
      self.store(result.at[self.sample, rows, head])
      if not filtered:
        self.fetch_behind(i, piece)
    for piece in pieces if filtered else ():  # each filtered piece needs all of them
      self.fetch_behind(i, piece)
    if plan.pooled and which < 2:
      plgpu.copy_smem_to_gmem(
        refs.pool, getattr(refs, f"{'qk'[which]}_pool").at[self.sample, head, self.tile]
      )

  def product(self, which):
    """The matrix in `weights_sm` times the tile: `(half, columns)` -> float32 `[64, COLUMNS]`.

    It comes in two terms, since the tensor cores round it to 16 bits.
    """
    plan, refs = self.plan, self.refs
    chunks = [(half, columns) for half in range(2) for columns in plan.chunks]
    first_slot = which * plan.pieces % plan.slots

    def multiply(*accumulators):
      # A loop, never unrolled: all products' addresses at once would cost a hundred registers. Pieces of padding add nothing.
      @pl.loop(0, 2 * lax.div(self.valid + (ROWS - 1), jnp.int32(ROWS)))
      def _product(step):
        part, term = lax.div(step, jnp.int32(2)), lax.rem(step, jnp.int32(2))
        slot = lax.rem(part + first_slot, jnp.int32(plan.slots))
        for acc, (half, columns) in zip(accumulators, chunks, strict=True):
          plgpu.wgmma(acc, refs.weights_sm.at[term, part], refs.ring.at[slot, half, :, columns])

      return [acc[...] for acc in accumulators]

    found = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, COLUMNS), jnp.float32)] * len(chunks))
    return lambda half, columns: found[half * len(plan.chunks) + plan.chunks.index(columns)]

  def compress(self, which, head, result):
    """The tile's coarse rows."""
    plan, refs = self.plan, self.refs
    tables = [x.at[pl.ds(self.tile * plan.cells, ROWS)] for x in (refs.cell_cos, refs.cell_sin)]
    self.finish(self.product(which), which, head, tables)
    if plan.in_place:
      target = result.at[self.sample, pl.ds(self.tile * plan.cells, plan.cells), head]
    else:
      target = getattr(refs, f"{'qkv'[which]}_cells").at[self.sample, self.tile, :, head]
    self.store(target, plan.cells)

  def filter(self, which, head, band, part, tables):
    """A piece in its band, in the place of the unfiltered one, of which the mean was taken."""
    self.load_weights(self.refs.filters.at[self.kind, band, part])
    self.finish(self.product(which), which, head, tables, biased=False)

  def finish(self, read, which, head, tables, pooled_part=None, biased=True):
    """Bias; norm and rotary of q and k: 64 rows into the staging, some channels at a time to save registers.

    Args:
      read: `(half, columns)` -> float32 `[64, COLUMNS]`; which: 0, 1, 2 for q, k, v.
      tables: cos and sin in global memory, `[64, d / 2]`.
      pooled_part: which piece of the tile this is, if its rows count for the mean.
      biased: whether the bias counts; it is a constant, and neither mid nor high holds one.
    """
    plan, refs = self.plan, self.refs

    def over_rows(x):
      return parts.over_rows(plgpu.load(x, layout=_REDUCED, optimized=False))

    def bias(half, columns):
      return over_rows(refs.bias.at[which, head, half, columns]) if biased else 0.0

    def rows(half, columns):
      return read(half, columns) + bias(half, columns)

    if which < 2:
      squares = sum(
        (x * x).sum(axis=1)
        for x in (rows(half, columns) for half in range(2) for columns in plan.chunks)
      )
      inverse = parts.over_columns(lax.rsqrt(squares * (1 / plan.d) + EPS), COLUMNS)
    before = self.pool_before(pooled_part)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # also: every thread has read the means
    for i, columns in enumerate(plan.chunks):
      first, second = (rows(half, columns) for half in range(2))
      if which < 2:
        gains = (over_rows(refs.gains.at[which, half, columns]) for half in range(2))
        first, second = (x * inverse * gain for x, gain in zip((first, second), gains, strict=True))
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
    """What earlier pieces of the tile have added to its means. Several threads hold each number: all read before one writes."""
    if not part:
      return None
    return [
      [
        plgpu.load(self.refs.pool.at[half, columns], layout=_REDUCED)
        for columns in self.plan.chunks
      ]
      for half in range(2)
    ]

  def mean(self, x, part):
    """A piece's share of the mean over the tile's valid rows, float32 `[COLUMNS]`."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), 0, layout=LAYOUT)
    seen = jnp.where(row < self.valid - part * ROWS, x.astype(jnp.float32), 0.0)
    return seen.sum(axis=0) * (1.0 / self.valid.astype(jnp.float32))
