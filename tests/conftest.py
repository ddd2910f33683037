"""One compile cache for all tests and workers: a warm run pays for no compilation twice."""

import os
import pathlib

import jax
import pytest

# The GPU interpreter blocks one host thread per warpgroup; XLA would give as many threads as there are cores.
os.environ.setdefault("NPROC", "16")
_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module")
def quick_compiles():
  """XLA optimises little, for files that compile much and run it once: a third less time, the same numbers up to rounding."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
