"""Facts about NVIDIA GPUs and packages that Triton kernels depend on. Nothing here imports Triton.

GPUs form classes, by the instructions that Triton compiles to and the shared memory of a thread
block (CUDA C programming guide, table of technical specifications by compute capability).
"""

import functools
import importlib.metadata

import jax
from freqformer.kernels.core.target import Target
from freqformer.kernels.triton.interpret import is_interpreted

# Shared memory that a thread block may ask for, in bytes, by class.
SHARED_BYTES = {
  "sm80": 163 * 1024,  # A100, A30
  "sm89": 99 * 1024,  # RTX 30, A10, A40; RTX 40, L4, L40
  "sm90": 227 * 1024,  # H100, H200
  "sm100": 227 * 1024,  # B200
  "sm120": 99 * 1024,  # RTX 50
}
_CLASSES = {
  "8.0": "sm80",
  "8.6": "sm89",
  "8.9": "sm89",
  "9.0": "sm90",
  "10.0": "sm100",
  "10.3": "sm100",
  "12.0": "sm120",
  "12.1": "sm120",
}
LEAST = "8.0"  # products of bfloat16 begin there
# What works together: jax-triton calls private functions of jax, and passes options to Triton.
_WORK = {"jax-triton": "0.4", "triton": "3.7", "jax": "0.11"}
_INSTALL = "python -m pip install -r requirements-gpu.txt"


def device_class(capability: str) -> str | None:
  """Returns the class of a compute capability, e.g. "8.6"; None if it is unknown."""
  return _CLASSES.get(capability)


def wrong_device(target: Target) -> str | None:
  """Returns why Triton kernels cannot run on a target; None where they can or are interpreted."""
  if is_interpreted():
    return lacking_packages()
  if target.platform != "cuda":
    return f"it runs on NVIDIA GPUs, the target is {target}"
  if target.capability is None or device_class(target.capability) is None:
    known = ", ".join(_CLASSES)
    return f"it needs a compute capability of at least {LEAST} ({known}), the target is {target}"
  return lacking_packages()


@functools.cache
def lacking_packages() -> str | None:
  """Returns which packages are missing or do not work together, with the remedy; None if none."""
  found = {"jax": jax.__version__}
  for name in ("jax-triton", "triton"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      return (
        f"it needs the packages jax-triton and triton, {name} is not installed; run: {_INSTALL}"
      )
  for name, minor in _WORK.items():
    if not found[name].startswith(f"{minor}."):
      return f"it is made for {name} {minor}, found {found[name]}; run: {_INSTALL}"
  return None
