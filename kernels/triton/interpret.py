"""Tracing for Triton's interpreter, on any device, for tests of numerics."""

import contextlib
import contextvars

_interpreting = contextvars.ContextVar("interpreting_triton", default=False)


@contextlib.contextmanager
def interpreted():
  """Runs Triton kernels traced inside in Triton's NumPy interpreter: slow, for small shapes.

  It multiplies bfloat16 as float32, and rounds results alone.
  """
  token = _interpreting.set(True)
  try:
    yield
  finally:
    _interpreting.reset(token)


def is_interpreted() -> bool:
  """Returns True while kernels are being traced for the interpreter."""
  return _interpreting.get()
