"""Settings of the GPU benchmark's tests."""

import types

import pytest


@pytest.fixture(scope="module", autouse=True)
def garbage_stays():
  """Behind every row a benchmark looks for arrays to free; these are small, and a look is long."""
  # Not above: jax would be imported before tests/conftest.py has set what it reads.
  from benchmarks.gpu import attempt, bench

  with pytest.MonkeyPatch.context() as patch:
    for module in (attempt, bench):
      patch.setattr(module, "gc", types.SimpleNamespace(collect=lambda: 0))
    yield
