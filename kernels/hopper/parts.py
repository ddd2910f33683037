"""What the forward and backward Mosaic GPU kernels share: list codes, shared-memory types, products, the interpreter's limits.

The three kernels differ in what a thread block keeps and what it walks over; everything else is here.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CAPABILITY = "9.0"
LOG2E = math.log2(math.e)
# The raw score of what may not be seen. Finite, so that no difference of two of them is NaN.
HIDDEN = -1e30
# A maximum below this has met hidden keys only: no true score of finite bf16 or f16 rows comes near it.
DEAD = -1e25
ROWS = 64  # rows of one consumer warpgroup: one wgmma
LAYOUT = plgpu.Layout.WGMMA

_interpret = contextvars.ContextVar("interpret", default=None)


@contextlib.contextmanager
def interpreted(detect_races: bool = False):
  """Runs the kernels traced inside in JAX's GPU interpreter, on any device: slow, for tests of small shapes."""
  params = plgpu.InterpretGPUParams(detect_races=detect_races)
  token = _interpret.set(params)
  try:
    with plgpu.force_gpu_interpret_mode(params):
      yield
  finally:
    _interpret.reset(token)


def is_interpreted() -> bool:
  """Whether kernels are being traced for the interpreter."""
  return _interpret.get() is not None


def wrong_device(target) -> str | None:
  """Why kernels for Hopper cannot run on a `Target`; None if they can, or are traced for the interpreter."""
  if is_interpreted() or target.capability == CAPABILITY:
    return None
  return (
    f"it needs an NVIDIA GPU of compute capability {CAPABILITY} (Hopper), the target is {target}"
  )


