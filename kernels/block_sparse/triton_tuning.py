"""The cut of a Triton kernel of attention by GPU, head dimension, tiles and direction.

Tables `triton_tuning_<class>.json` hold what a search on a device of a class found (`python -m
benchmarks.gpu.tune --implementation=triton`). For what they lack `default` is used, reasoned and
compiled without spills (tests/compiled/test_triton.py).
"""

import dataclasses
import functools
import itertools
import pathlib

from freqformer.kernels.block_sparse import tuning_table
from freqformer.kernels.block_sparse.tuning_table import Key, Override
from freqformer.kernels.triton.machine import SHARED_BYTES

FOLDER = pathlib.Path(__file__).parent  # of the tables
_LEAST = 16  # rows of a product on tensor cores
_WIDE = 256  # channels of a head from which on two warps share 16 rows
override = Override("override_triton")


@dataclasses.dataclass(frozen=True)
class TritonConfig:
  """One way to run one direction.

  Attributes:
    rows: that a program keeps; divides its tile.
    step: rows of the other side that it takes at a time; divides their tile.
    warps: of a program; each has at least 16 rows, or 8 at a head dimension of 256.
    stages: of the loads that run ahead; on Ampere 2 have one buffer, 3 have two.
    halves: 2 keeps rows as two arrays of half of the columns. Where products are `mma.sync`, warps
      would lie along the columns of a wide accumulator, and probabilities cross shared memory.
  """

  rows: int
  step: int
  warps: int
  stages: int
  halves: int = 1

  def shared_bytes(self, key: Key, itemsize: int = 2) -> int:
    """Returns what is kept and the buffers of loads take; other layouts may take more.

    What a compiled kernel asks for is in the golden table, and what a search reads.
    """
    row = key.head_dim * itemsize
    kept = self.rows * row * (1 if key.direction == "forward" else 2)
    buffers = max(self.stages - 1, 1)
    numbers = 2 * 4 * self.step * buffers if key.direction == "dkv" else 0
    return kept + 2 * buffers * self.step * row + numbers

  def check(self, key: Key) -> "TritonConfig":
    """Returns the configuration, if it fits the key.

    Raises:
      ValueError: says what does not.
    """
    if self.rows < _LEAST or key.own % self.rows or self.step < _LEAST or key.walked % self.step:
      raise ValueError(
        f"{self}: rows and step must be at least {_LEAST} and divide the tiles of {key}."
      )
    if self.warps not in (1, 2, 4, 8) or self.warps > most_warps(self.rows, key.head_dim):
      raise ValueError(f"{self}: warps must be 1, 2, 4 or 8, of enough rows each for {key}.")
    if not 1 <= self.stages <= 5:
      raise ValueError(f"{self}: stages must lie in 1..5.")
    if self.halves not in (1, 2) or key.head_dim // self.halves < _LEAST:
      raise ValueError(f"{self}: halves must be 1 or 2, of at least {_LEAST} columns.")
    if (need := self.shared_bytes(key)) > SHARED_BYTES[key.device]:
      raise ValueError(
        f"{self} needs {need} bytes of shared memory for {key}, a thread block has "
        f"{SHARED_BYTES[key.device]}."
      )
    return self


def most_warps(rows: int, head_dim: int) -> int:
  """Returns how many warps may share rows."""
  return max(1, rows // (_LEAST if head_dim < _WIDE else _LEAST // 2))


# By class and direction, for tiles of 128 rows and of fewer, at d = 128.
_LARGE = {
  "sm80": {"forward": (128, 32, 4, 3, 2), "dq": (128, 64, 8, 3), "dkv": (128, 64, 8, 3)},
  "sm89": {"forward": (128, 64, 8, 3), "dq": (128, 32, 8, 3), "dkv": (128, 32, 8, 3)},
  "sm90": {"forward": (128, 128, 8, 2), "dq": (128, 64, 8, 3), "dkv": (128, 64, 8, 2)},
  "sm100": {"forward": (128, 64, 8, 3), "dq": (128, 64, 8, 2), "dkv": (128, 32, 8, 2)},
  "sm120": {"forward": (128, 64, 8, 3), "dq": (128, 32, 8, 3), "dkv": (128, 32, 8, 2)},
}
_SMALL = {
  "sm80": {"forward": (64, 64, 4, 2, 2), "dq": (64, 32, 4, 3), "dkv": (64, 32, 4, 3)},
  "sm89": {"forward": (64, 64, 4, 2, 2), "dq": (64, 32, 4, 3), "dkv": (64, 32, 4, 3)},
  "sm90": {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 3), "dkv": (64, 32, 4, 3)},
  "sm100": {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 2), "dkv": (64, 64, 4, 2)},
  "sm120": {"forward": (64, 64, 4, 2, 2), "dq": (64, 32, 4, 3), "dkv": (64, 32, 4, 3)},
}


# At d = 256, on all classes.
_WIDEST = {"forward": (64, 32, 8, 2), "dq": (64, 16, 8, 2), "dkv": (64, 16, 8, 2)}


def default(key: Key) -> TritonConfig:
  """Returns a configuration that is reasoned, not measured."""
  table = (_LARGE if key.own >= 128 else _SMALL)[key.device]
  if key.head_dim >= _WIDE:
    table = _WIDEST
  config = TritonConfig(*table[key.direction])
  rows = min(config.rows, key.own)
  step = min(config.step, key.walked)
  if key.direction == "dkv" and rows <= (32 if key.head_dim == 128 else _LEAST):
    step = _LEAST  # 32 spill some bytes
  return dataclasses.replace(
    config,
    rows=rows,
    step=step,
    warps=min(config.warps, most_warps(rows, key.head_dim)),
    halves=config.halves if key.head_dim == 128 else 1,
  ).check(key)


def candidates(key: Key) -> list[TritonConfig]:
  """Returns the configurations worth trying for a key, the default first."""
  found = [default(key)]
  for rows, step, warps, stages, halves in itertools.product(
    (32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4), (1, 2)
  ):
    config = TritonConfig(rows, step, warps, stages, halves)
    try:
      found.append(config.check(key))
    except ValueError:
      continue
  return list(dict.fromkeys(found))


def lookup(key: Key) -> TritonConfig:
  """Returns a key's configuration: an override, else the committed table's, else the default."""
  return override.get(key) or table(key.device).get(key) or default(key)


def table_path(device: str) -> pathlib.Path:
  """Returns the file of the table of a class."""
  return FOLDER / f"triton_tuning_{device}.json"


@functools.cache
def table(device: str) -> dict[Key, TritonConfig]:
  """Returns what a search found for a class; empty where none has run.

  Raises:
    ValueError: if a configuration does not fit its key.
  """
  return tuning_table.read(table_path(device), TritonConfig)


def write(configs: dict[Key, TritonConfig], facts: dict, path: pathlib.Path) -> None:
  """Writes the table of a class, with facts about the search that made it."""
  tuning_table.write(configs, facts, path)
  table.cache_clear()
