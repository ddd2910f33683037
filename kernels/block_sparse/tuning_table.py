"""Configurations of attention kernels by key: files that a search writes, and overrides of them."""

import contextlib
import contextvars
import dataclasses
import json
import pathlib

DIRECTIONS = ("forward", "dq", "dkv")


@dataclasses.dataclass(frozen=True, order=True)
class Key:
  """The facts that a configuration depends on.

  Attributes:
    device: "h100" for Hopper's kernels, a class of GPUs for Triton's.
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
  def own(self) -> int:
    """Rows of a tile on the side that a thread block keeps."""
    return self.block_kv if self.direction == "dkv" else self.block_q

  @property
  def walked(self) -> int:
    """Rows of a tile on the side that it walks over."""
    return self.block_q if self.direction == "dkv" else self.block_kv


class Override:
  """Configurations in the place of those that are looked up, while `override(configs)` lasts."""

  def __init__(self, name: str):
    self._configs = contextvars.ContextVar(name, default=None)

  @contextlib.contextmanager
  def __call__(self, configs: dict):
    """Uses these configurations for calls traced inside: for tuning and tests."""
    token = self._configs.set({**(self._configs.get() or {}), **configs})
    try:
      yield
    finally:
      self._configs.reset(token)

  def get(self, key: Key):
    """Returns the key's, or None; raises ValueError if it does not fit."""
    found = (self._configs.get() or {}).get(key)
    return None if found is None else found.check(key)


def read(path: pathlib.Path, config: type) -> dict:
  """Returns the configurations of a file by key; none where there is no file.

  Args:
    path: of the file.
    config: dataclass of the configurations; `check(key)` returns one that fits.

  Raises:
    ValueError: if a configuration does not fit its key.
  """
  if not path.exists():
    return {}
  rows = json.loads(path.read_text())["configs"]
  return {Key(**row["key"]): config(**row["config"]).check(Key(**row["key"])) for row in rows}


def write(configs: dict, facts: dict, path: pathlib.Path) -> None:
  """Writes what was found, and `facts` on where (device, versions, command)."""
  rows = [{"key": vars(key), "config": vars(configs[key])} for key in sorted(configs)]
  path.write_text(json.dumps({"facts": facts, "configs": rows}, indent=1) + "\n")