# ---- lists -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Walk:
  """How a list of tiles is cut into stages of `step` rows: short tiles share one, long tiles are split.

  Attributes:
    step: rows of a stage.
    block: rows of a listed tile.
  """

  step: int
  block: int

  @property
  def parts(self) -> int:
    """Tiles that share a stage."""
    return max(1, self.step // self.block)

  @property
  def splits(self) -> int:
    """Stages that a tile needs."""
    return max(1, self.block // self.step)

  @property
  def rows(self) -> int:
    """Rows that are copied at once."""
    return min(self.step, self.block)

  def steps(self, count):
    """Stages of a list of `count` tiles."""
    return lax.div(count + _i32(self.parts - 1), _i32(self.parts)) * self.splits

  def entries(self, s, count, entry):
    """`(tile, first row within it, valid rows)` of each part of stage s; parts behind the list are empty.

    Args:
      s: the stage; count: tiles in the list; entry: `i -> (tile, valid rows)` of a list entry.
    """
    if self.splits > 1:
      tile, length = entry(lax.div(s, _i32(self.splits)))
      first = lax.rem(s, _i32(self.splits)) * self.step
      return [(tile, first, lax.clamp(_i32(0), length - first, _i32(self.step)))]
    found = []
    for part in range(self.parts):
      i = s * self.parts + part
      tile, length = entry(i if part == 0 else jnp.minimum(i, count - 1))
      found.append((tile, _i32(0), length if part == 0 else jnp.where(i < count, length, 0)))
    return found

  def copy(self, source, target, full, entries):
    """Starts the copies of one stage; each arrives on `full`.

    Args:
      source: rows (a slice) -> the global rows; target: the stage's slot of the ring.
    """
    for part, (tile, first, _) in enumerate(entries):
      rows = pl.ds(tile * self.block + first, self.rows)
      plgpu.copy_gmem_to_smem(source(rows), target.at[pl.ds(part * self.rows, self.rows)], full)

  def whole(self, entries):
    """Whether every row of the stage is valid."""
    return functools.reduce(jnp.logical_and, [length == self.rows for _, _, length in entries])

  def hide(self, x, entries):
    """Columns of `x` `[ROWS, step]` that are no valid rows become `HIDDEN`; most stages have none and skip it."""
    return lax.cond(self.whole(entries), lambda x: x, lambda x: self._hidden(x, entries), x)

  def _hidden(self, x, entries):
    column = columns_iota(self.step)
    seen = column < entries[0][2]
    if self.parts == 2:
      seen = jnp.where(column < self.rows, seen, column < self.rows + entries[1][2])
    return jnp.where(seen, x, HIDDEN)

  def spread(self, numbers):
    """One number per part as float32 `[ROWS, step]`."""

    def full(x):
      return plgpu.layout_cast(jnp.full((ROWS, self.step), x, jnp.float32), LAYOUT)

    if self.parts == 1:
      return full(numbers[0])
    return jnp.where(columns_iota(self.step) < self.rows, full(numbers[0]), full(numbers[1]))


class TileList:
  """The tiles that one thread block walks over, `count` of them, in the stages of `walk`; `entry`: see `Walk.entries`."""

  def __init__(self, walk: Walk, count, entry: Callable):
    self.walk, self.count, self.entry = walk, count, entry
    self.steps = walk.steps(count)  # here, before warpgroups part, not anew in each

  def entries(self, s):
    """The parts of stage s, read from global memory."""
    return self.walk.entries(s, self.count, self.entry)


@dataclasses.dataclass(frozen=True)
class Deal:
  """A deal of a head's tiles to thread blocks and to the warpgroups inside them.

  A block has one side, or two with a tile, a list, rings and a memory warpgroup each. Compute
  warpgroups come first, memory warpgroups behind them.

  Attributes:
    tiles: of a head.
    sides: tiles of a block, 1 or 2.
    readers: compute warpgroups of a tile; with two sides 1.
    stages: slots of a ring that one side has.
  """

  tiles: int
  sides: int
  readers: int
  stages: int

  @property
  def blocks(self) -> int:
    """Thread blocks of a head."""
    return -(-self.tiles // self.sides)

  @property
  def consumers(self) -> int:
    """Compute warpgroups of a block."""
    return self.sides * self.readers

  @property
  def warpgroups(self) -> int:
    """All warpgroups of a block."""
    return self.consumers + self.sides

  @property
  def slots(self) -> int:
    """Slots of a ring, of all sides."""
    return self.sides * self.stages

  def side(self, warpgroup):
    """The side that a warpgroup works for."""
    return lax.rem(warpgroup, _i32(2)) if self.sides == 2 else _i32(0)

  def tile(self, place, side):
    """The tile of a side.

    The last block of an odd number of tiles has its tile twice, and stores the same twice.
    """
    return jnp.minimum(place * 2 + side, _i32(self.tiles - 1)) if self.sides == 2 else place

  def part(self, warpgroup):
    """Which 64 rows of its tile a compute warpgroup keeps."""
    return warpgroup if self.sides == 1 else _i32(0)

  def slot(self, side, s):
    """The slot of a side's stage s."""
    return side * self.stages + lax.rem(s, _i32(self.stages))

  def following(self, side, slot):
    """The slot behind `slot`, without a division."""
    first = side * self.stages
    return jnp.where(slot == first + (self.stages - 1), first, slot + 1)


def place(order, tiles: int, h: int):
  """Returns the sample, the head and the place of this thread block among the head's.

  Tiles of a head run together, so that they meet the same keys in the L2.

  Args:
    order: of `lists.costliest_first`, or None for heads as they are numbered.
    tiles: thread blocks of a head.
    h: heads.
  """
  program = lax.axis_index("block")
  tile = lax.rem(program, _i32(tiles))
  pair = lax.div(program, _i32(tiles))
  if order is not None:
    pair = order[pair]
  return lax.div(pair, _i32(h)), lax.rem(pair, _i32(h)), tile


def at(ref, *index):
  """The index into an array that may be broadcast along any axis (size 1)."""
  return tuple(_i32(0) if size == 1 else i for size, i in zip(ref.shape, index, strict=False))


def _i32(x):
  return jnp.asarray(x, jnp.int32)


# ---- memory and products ---------------------------------------------------------------------------------------------


def tiles_type(*shape, dtype):
  """Shared memory for `[..., rows, d]` in the swizzled form that TMA writes and wgmma reads."""
  swizzle = min(128, shape[-1] * np.dtype(dtype).itemsize)
  lanes = swizzle // np.dtype(dtype).itemsize
  return plgpu.SMEM(
    shape, dtype, transforms=(plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(swizzle))
  )


def rows_full(value, layout=LAYOUT):
  """float32 `[ROWS]`, one number per row of the warpgroup."""
  return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), layout.reduce(1))


def zeros(columns: int):
  """float32 `[ROWS, columns]` accumulator."""
  return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), LAYOUT)


