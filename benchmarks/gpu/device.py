"""The GPU that is measured, the file that holds its rows, and the time that is left."""

import argparse
import dataclasses
import os
import pathlib
import time

import jax

from benchmarks import rows
from benchmarks.gpu import facts
from benchmarks.gpu.code import code_digest

# A kernel's speed depends on their versions.
_PACKAGES = ("jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13")


@dataclasses.dataclass(frozen=True)
class Deadline:
  """A point in time, `seconds` after `start` on the monotonic clock."""

  seconds: float
  start: float = dataclasses.field(default_factory=time.monotonic)

  @property
  def left(self) -> float:
    """Seconds."""
    return self.seconds - (time.monotonic() - self.start)


def open_device(rehearse: bool) -> str:
  """Chooses the GPU, or the CPU for a rehearsal, before anything runs; returns the device's kind.

  It leaves memory for child processes.

  Raises:
    RuntimeError: if there is no GPU; the message says what to do.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  jax.config.update("jax_platforms", "cpu" if rehearse else "cuda")
  try:
    return jax.devices()[0].device_kind
  except (RuntimeError, AssertionError) as error:  # depends on what exactly is missing
    raise RuntimeError(
      "no CUDA GPU that jax can use here (it needs jax[cuda13] and a driver); "
      "--rehearse --out=FOLDER runs the whole program on tiny shapes on a CPU. "
      f"jax says: {str(error)[:300]}"
    ) from error


def command_line(description: str, minutes: float) -> argparse.ArgumentParser:
  """Returns a parser with the options that every program for a device has."""
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", help="folder for the rows; default $OUT, else benchmarks/results")
  parser.add_argument("--minutes", type=float, default=minutes, help="stop by then")
  parser.add_argument("--rehearse", action="store_true", help="tiny, with a stand-in on a CPU")
  return parser


def device_slug(kind: str) -> str:
  """Returns a device's name for files: `NVIDIA H100 80GB HBM3` -> `h100`."""
  words = [w for w in kind.lower().split() if any(c.isdigit() for c in w) and w[0].isalpha()]
  return words[0] if words else kind.lower().replace(" ", "_")


def open_store(
  name: str,
  command: str,
  out: str | pathlib.Path | None,
  rehearse: bool = False,
  configuration: str = "",
) -> rows.Store:
  """Opens the file of a benchmark's rows, one per device.

  Args:
    name: of the file, e.g. "attention_gpu_{device}"; a rehearsal's device is "rehearsal".
    command: makes the rows.
    out: folder; default `$OUT`, else benchmarks/results.
    rehearse: mark rows as no measurement.
    configuration: `--config` of the run. Its rows count as rows of other code: a run without it
      measures them anew.

  Raises:
    ValueError: if a rehearsal would write among the measured rows.
  """
  folder = pathlib.Path(out or os.environ.get("OUT") or rows.RESULTS)
  if rehearse and folder.resolve() == rows.RESULTS.resolve():
    raise ValueError(
      "a rehearsal measures nothing: name a folder of its own with --out, not benchmarks/results."
    )
  device = jax.devices()[0]
  label = "rehearsal" if rehearse else device_slug(device.device_kind)
  command += f" --config='{configuration}'" if configuration else ""
  command += " --rehearse" if rehearse else ""
  context = rows.context(command) | {"code": code_digest(), "platform": device.platform}
  context |= {package: facts.version_of(package) for package in _PACKAGES} | facts.toolchain()
  if configuration:
    context |= {"config": configuration, "code": f"{context['code']} {configuration}"}
  return rows.Store(
    folder / f"{name.format(device=label)}.json", context, ("device", "code"), rehearse
  )
