"""Refusal of weights that a device has no memory for, before any of them is loaded."""

import pathlib

import jax

from freqformer.config import ConfigError
from freqformer.simulation.descriptions import known, load_gpu

_HOST = pathlib.Path("/proc/meminfo")
_CPU = "cpu"  # among the simulator's devices


def free_bytes() -> int | None:
  """Returns what the first device can still take, of a CPU the host; None where nobody tells."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  if device.platform != _CPU or not _HOST.exists():
    return None
  lines = dict(line.split(":", 1) for line in _HOST.read_text().splitlines())
  return 1024 * int(lines["MemAvailable"].split()[0]) if "MemAvailable" in lines else None


def fits(needed: int) -> bool:
  """Tells whether the device has so many bytes left, or does not tell."""
  free = free_bytes()
  return free is None or needed <= free


def check_weights_fit(what: str, needed: int, instead: str) -> None:
  """Refuses weights that a device has no room for.

  Args:
    what: the weights belong to.
    needed: bytes.
    instead: what would fit, beside a larger device.

  Raises:
    ConfigError: says by how much they are too large, and what would fit.
  """
  if fits(needed):
    return
  free = free_bytes()
  gpus = [load_gpu(name) for name in known("gpus") if name != _CPU]
  larger = sorted((g.memory_bytes, g.name) for g in gpus if g.memory_bytes > needed)
  options = [instead, *(f"a GPU like {name} ({size / 1e9:.0f} GB)" for size, name in larger[:1])]
  raise ConfigError(
    f"{what} takes {needed / 1e9:,.2f} GB, and {jax.local_devices()[0].device_kind} has "
    f"{free / 1e9:,.2f} GB free: {(needed - free) / 1e9:,.2f} GB too much. What fits: "
    f"{' or '.join(options)}."
  )
