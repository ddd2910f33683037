"""Interpretation of the kernels on any device, for tests of their numerics."""

import contextlib
import contextvars

_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreted(detect_races: bool = False):
  """Runs kernels traced inside in JAX's GPU interpreter: slow, for small shapes.

  `detect_races` prints "RACE DETECTED" where two warpgroups touch memory without an order.
  """
  # Pallas is slow to import, and `is_interpreted` is asked by code that does not need it.
  from jax.experimental.pallas import mosaic_gpu as plgpu

  token = _interpreting.set(True)
  try:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
      yield
  finally:
    _interpreting.reset(token)


def is_interpreted() -> bool:
  """Returns True while kernels are being traced for the interpreter."""
  return _interpreting.get()
