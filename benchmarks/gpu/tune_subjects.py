"""Subjects of a search over configurations: an implementation, its keys and its devices."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from types import ModuleType

from freqformer.kernels.block_sparse import triton_tuning, tuning
from freqformer.kernels.block_sparse.tuning_table import DIRECTIONS, Key
from freqformer.kernels.core.target import current_target
from freqformer.kernels.hopper.machine import SHARED_BYTES
from freqformer.kernels.triton import machine

HEAD_DIMS = (128, 64)
BLOCKS = (128, 64)


@dataclasses.dataclass(frozen=True)
class Subject:
  """An implementation of attention whose kernels have configurations.

  Attributes:
    implementation: its name.
    tuning: module of its configurations, with `candidates`, `default`, `override` and `write`.
    config: dataclass of its configurations.
    targets: a name of tools/targets by the device of a key.
    shared_bytes: most shared memory of a thread block by the device of a key.
  """

  implementation: str
  tuning: ModuleType
  config: type
  targets: Mapping[str, str]
  shared_bytes: Mapping[str, int]

  def device(self, target: str = "") -> str:
    """Returns the device of keys for a name of tools/targets; "": that of this machine.

    Raises:
      ValueError: there are no configurations for it.
    """
    if not target and len(self.targets) == 1:
      return next(iter(self.targets))
    known = {name: device for device, name in self.targets.items()}
    if not target:
      device = machine.device_class(current_target().capability or "")
    else:
      device = known.get(target)
    if device is None:
      raise ValueError(
        f"--target={target!r} is no device of {self.implementation}; name one of "
        f"{', '.join(known)}."
      )
    return device

  def table_path(self, device: str) -> pathlib.Path:
    """Returns the file in which kernels look configurations of a device up."""
    return tuning.TABLE if self.tuning is tuning else triton_tuning.table_path(device)

  def table(self, device: str) -> dict:
    """Returns the configurations in that file."""
    return tuning.table() if self.tuning is tuning else triton_tuning.table(device)

  def all_keys(self, device: str) -> list:
    """Returns every key that kernels look up on a device, the most used first."""
    sizes = itertools.product(HEAD_DIMS, BLOCKS, BLOCKS, DIRECTIONS)
    return [Key(device, *size) for size in sizes]

  def parse_key(self, text: str, device: str):
    """Returns the key that e.g. `128:128:64:dq` names; a ValueError says the form."""
    try:
      d, q, kv, direction = text.split(":")
      return Key(device, int(d), int(q), int(kv), direction)
    except ValueError as error:
      raise ValueError(
        f"--keys={text!r} must be head_dim:block_q:block_kv:direction, e.g. 128:128:128:forward."
      ) from error


# Other Hopper cards share an H100's resources.
SUBJECTS = {
  "hopper": Subject(
    "hopper", tuning, tuning.TuningConfig, {"h100": "h100"}, {"h100": SHARED_BYTES}
  ),
  "triton": Subject(
    "triton",
    triton_tuning,
    triton_tuning.TritonConfig,
    {"sm80": "a100", "sm89": "rtx4090", "sm90": "h100", "sm100": "b200", "sm120": "rtx5090"},
    machine.SHARED_BYTES,
  ),
}
