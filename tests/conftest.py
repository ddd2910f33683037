"""A compile cache and quick compilations, for all tests and workers."""

import os
import pathlib

# XLA optimises little: most programs run once, so that compiling them well costs more than it
# saves, and numbers are the same up to rounding. Processes that tests start inherit it.
# `tools.offline` compiles for a GPU as well as ever.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The GPU interpreter blocks one host thread per warpgroup; XLA would give as many threads as there are cores.
os.environ.setdefault("NPROC", "16")

import jax  # noqa: E402  (reads the environment)

# A warm run pays for no compilation twice.
_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
