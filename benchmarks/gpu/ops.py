"""Measurements of everything but attention: ceilings, and the other kernels of a layer.

Each kernel is checked at its real shape against its portable form; the conformance tests
(`pytest --device=gpu`) hold it to that form at small shapes of every kind.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.linear.api import Segments, linear_attention
from freqformer.kernels.selection.block_scores import block_mass

from benchmarks.arg_specs import AttentionSpec
from benchmarks.gpu import masks
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.launches import attend
from benchmarks.gpu.masks import Composition
from benchmarks.gpu.oracle import compared, relative_error
from benchmarks.gpu.timing import Call

# choice: one rounding to bfloat16 is 1.7e-3 at most; a layer's results are rounded once or twice.
AROUND_TOLERANCE = 4e-3
# choice: masses of a row must sum to its number of valid rows, up to rounding of exponents.
MASS_TOLERANCE = 1e-3


def matmul(bench: Bench) -> dict:
  """The rate of a bf16 matmul, which nothing on this device beats."""
  size = bench.sizes.matmul
  x, w = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
  times = bench.measure({"matmul": Call(jnp.matmul, (x, w))})["matmul"]
  flops = 2 * size**3
  return times.row() | {"size": size, "flops": flops, "tflops": flops / times.seconds / 1e12}


def copy(bench: Bench) -> dict:
  """The rate of a copy, bytes read plus bytes written."""
  size = bench.sizes.copy_bytes
  source = jax.random.normal(jax.random.key(2), (size // 2,), jnp.bfloat16)
  times = bench.measure({"copy": Call(lambda x: x + jnp.bfloat16(1), (source,))})["copy"]
  return times.row() | {"bytes": 2 * size, "tb_per_s": 2 * size / times.seconds / 1e12}


def around(bench: Bench, spec: AttentionSpec, bands: Composition) -> dict:
  """Times everything that FreqFormer adds to its attention call.

  Norm and rotary, which every method has, are timed apart and subtracted. What attention would get
  and the output are compared with the portable form in float32.
  """
  # Needs flax, which a bare GPU machine may have in another version.
  from benchmarks import layer

  method = layer_method(spec, bands)
  layout = spec.layout
  joint = jnp.stack(masks.dense(spec).inputs(), 2)
  arrays, tables = jax.tree.map(jnp.asarray, (layout.arrays(), method.tables(layout)))
  ours = functools.partial(layer.around_attention, method, bench.implementation)
  call = Call(ours, (joint, arrays, tables))
  handed_over, out = call()
  attended = functools.partial(attend, implementation=bench.implementation)
  finished = functools.partial(layer.norm_and_rotary, bench.implementation)
  calls = {
    "around": call,
    "attention": Call(attended, handed_over),
    "norm_and_rotary": Call(finished, (joint, arrays)),
  }
  t = bench.measure(calls)
  portable = functools.partial(layer.around_attention, method, "xla")
  wanted, wanted_out = jax.jit(portable)(joint.astype(jnp.float32), arrays, tables)
  pairs = zip("qkv", handed_over[:3], wanted[:3], strict=True)
  errors = {f"error_{name}": relative_error(got, want) for name, got, want in pairs}
  errors["error_out"] = relative_error(out, wanted_out)
  added = t["around"].seconds - t["norm_and_rotary"].seconds
  row = {name: times.row() for name, times in t.items()} | errors
  return row | {
    "n": spec.n,
    "seconds": t["around"].seconds,
    "over_attention": added / t["attention"].seconds,
    "correct": all(error <= AROUND_TOLERANCE for error in errors.values()),
  }


def layer_method(spec: AttentionSpec, bands: Composition):
  """Returns FreqFormer's config for a composition: the same heads, and cuts of its compression."""
  from freqformer.grid.basis import SpectralBasis
  from freqformer.methods.freqformer import FreqFormer

  low = tuple(1 / r for r in bands.ratio)
  return FreqFormer(
    basis=SpectralBasis("block_dct", low, (0.75, 0.75, 0.75)),
    allocation=bands.heads(spec),
    mid_tiles=bands.mid_tiles(spec),
    window=bands.window,
    deal=bands.deal,
  )


def linear(bench: Bench, spec: AttentionSpec) -> dict:
  """Times linear attention within frames: on all heads, on some in place, and with its backward.

  On some heads it includes the pass (4 bytes per element) that makes its `into`.

  `tb_per_s`: bytes of reading q, k, v and writing the output once, over seconds on all heads. The
  output errs at most twice as much as the portable form with the same 16-bit operands.
  """
  q, k, v, d_out = masks.dense(spec).inputs(4)
  arrays = spec.layout.arrays()
  frame = np.where(arrays.valid, arrays.positions[:, 0], -1).astype(np.int32)
  segments = jax.tree.map(jnp.asarray, Segments.of_ids(frame))
  # The last five of twelve heads.
  heads = jnp.arange(spec.heads)[None] >= spec.heads - round(5 * spec.heads / 12)
  # Without the kernel under test, the portable form: there is no other stand-in.
  implementation = bench.implementation if bench.implementation == "hopper" else "xla"
  call = functools.partial(linear_attention, feature_map="elu")

  def forward(q, k, v, segments, name=implementation):
    return call(q, k, v, segments, implementation=name)[0]

  def some(q, k, v, segments, heads):
    how = {"heads": heads, "into": v * 2, "implementation": implementation}
    return call(q, k, v, segments, **how)[0]

  def backward(q, k, v, d_out, segments):
    out, rule = jax.vjp(lambda *x: forward(*x, segments), q, k, v)
    return out, rule(d_out)

  portable = functools.partial(forward, name="xla")
  calls = {
    "all_heads": Call(forward, (q, k, v, segments)),
    "xla": Call(portable, (q, k, v, segments)),
    "some_heads": Call(some, (q, k, v, segments, heads)),
    "with_backward": Call(backward, (q, k, v, d_out, segments)),
  }
  t = bench.measure(calls)
  wide = (x.astype(jnp.float32) for x in (q, k, v))
  exact = jax.jit(portable)(*wide, segments)
  fields, correct = compared("out", calls["all_heads"](), exact, calls["xla"]())
  seconds = t["all_heads"].seconds
  return {name: times.row() for name, times in t.items()} | {
    "n": spec.n,
    "seconds": seconds,
    "ratio": t["xla"].seconds / seconds,
    "tb_per_s": 4 * q.size * q.dtype.itemsize / seconds / 1e12,
    "correct": correct,
    **fields,
  }


def search(bench: Bench, spec: AttentionSpec) -> dict:
  """Times the block masses of AdaSpa's search.

  `product_tflops`: 2 n^2 d per head over seconds. With the true LSE a query tile's masses sum to
  its number of valid rows: `error_rows` is their distance from it.
  """
  problem = masks.dense(spec)
  q, k, v = problem.inputs()
  kv_len = spec.layout.arrays().kv_len
  lse = attention(q, k, v, masks.on_device(problem.mask))[1]

  def masses(q, k, lse):
    # As in a search, the result of a row of masses is small.
    return block_mass(q, k, lse, kv_len, spec.block, reduce=lambda mass, _: mass.sum(-1))

  call = Call(masses, (q, k, lse))
  times = bench.measure({"search": call})["search"]
  error = relative_error(call(), np.broadcast_to(kv_len, (*lse.shape[:2], len(kv_len))))
  return times.row() | {
    "n": spec.n,
    "product_tflops": 2.0 * spec.n**2 * spec.heads * spec.head_dim / times.seconds / 1e12,
    "error_rows": error,
    "correct": error < MASS_TOLERANCE,
  }
