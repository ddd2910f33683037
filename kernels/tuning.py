"""How the GPU kernels are cut for a device: `TuningConfig` per device, head dimension, tile sizes and direction.

The committed table `tuning.json` holds what a search on the device found (`python -m benchmarks.tune`) and says where; until
one has run, and for what it lacks, that is `default`, which is reasoned from shared memory and registers, not measured.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import pathlib

DIRECTIONS = ("forward", "dq", "dkv")
TABLE = pathlib.Path(__file__).with_name("tuning.json")
_SHARED_BYTES = 227 * 1024
_BARRIER_BYTES = 512
_ALIGNMENT = 1024  # of every array in shared memory
# A thread block of three warpgroups starts with 168 registers per thread (65,536 of an SM, in steps of 8). That is all it ever
# has: a warpgroup that asked for more than the others gave back would wait for ever.
_POOL = 3 * 168
_override = contextvars.ContextVar("override", default=None)


@dataclasses.dataclass(frozen=True, order=True)
class Key:
  """What a configuration depends on.

  Attributes:
    device: "h100".
    head_dim, block_q, block_kv: of the call.
    direction: "forward", "dq" (backward of the queries) or "dkv" (of keys and values).
  """

  device: str
  head_dim: int
  block_q: int
  block_kv: int
  direction: str

  def __post_init__(self):
    if self.direction not in DIRECTIONS:
      raise ValueError(f"{self.direction=} must be one of {', '.join(DIRECTIONS)}.")

  @property
  def consumers(self) -> int:
    """Compute warpgroups of a thread block: each keeps 64 rows."""
    return (self.block_kv if self.direction == "dkv" else self.block_q) // 64


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """One way to run one direction.

  Attributes:
    stages: depth of the ring buffer that the memory warpgroup fills.
    step: rows of the walked-over side per stage, at most 128: several short tiles share a stage, long tiles are halved.
    compute_registers: per thread of a compute warpgroup; a multiple of 8, or 0 to keep what the compiler gave.
    memory_registers: per thread of the memory warpgroup, likewise.
    take_turns: two compute warpgroups alternate between tensor cores and softmax (forward).
    by_lane: Mosaic lowers the kernel lane by lane instead of by warpgroup: other instructions for the same kernel.
  """

  stages: int = 2
  step: int = 128
  compute_registers: int = 0
  memory_registers: int = 0
  take_turns: bool = True
  by_lane: bool = False

  def __post_init__(self):
    if not 1 <= self.stages <= 8:
      raise ValueError(f"{self.stages=} must lie in 1..8.")
    if self.step not in (64, 128):
      raise ValueError(f"{self.step=} must be 64 or 128 rows.")
    for name in ("compute_registers", "memory_registers"):
      value = getattr(self, name)
      if value and (value % 8 or not 24 <= value <= 240):
        raise ValueError(f"{name}={value} must be 0 or a multiple of 8 in 24..240.")
    if bool(self.compute_registers) != bool(self.memory_registers):
      raise ValueError(f"set both of {self.compute_registers=} and {self.memory_registers=}, or none.")

  def shared_bytes(self, key: Key, itemsize: int = 2) -> int:
    """Shared memory of a thread block: what stays, and the ring."""
    rows, side = key.consumers * 64, key.head_dim * itemsize
    ring = 2 * [self.stages * self.step * side]
    if key.direction == "forward":
      arrays = [rows * side, rows * 4, *ring]  # queries, then the output; LSE
    elif key.direction == "dq":
      arrays = [rows * side, rows * side, rows * 4, rows * 4, *ring]  # queries, dO; LSE and delta
    else:
      arrays = [rows * side, rows * side, *ring, *(2 * [self.stages * self.step * 4])]  # keys, values; LSE and delta walk along
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in arrays) + _BARRIER_BYTES

  def check(self, key: Key) -> "TuningConfig":
    """The configuration, if it fits the key.

    Raises:
      ValueError: if shared memory or registers do not suffice, or a single stage is to be taken in turns.
    """
    if (need := self.shared_bytes(key)) > _SHARED_BYTES:
      raise ValueError(f"{self} needs {need} bytes of shared memory for {key}, a thread block has {_SHARED_BYTES}.")
    if self.stages == 1 and self.take_turns and key.direction == "forward" and key.consumers == 2:
      raise ValueError(f"{self} would never end for {key}: a warpgroup that has the turn waits for keys; set stages >= 2.")
    if self.compute_registers:
      if key.consumers != 2:
        raise ValueError(f"{self} moves registers, but {key} has one compute warpgroup: nothing to gain, set 0 and 0.")
      used = key.consumers * self.compute_registers + self.memory_registers
      if used > _POOL:
        raise ValueError(f"{self} needs {used} registers per lane of three warpgroups, they start with {_POOL}.")
    return self


def default(key: Key) -> TuningConfig:
  """Reasoned, not measured: as deep a ring as fits, 128-row steps, registers moved to the two compute warpgroups."""
  registers = (240, 24) if key.consumers == 2 else (0, 0)
  step = 128 if key.direction == "forward" else 64
  for stages in (4, 3, 2):
    config = TuningConfig(stages, step, *registers)
    if config.shared_bytes(key) <= _SHARED_BYTES:
      return config.check(key)
  return TuningConfig(2, 64, *registers).check(key)


def candidates(key: Key) -> list[TuningConfig]:
  """Every configuration worth trying for a key, the default first."""
  registers = ((240, 24), (232, 40), (0, 0)) if key.consumers == 2 else ((0, 0),)
  turns = (True, False) if key.direction == "forward" and key.consumers == 2 else (True,)
  found = [default(key), dataclasses.replace(default(key), by_lane=True)]
  for stages in (2, 3, 4, 5, 6):
    for step in (64, 128):
      for pair in registers:
        for turn in turns:
          with contextlib.suppress(ValueError):
            found.append(TuningConfig(stages, step, *pair, turn).check(key))
  return list(dict.fromkeys(found))


def lookup(key: Key) -> TuningConfig:
  """The configuration of a key: an override, else the committed table's, else the default."""
  override = _override.get()
  if override and key in override:
    return override[key].check(key)
  return table().get(key) or default(key)


@contextlib.contextmanager
def override(configs: dict[Key, TuningConfig]):
  """Uses these configurations for calls traced inside: for tuning and tests."""
  token = _override.set({**(_override.get() or {}), **configs})
  try:
    yield
  finally:
    _override.reset(token)


@functools.cache
def table() -> dict[Key, TuningConfig]:
  """The committed table.

  Raises:
    ValueError: if a configuration does not fit its key.
  """
  if not TABLE.exists():
    return {}
  rows = json.loads(TABLE.read_text())["configs"]
  return {Key(**row["key"]): TuningConfig(**row["config"]).check(Key(**row["key"])) for row in rows}


def write(configs: dict[Key, TuningConfig], facts: dict, path: pathlib.Path = TABLE) -> None:
  """Writes the table: what was found, and `facts` on where (device, versions, command)."""
  rows = [{"key": vars(key), "config": vars(configs[key])} for key in sorted(configs)]
  path.write_text(json.dumps({"facts": facts, "configs": rows}, indent=1) + "\n")
  table.cache_clear()
