"""A GPU kernel's cut per device, head dimension, tile sizes and direction: `TuningConfig`.

A table `tuning.json` holds what a search on the device found (`python -m benchmarks.gpu.tune`) and
says where. For what it lacks `default` is used, reasoned from shared memory and registers.
"""

import dataclasses
import functools
import itertools
import pathlib

from freqformer.kernels.block_sparse import tuning_table
from freqformer.kernels.block_sparse.tuning_table import Key, Override
from freqformer.kernels.hopper.machine import SHARED_BYTES

TABLE = pathlib.Path(__file__).with_name("tuning.json")
_BARRIER_BYTES = 512
_ALIGNMENT = 1024  # of every array in shared memory
# Two thread blocks share a multiprocessor if each asks for at most half of its 228 KB, of which a
# block costs 1 KB that it does not see.
_HALF_SHARED_BYTES = 113 * 1024
_REGISTERS = 64 * 1024  # of a multiprocessor, given out to threads in steps of 8
override = Override("override")


def _readers(key: Key) -> int:
  """Returns the compute warpgroups of a tile: each keeps 64 rows."""
  return key.own // 64


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """One way to run one direction.

  Attributes:
    stages: depth of the ring buffer that the memory warpgroup fills.
    step: rows of the walked-over side per stage, at most 128: several short tiles share a stage,
      long tiles are halved.
    compute_registers, memory_registers: per thread of a compute and of the memory warpgroup; a
      multiple of 8, or 0 to keep what the compiler gave.
    take_turns: two compute warpgroups alternate between tensor cores and softmax (forward).
    by_lane: Mosaic lowers lane by lane instead of by warpgroup: other instructions, same kernel.
    scores_ahead: the scores of the next stage are issued beside the values of this one (forward).
    tiles_per_block: 2 gives each of two neighbouring 64-row tiles a compute and a memory
      warpgroup, a list and a ring of its own.
  """

  stages: int = 2
  step: int = 128
  compute_registers: int = 0
  memory_registers: int = 0
  take_turns: bool = True
  by_lane: bool = False
  scores_ahead: bool = True
  tiles_per_block: int = 1

  def __post_init__(self):
    if not 1 <= self.stages <= 8:
      raise ValueError(f"{self.stages=} must lie in 1..8.")
    if self.tiles_per_block not in (1, 2):
      raise ValueError(f"{self.tiles_per_block=} must be 1 or 2.")
    if self.step not in (64, 128):
      raise ValueError(f"{self.step=} must be 64 or 128 rows.")
    for name in ("compute_registers", "memory_registers"):
      value = getattr(self, name)
      if value and (value % 8 or not 24 <= value <= 240):
        raise ValueError(f"{name}={value} must be 0 or a multiple of 8 in 24..240.")
    if bool(self.compute_registers) != bool(self.memory_registers):
      raise ValueError(
        f"set both of {self.compute_registers=} and {self.memory_registers=}, or none."
      )

  def consumers(self, key: Key) -> int:
    """Returns the compute warpgroups of a thread block."""
    return self.tiles_per_block * _readers(key)

  def shared_bytes(self, key: Key, itemsize: int = 2) -> int:
    """Returns the bytes of shared memory of a thread block: what stays, and the rings."""
    rows = self.consumers(key) * 64
    side = key.head_dim * itemsize
    slots = self.tiles_per_block * self.stages
    ring = 2 * [slots * self.step * side]
    if key.direction == "forward":
      arrays = [rows * side, rows * 4, *ring]  # queries, then the output; LSE
    elif key.direction == "dq":
      arrays = [rows * side, rows * side, rows * 4, rows * 4, *ring]  # queries, dO; LSE and delta
    else:
      numbers = 2 * [slots * self.step * 4]  # LSE and delta walk along
      arrays = [rows * side, rows * side, *ring, *numbers]  # keys, values
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in arrays) + _BARRIER_BYTES

  def check(self, key: Key) -> "TuningConfig":
    """Returns the configuration, if it fits the key.

    Raises:
      ValueError: if shared memory or registers do not suffice, if a single stage is to be taken in
        turns, or if two query tiles are asked for where a block cannot take them.
    """
    if (need := self.shared_bytes(key)) > SHARED_BYTES:
      raise ValueError(
        f"{self} needs {need} bytes of shared memory for {key}, a thread block has {SHARED_BYTES}."
      )
    if self.tiles_per_block == 2 and _readers(key) != 1:
      rows = 64 * _readers(key)
      raise ValueError(f"{self} needs tiles of 64 rows, {key} has {rows}; set tiles_per_block=1.")
    consumers = self.consumers(key)
    if self.stages == 1 and key.direction == "forward":
      if self.take_turns and consumers == 2:
        why = "a warpgroup that has the turn waits for keys"
        raise ValueError(f"{self} would never end for {key}: {why}; set stages >= 2.")
      if self.scores_ahead:
        why = "the next keys wait for these values"
        raise ValueError(f"{self} would never end for {key}: {why}; set stages >= 2.")
    if self.compute_registers:
      if consumers != 2:
        raise ValueError(
          f"{self} moves registers, but {key} has one compute warpgroup: nothing to gain, set 0 "
          "and 0."
        )
      # What a block starts with is all it ever has: a warpgroup that asked for more than the
      # others gave back would wait for ever.
      warpgroups = consumers + self.tiles_per_block
      pool = warpgroups * (_REGISTERS // (128 * warpgroups) // 8 * 8)
      used = consumers * self.compute_registers + self.tiles_per_block * self.memory_registers
      if used > pool:
        raise ValueError(
          f"{self} needs {used} registers per lane of {warpgroups} warpgroups, they start with "
          f"{pool}."
        )
    return self


# Two tiles in a block: four warpgroups, each pair with all the registers that two may have.
PAIR = TuningConfig(step=64, compute_registers=232, memory_registers=24, tiles_per_block=2)


def default(key: Key) -> TuningConfig:
  """Returns a configuration that is reasoned, not measured, with as deep a ring as fits.

  A second warpgroup always has work for the tensor cores: one alone leaves them idle during its
  softmax. A 128-row tile has two. Beside a 64-row tile it is another thread block where two fit
  (at most 128 registers and half of the shared memory), else a second tile in the same block.
  """
  forward = key.direction == "forward"
  if _readers(key) == 2:
    step = 128 if forward else 64
    pair = TuningConfig(step=step, compute_registers=240, memory_registers=24)
    return _deepest(key, pair)
  if key.head_dim <= (64 if forward else 32):
    return _deepest(key, TuningConfig(step=64), _HALF_SHARED_BYTES)
  if key.direction == "dkv" and key.head_dim == 128 and key.block_q == 128:
    return _deepest(key, TuningConfig(step=64))  # two tiles spill 60 bytes
  return _deepest(key, PAIR)


def _deepest(key: Key, config: TuningConfig, limit: int = SHARED_BYTES) -> TuningConfig:
  """Returns `config` with as many of 2 to 4 stages as fit into `limit` bytes, 2 if none does."""
  for stages in (4, 3, 2):
    found = dataclasses.replace(config, stages=stages)
    if found.shared_bytes(key) <= limit:
      break
  return found.check(key)


def candidates(key: Key) -> list[TuningConfig]:
  """Returns the configurations worth trying for a key, the default first.

  Then come the default with one other setting changed, and all combinations of ring depths, steps
  and tiles per block, each with its usual registers.
  """
  first = default(key)
  forms = [TuningConfig()]
  if _readers(key) == 2:
    forms = [TuningConfig(compute_registers=240, memory_registers=24)]
  else:
    forms.append(PAIR)
  changes = [{"by_lane": True}, {"compute_registers": 0, "memory_registers": 0}]
  if _readers(key) == 2:
    changes.append({"compute_registers": 232, "memory_registers": 40})
  if key.direction == "forward":
    stage_by_stage, together = {"scores_ahead": False}, {"take_turns": False}
    changes += [stage_by_stage, together, stage_by_stage | together]
  found = [first]
  for change in changes:
    found.append(dataclasses.replace(first, **change))
  for form, stages, step in itertools.product(forms, (2, 3, 4, 6), (64, 128)):
    found.append(dataclasses.replace(form, stages=stages, step=step))
  return [config for config in dict.fromkeys(found) if _fits(config, key)]


def _fits(config: TuningConfig, key: Key) -> bool:
  try:
    config.check(key)
  except ValueError:
    return False
  return True


def lookup(key: Key) -> TuningConfig:
  """Returns a key's configuration: an override, else the committed table's, else the default."""
  return override.get(key) or table().get(key) or default(key)


@functools.cache
def table() -> dict[Key, TuningConfig]:
  """Returns the table that a search wrote; empty where none has run.

  Raises:
    ValueError: if a configuration does not fit its key.
  """
  return tuning_table.read(TABLE, TuningConfig)


def write(configs: dict[Key, TuningConfig], facts: dict, path: pathlib.Path = TABLE) -> None:
  """Writes the table: what was found, and `facts` on where (device, versions, command)."""
  tuning_table.write(configs, facts, path)
  table.cache_clear()
