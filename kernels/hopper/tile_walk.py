"""Lists of tiles: cut into stages, and dealt to thread blocks and the warpgroups inside them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from freqformer.kernels.core.log2 import HIDDEN
from freqformer.kernels.hopper.machine import ROWS
from freqformer.kernels.hopper.products import LAYOUT, columns_iota
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# ---- stages --------------------------------------------------------------------------------------


class Part(NamedTuple):
  """The rows of one listed tile in a stage; scalars int32.

  Attributes:
    tile: number of the tile.
    first: row of the tile at which the part begins.
    length: valid rows of the part; 0 after the end of the list.
  """

  tile: Any
  first: Any
  length: Any


@dataclasses.dataclass(frozen=True)
class TileWalk:
  """A list of `block`-row tiles in `step`-row stages: short tiles share one, long are split."""

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
    """Returns the stages of a list of `count` tiles."""
    return lax.div(count + _i32(self.parts - 1), _i32(self.parts)) * self.splits

  def entries(self, s, count, entry: Callable) -> list[Part]:
    """Returns the parts of stage `s`; `entry` is `i -> (tile, valid rows)`, `count` of them."""
    if self.splits > 1:
      tile, length = entry(lax.div(s, _i32(self.splits)))
      first = lax.rem(s, _i32(self.splits)) * self.step
      return [Part(tile, first, lax.clamp(_i32(0), length - first, _i32(self.step)))]
    found = []
    for part in range(self.parts):
      i = s * self.parts + part
      tile, length = entry(i if part == 0 else jnp.minimum(i, count - 1))
      length = length if part == 0 else jnp.where(i < count, length, 0)
      found.append(Part(tile, _i32(0), length))
    return found

  def copy(self, source: Callable, target, full, entries: list[Part]):
    """Starts the copies of one stage.

    Args:
      source: rows (a slice) -> the global rows.
      target: slot of the ring.
      full: barrier on which each copy arrives.
    """
    for i, part in enumerate(entries):
      rows = pl.ds(part.tile * self.block + part.first, self.rows)
      plgpu.copy_gmem_to_smem(source(rows), target.at[pl.ds(i * self.rows, self.rows)], full)

  def hide(self, x, entries: list[Part]):
    """Returns `[ROWS, step]` with `HIDDEN` in columns that are not valid; most stages have none."""
    full = [part.length == self.rows for part in entries]
    return lax.cond(
      functools.reduce(jnp.logical_and, full), lambda x: x, lambda x: self._hidden(x, entries), x
    )

  def _hidden(self, x, entries):
    column = columns_iota(self.step)
    seen = column < entries[0].length
    if self.parts == 2:
      seen = jnp.where(column < self.rows, seen, column < self.rows + entries[1].length)
    return jnp.where(seen, x, HIDDEN)

  def spread(self, numbers: list):
    """Returns float32 `[ROWS, step]` from one number per part."""

    def full(number):
      return plgpu.layout_cast(jnp.full((ROWS, self.step), number, jnp.float32), LAYOUT)

    if self.parts == 1:
      return full(numbers[0])
    return jnp.where(columns_iota(self.step) < self.rows, full(numbers[0]), full(numbers[1]))


class TileList:
  """The tiles that one side of a thread block walks over.

  Attributes:
    walk: how they are cut into stages.
    count, steps: number of tiles and of stages.
    entry: `i -> (tile, valid rows)`.
  """

  def __init__(self, walk: TileWalk, count, entry: Callable):
    self.walk = walk
    self.count = count
    self.entry = entry
    self.steps = walk.steps(count)  # here, before warpgroups part, not anew in each

  def entries(self, s) -> list[Part]:
    """Returns the parts of stage `s`, read from global memory."""
    return self.walk.entries(s, self.count, self.entry)


# ---- thread blocks -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Deal:
  """A deal of a head's tiles to thread blocks and to the warpgroups inside them.

  A block has one side, or two with a tile, a list, rings and a memory warpgroup each. Compute
  warpgroups come first, memory warpgroups after them.

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
    """Returns the side that a warpgroup works for."""
    return lax.rem(warpgroup, _i32(2)) if self.sides == 2 else _i32(0)

  def tile(self, place, side):
    """Returns a side's tile; the last block of an odd number has its tile twice, stored twice."""
    return jnp.minimum(place * 2 + side, _i32(self.tiles - 1)) if self.sides == 2 else place

  def part(self, warpgroup):
    """Returns which 64 rows of its tile a compute warpgroup keeps."""
    return warpgroup if self.sides == 1 else _i32(0)

  def slot(self, side, s):
    """Returns the slot of a side's stage `s`."""
    return side * self.stages + lax.rem(s, _i32(self.stages))

  def following(self, side, slot):
    """Returns the slot after `slot`, without a division."""
    first = side * self.stages
    return jnp.where(slot == first + (self.stages - 1), first, slot + 1)


def place_of(number, places: int, h: int, order=None):
  """Returns sample, head and place within the head of one of `b * h * places` thread blocks.

  Places of a head run together, so that they meet the same keys in the L2.

  Args:
    places: thread blocks of a head.
    order: int32 `[b * h]`, (sample, head) pairs as they start (`lists.costliest_first`); None for
      pairs as they are numbered.
  """
  place = lax.rem(number, _i32(places))
  pair = lax.div(number, _i32(places))
  if order is not None:
    pair = order[pair]
  return lax.div(pair, _i32(h)), lax.rem(pair, _i32(h)), place


def broadcast_index(ref, *index) -> tuple:
  """Returns the index into leading axes of an array that may be broadcast along any (size 1)."""
  return tuple(_i32(0) if size == 1 else i for size, i in zip(ref.shape, index, strict=False))


def _i32(x):
  return jnp.asarray(x, jnp.int32)