def over_columns(x, columns: int):
  """`[ROWS] -> [ROWS, columns]`."""
  return lax.broadcast_in_dim(x, (ROWS, columns), [0])


def over_rows(x):
  """`[columns] -> [ROWS, columns]`."""
  return lax.broadcast_in_dim(x, (ROWS, x.shape[0]), [1])


def exponentials(x, unit: float, top, columns: int):
  """`exp2(x * unit - top)`, the probabilities of a stage before they are divided by their sum.

  A device may compute the exponent by one fused multiply-add: the exact product minus a maximum
  that was rounded. Over hidden scores alone, what is left of -1e30 may be +1e21, and its power of
  two infinite. Running maxima therefore start at `DEAD`, not at `HIDDEN`: that is so far above all
  hidden scores that their powers are 0 however the exponents are rounded.

  Args:
    x: raw scores, float32 `[ROWS, columns]`.
    unit: what makes log2 units of them.
    top: running maximum of each row in log2 units, float32 `[ROWS]`.
  """
  return jnp.exp2(x * unit - over_columns(top, columns))


def product(a, b, issued=lambda: None):
  """`a b^T` of shared-memory operands `[ROWS, d]`, `[columns, d]`; `issued` runs while the tensor cores do."""

  def run(acc):
    plgpu.wgmma(acc, a, b.transpose((1, 0)))
    issued()
    return acc[...]

  return pl.run_scoped(run, plgpu.ACC((ROWS, b.shape[0]), jnp.float32))


def two_products(a, b, c, d):
  """`a b^T` and `c d^T`, issued together.

  The first is waited for alone, but ptxas moves that wait to the second's: what runs beside them is
  the other warpgroup.
  """

  def run(first, second):
    plgpu.wgmma(first, a, b.transpose((1, 0)))
    plgpu.wgmma(second, c, d.transpose((1, 0)))
    return plgpu.wgmma_accumulator_load(first, wait_n=1), second[...]

  shape = (ROWS, b.shape[0])
  return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))


def accumulate(acc, a, b, staging=None, issued=lambda: None):
  """`acc + a b` with `a` `[ROWS, k]` in registers and `b` `[k, d]` in shared memory.

  Interpreted, wgmma takes its left operand from shared memory only (`staging`), and not inside `run_state`.
  """
  if staging is None:

    def run(ref):
      plgpu.wgmma(ref, a, b)
      issued()

    return pl.run_state(run)(plgpu.ACC.init(acc))
  staging[...] = a

  def run_staged(ref):
    plgpu.wgmma(ref, staging, b)
    issued()
    return ref[...]

  return acc + pl.run_scoped(run_staged, plgpu.ACC(acc.shape, jnp.float32))


def accumulate_beside(acc, a, b, c, d, staging=None, issued=lambda: None):
  """`acc + a b` as in `accumulate`, and `c d^T` as in `product`, in flight together.

  `issued` runs while the tensor cores work on both.
  """

  def run(second):
    plgpu.wgmma(second, c, d.transpose((1, 0)))
    total = accumulate(acc, a, b, staging, issued)
    return total, second[...]

  return pl.run_scoped(run, plgpu.ACC((ROWS, d.shape[0]), jnp.float32))


