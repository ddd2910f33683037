"""Copies between global and shared memory: rings of stages, and rows that a warpgroup keeps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from freqformer.kernels.hopper.launch import set_registers
from freqformer.kernels.hopper.tile_walk import Deal, TileList, TileWalk
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Ring(NamedTuple):
  """Slots of shared memory that a memory warpgroup fills and compute warpgroups read, in turn.

  Attributes:
    slots: arrays `[slots, step, ...]` that are filled together.
    full: a barrier per slot, on which the copies into it arrive.
    free: a barrier per slot, on which compute warpgroups arrive when they have read it.
  """

  slots: tuple
  full: Any
  free: Any

  @classmethod
  def types(cls, walk: TileWalk, deal: Deal, *slots) -> "Ring":
    """Returns scratch types of a ring, given those of its arrays."""
    full = plgpu.Barrier(num_arrivals=len(slots) * walk.parts, num_barriers=deal.slots)
    free = plgpu.Barrier(num_arrivals=deal.readers, num_barriers=deal.slots)
    return cls(slots, full, free)

  def wait(self, slot):
    """Waits until the slot is filled."""
    plgpu.barrier_wait(self.full.at[slot])

  def release(self, slot):
    """Reports that this warpgroup has read the slot."""
    plgpu.barrier_arrive(self.free.at[slot])


class Feed(NamedTuple):
  """A ring and where its stages come from: per array, `rows (a slice) -> the global rows`."""

  ring: Ring
  sources: Sequence[Callable]


def head_rows(ref, sample, head) -> Callable:
  """Returns a source of `Feed`: rows of one head of `[b, n, h, d]`."""
  return lambda rows: ref.at[sample, rows, head]


def head_numbers(ref, sample, head) -> Callable:
  """Returns a source of `Feed`: numbers per row of one head of `[b, h, n]`."""
  return lambda rows: ref.at[sample, head, rows]


def fill_rings(tiles: TileList, feeds: Sequence[Feed], deal: Deal, side, registers: int):
  """Does the work of a memory warpgroup: fetches each stage as soon as its slots are free.

  Args:
    feeds: rings that are filled stage by stage.
    side: of the thread block, whose slots are filled.
    registers: per thread that the warpgroup keeps; 0 keeps all.
  """
  set_registers(registers, "decrease")
  steps = tiles.steps
  stages = deal.stages

  def wait(ring, s):
    plgpu.barrier_wait(ring.free.at[deal.slot(side, s)])

  @pl.loop(0, steps)
  def _fetch(s):
    slot = deal.slot(side, s)
    entries = tiles.entries(s)  # read while the slot is still in use
    # A ring waits for its own readers alone: keys are free half a stage before values.
    for feed in feeds:
      ring = feed.ring
      pl.when(s >= stages)(functools.partial(wait, ring, s))
      for source, target in zip(feed.sources, ring.slots, strict=True):
        tiles.walk.copy(source, target.at[slot], ring.full.at[slot], entries)

  # A warpgroup that waits on a barrier must see all its phases.
  @pl.loop(jnp.maximum(steps - stages, 0), steps)
  def _drain(s):
    for feed in feeds:
      wait(feed.ring, s)


def load_own(pairs, barrier, wanted):
  """Copies the `(source, target)` rows a compute warpgroup keeps, and waits; only if `wanted`."""

  @pl.when(wanted)
  def _load():
    for source, target in pairs:
      plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def store_own(*pairs):
  """Copies results from shared to global memory, `(source, target)` each."""
  plgpu.commit_smem()
  for source, target in pairs:
    plgpu.copy_smem_to_gmem(source, target)
  plgpu.wait_smem_to_gmem(0)
