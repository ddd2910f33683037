"""Reports what a GPU machine has: versions, the assembler that XLA finds, driver, memory, cores.

  python -m benchmarks.gpu.facts --out=FOLDER     # prints the facts and writes facts.json there

Importing this module needs no jax and opens no device, so that the facts are known even where jax
cannot start.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

ABSENT = "absent"
# Of nvidia-smi's table: all but its list of processes.
_SMI_CHARACTERS = 1500
# A tool that does not answer within this many seconds counts as absent.
_PATIENCE = 10
_PACKAGES = (
  "jax",
  "jaxlib",
  "jax-cuda13-plugin",
  "jax-cuda13-pjrt",
  "nvidia-cudnn-cu13",
  "nvidia-cuda-nvcc",
  "numpy",
  "flax",
  "optax",
  "ml_collections",
  "torch",
)
_TOOLS = ("ptxas", "nvcc", "nvdisasm", "compute-sanitizer", "cuda-gdb", "ncu")
# Where XLA looks for libdevice when nobody says.
_LIBDEVICE = "/usr/local/cuda/nvvm/libdevice/libdevice.10.bc"


@functools.cache
def toolchain() -> dict[str, str]:
  """Returns what a kernel's machine code and launch depend on; every row carries these fields.

  `ptxas` is the one on PATH, which XLA prefers, `ptxas_wheel` that of the wheel nvidia-cuda-nvcc.
  """
  return {
    "ptxas": described_ptxas(shutil.which("ptxas")),
    "ptxas_wheel": described_ptxas(wheel_ptxas()),
    "driver": of_gpu("driver_version"),
  }


def described_ptxas(path: str | None) -> str:
  """Returns a ptxas' path and version, e.g. "/usr/local/cuda/bin/ptxas 13.0.88", or "absent"."""
  if path is None:
    return ABSENT
  found = re.search(r"\bV([\d.]+)", answer([path, "--version"]))
  return f"{shown(path)} {found.group(1) if found else 'of unknown version'}"


def shown(path: str) -> str:
  """Returns a path as a row may hold it: from Python's prefix or the user's home on, if there."""
  for place in (sys.prefix, os.path.expanduser("~")):
    if pathlib.Path(path).is_relative_to(place):
      return str(pathlib.Path(path).relative_to(place))
  return path


def of_gpu(field: str) -> str:
  """Returns a field of the first GPU as nvidia-smi tells it, e.g. "name", or "absent"."""
  found = answer(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]).splitlines()
  return found[0] if found else ABSENT


def answer(command: list[str]) -> str:
  """Returns what a tool prints, or "" where it is missing, fails or does not answer in time."""
  try:
    done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False)
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def wheel_ptxas() -> str | None:
  """Returns the path of the ptxas in the wheel nvidia-cuda-nvcc, or None."""
  try:
    files = importlib.metadata.distribution("nvidia-cuda-nvcc").files or ()
  except importlib.metadata.PackageNotFoundError:
    return None
  paths = [str(file.locate()) for file in files if file.name == "ptxas"]
  return paths[0] if paths and os.access(paths[0], os.X_OK) else None


def facts() -> dict:
  """Returns everything worth knowing before the first kernel runs."""
  return {
    "device": of_gpu("name"),
    **toolchain(),
    "libdevice": _LIBDEVICE if os.path.exists(_LIBDEVICE) else ABSENT,
    "tools": {name: shown(shutil.which(name) or ABSENT) for name in _TOOLS},
    "packages": {name: version_of(name) for name in _PACKAGES},
    "python": platform.python_version(),
    "machine": platform.machine(),
    "cores": os.cpu_count(),
    "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    "nvidia_smi": answer(["nvidia-smi"])[:_SMI_CHARACTERS],
  }


def version_of(package: str) -> str:
  """Returns the version of an installed package, or "absent"."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ABSENT


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, help="folder for facts.json")
  options, _ = parser.parse_known_args()  # a slot gives every step --minutes and --rehearse, too
  found = facts()
  for name, value in found.items():
    print(f"{name}: {value}")
  if options.out:
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "facts.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main()