def staging_types(consumers: int, columns: int, dtype):
  """What `accumulate` needs in the interpreter; nothing on a device."""
  return [tiles_type(consumers, ROWS, columns, dtype=dtype)] if is_interpreted() else []


def columns_iota(columns: int):
  """int32 `[ROWS, columns]`: the column of each element."""
  return plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 1, layout=LAYOUT)


class Ring(NamedTuple):
  """Slots of shared memory that the memory warpgroup fills and the compute warpgroups read, stage after stage.

  Attributes:
    slots: arrays `[stages, step, ...]` that are filled together.
    full: a barrier per slot, on which the copies into it arrive.
    free: likewise, on which compute warpgroups arrive when they have read it.
  """

  slots: tuple
  full: Any
  free: Any

  @classmethod
  def types(cls, walk: Walk, deal: Deal, *slots) -> "Ring":
    """Scratch types; `slots`: those of the arrays."""
    full = plgpu.Barrier(num_arrivals=len(slots) * walk.parts, num_barriers=deal.slots)
    free = plgpu.Barrier(num_arrivals=deal.readers, num_barriers=deal.slots)
    return cls(slots, full, free)

  def wait(self, slot):
    """Until the slot is filled."""
    plgpu.barrier_wait(self.full.at[slot])

  def release(self, slot):
    """This warpgroup has read the slot."""
    plgpu.barrier_arrive(self.free.at[slot])


def set_registers(count: int, action: str):
  """Moves registers between warpgroups; 0 leaves them."""
  if count:
    plgpu.set_max_registers(count, action=action)


def load_own(pairs, barrier, wanted):
  """Copies what a compute warpgroup keeps to shared memory, `(source, target)` each, where it is `wanted`."""

  @pl.when(wanted)
  def _load():
    for source, target in pairs:
      plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def store_own(*pairs):
  """Copies results that were written to shared memory, `(source, target)` each."""
  plgpu.commit_smem()
  for source, target in pairs:
    plgpu.copy_smem_to_gmem(source, target)
  plgpu.wait_smem_to_gmem(0)


def memory_warpgroup(tiles: TileList, rings, deal: Deal, side, registers: int):
  """Fetches stage after stage as the compute warpgroups free the slots.

  Args:
    tiles: the list that it serves.
    rings: `(ring, sources)` each; a source, one per array of the ring, is `rows (a slice) -> the global rows`.
    deal, side: whose slots it fills.
    registers: that it keeps.
  """
  set_registers(registers, "decrease")
  steps, stages = tiles.steps, deal.stages

  def wait(ring, s):
    plgpu.barrier_wait(ring.free.at[deal.slot(side, s)])

  @pl.loop(0, steps)
  def _fetch(s):
    slot, entries = deal.slot(side, s), tiles.entries(s)  # read while the slot is still in use
    for (
      ring,
      sources,
    ) in rings:  # a ring waits for its own readers alone: keys are free half a stage before values
      pl.when(s >= stages)(functools.partial(wait, ring, s))
      for source, target in zip(sources, ring.slots, strict=True):
        tiles.walk.copy(source, target.at[slot], ring.full.at[slot], entries)

  @pl.loop(jnp.maximum(steps - stages, 0), steps)
  def _drain(s):  # whoever waits on a barrier must see all its phases
    for ring, _ in rings:
      wait(ring, s)


def split_scale(scale: float) -> tuple[float, float]:
  """A factor that is applied before keys are hidden, and a positive one, in log2 units, that is applied after."""
  return float(np.sign(scale)), (abs(scale) or 1.0) * LOG2E


def in_log2(bias):
  """A bias of scores in the units of `exp2`; None stays None."""
  return None if bias is None else bias * LOG2E
