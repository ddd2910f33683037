"""Rows of a GPU run: written one by one, skipped when already there for this device and this code.

jax is imported where a device is asked for, because the parent of a slot (gpu_slot.py) uses this module without it.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import time

from benchmarks import rows
from benchmarks.gpu import facts as gpu_facts

ROOT = pathlib.Path(__file__).parents[2]
# What a figure depends on; a change to anything else leaves rows valid. The slot's own files only say what runs when, and a
# plan that is changed between two calls must not make the rows of the first one void.
_CODE = (
  "kernels/**/*.py",
  "kernels/**/*.json",
  "benchmarks/gpu/*.py",
  "freqformer/grid/layout.py",
  "freqformer/tables/*.py",
)
_NOT_CODE = ("benchmarks/gpu/slot*.py", "benchmarks/gpu/facts.py", "benchmarks/gpu/guards.py")


def code_digest() -> str:
  """Short hash of the code that figures depend on: tells runs apart where there is no git, too."""
  return _digest(_CODE)


def kernels_digest() -> str:
  """Short hash of the attention kernels' source, without the table of configurations: what a compiled candidate depends on."""
  return _digest(
    (
      "kernels/block_sparse/hopper*.py",
      "kernels/hopper/*.py",
      "kernels/core/lists.py",
      "kernels/block_sparse/tuning.py",
    )
  )


def _digest(patterns: tuple[str, ...]) -> str:
  found = hashlib.sha256()
  left_out = {path for pattern in _NOT_CODE for path in ROOT.glob(pattern)}
  for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)} - left_out):
    found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
  return found.hexdigest()[:12]


@dataclasses.dataclass
class Store:
  """The rows of one results file.

  Attributes:
    path: of the JSON file; a file per device, so that two devices never mix.
    context: fields that every new row gets.
    rehearsal: mark rows as no measurement.
  """

  path: pathlib.Path
  context: dict
  rehearsal: bool = False

  @classmethod
  def open(cls, folder: pathlib.Path, name: str, command: str, rehearsal: bool = False) -> "Store":
    import jax

    context = rows.context(command) | {
      "code": code_digest(),
      "platform": jax.devices()[0].platform,
      **versions(),
      **gpu_facts.toolchain(),
    }
    return cls(pathlib.Path(folder) / f"{name}.json", context, rehearsal)

  def all(self) -> list[dict]:
    """Every row of this device and code; rows of others stay in the file and are not mixed in."""
    return [row for row in rows.read_rows(self.path) if self._ours(row)]

  def get(self, name: str) -> dict | None:
    """The row of that name, if it was measured on this device with this code and did not fail."""
    return next((row for row in self.all() if row["name"] == name and "error" not in row), None)

  def add(self, row: dict) -> dict:
    """Writes a row at once, with where and with what it was measured."""
    if hidden := row.keys() & self.context.keys():
      raise ValueError(
        f"row {row.get('name')!r} has fields that say where it was measured, {sorted(hidden)}; name them otherwise."
      )
    row = row | self.context | ({"rehearsal": True} if self.rehearsal else {})
    rows.merge_rows(self.path, [row])
    return row

  def _ours(self, row):
    return row.get("device") == self.context["device"] and row.get("code") == self.context["code"]


@dataclasses.dataclass(frozen=True)
class Deadline:
  """When to stop."""

  seconds: float
  start: float = dataclasses.field(default_factory=time.monotonic)

  @property
  def left(self) -> float:
    """Seconds."""
    return self.seconds - (time.monotonic() - self.start)


def open_device(rehearse: bool) -> str:
  """Chooses the GPU (the CPU for a rehearsal), leaving memory for child processes; call it before anything runs.

  Returns:
    the device's kind.

  Raises:
    RuntimeError: if there is no GPU, with what to do.
  """
  import jax

  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  jax.config.update("jax_platforms", "cpu" if rehearse else "cuda")
  try:
    return jax.devices()[0].device_kind
  except (
    RuntimeError,
    AssertionError,
  ) as error:  # which of them depends on what exactly is missing
    raise RuntimeError(
      "no CUDA GPU that jax can use here (it needs jax[cuda13] and a driver); --rehearse --out=FOLDER runs the whole program "
      f"on tiny shapes on a CPU. jax says: {str(error)[:300]}"
    ) from error


def versions() -> dict[str, str]:
  """Versions that a kernel's speed depends on, as far as they can be asked."""
  found = {}
  for package in ("jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13"):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "absent"
  return found
