"""AdaSpa's search on the GPU: are the masses right, and how long do they take beside dense attention?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.selection.block_scores import block_mass

from benchmarks.arg_specs import AttentionSpec
from benchmarks.gpu import masks as gpu_masks
from benchmarks.gpu.oracle import Error
from benchmarks.gpu.timing import Call, Effort, measure

_STEP = 2e-5  # float32 exponents of up to 60, and a device's approximate exponential


def check(small: bool, implementation: str) -> dict:
  """Masses of ragged tiles, more of them than are added up at once, against the portable form; two runs bit-equal."""
  del implementation  # of attention; the device decides who searches
  worst, repeat = 0.0, True
  for block, d, tiles in ((64, 32, 5),) if small else ((64, 64, 70), (128, 128, 131), (128, 64, 9)):
    rng = np.random.default_rng(tiles)
    kv_len = rng.integers(0, block + 1, (2, tiles)).astype(np.int32)
    q, k = (
      jax.random.normal(key, (2, tiles * block, 3, d), jnp.bfloat16)
      for key in jax.random.split(jax.random.key(tiles))
    )
    lse = jnp.asarray(rng.standard_normal((2, 3, tiles * block)), jnp.float32)
    run = jax.jit(functools.partial(block_mass, block=block))
    found, again = run(q, k, lse, kv_len), run(q, k, lse, kv_len)
    want = jax.jit(functools.partial(block_mass, block=block, implementation="xla"))(
      q, k, lse, kv_len
    )
    worst, repeat = (
      max(worst, Error.of(found, want).relative),
      repeat and np.array_equal(found, again),
    )
  return {
    "error_mass": worst,
    "two_runs_bit_equal": bool(repeat),
    "correct": bool(repeat and worst <= _STEP),
  }


def timed(spec: AttentionSpec, effort: Effort, portable: bool) -> dict:
  """Seconds of all masses of one layer, of dense attention beside it, and of XLA's form where there is time for it.

  `product_tflops`: 2 n^2 d per head over seconds. `of_dense`: seconds over those of dense attention, of twice the products.
  With the true LSE a query tile's masses sum to its number of valid rows: `error_rows` is how far they are from it.
  """
  q, k, v = gpu_masks.dense(spec).inputs(3)
  layout, table = spec.layout, gpu_masks.on_device(gpu_masks.dense(spec).mask)
  lse = attention(q, k, v, table)[1]

  def masses(q, k, lse, name):
    def whole(mass, _):
      return mass.sum(-1)  # as in a search, what becomes of a row of masses is small

    return block_mass(
      q, k, lse, layout.arrays().kv_len, layout.block, reduce=whole, implementation=name
    )

  calls = {
    "search": Call(functools.partial(masses, name=None), (q, k, lse)),
    "dense": Call(lambda q, k, v, table: attention(q, k, v, table)[0], (q, k, v, table)),
  }
  if portable:
    calls["xla"] = Call(functools.partial(masses, name="xla"), (q, k, lse))
  t = measure(calls, effort)
  seconds, flops = t["search"].seconds, 2.0 * spec.n**2 * spec.heads * spec.head_dim
  row = {key: measured.row() for key, measured in t.items()} | {
    "n": spec.n,
    "seconds": seconds,
    "product_tflops": flops / seconds / 1e12,
  }
  valid = np.broadcast_to(layout.arrays().kv_len, (*lse.shape[:2], layout.tiles))
  error = Error.of(calls["search"](), valid).relative
  row |= {
    "of_dense": seconds / t["dense"].seconds,
    "error_rows": error,
    "correct": bool(error < 1e-3),
  }
  return row | ({"ratio": t["xla"].seconds / seconds} if portable else {})
