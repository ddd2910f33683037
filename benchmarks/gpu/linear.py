"""Linear attention on the GPU: is it right, and how close to a copy does it run?

Checked against the portable backend in float32, which shares no code with the kernels; timed beside that backend.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.core.op import ALIASES
from freqformer.kernels.linear.api import LINEAR_ATTENTION, Segments, linear_attention

from benchmarks.arg_specs import AttentionSpec
from benchmarks.gpu import masks as gpu_masks
from benchmarks.gpu.oracle import Error
from benchmarks.gpu.timing import Call, Effort, measure
from freqformer.grid.layout import TileLayout

_RESULTS = ("out", "log_den", "dq", "dk", "dv", "d_into")


@dataclasses.dataclass(frozen=True)
class LinearCase:
  """One call.

  Attributes:
    name: of the row. feature_map: of the op. d: channels.
    grid: tokens; segments are frames. b, h: samples and heads.
    tiles: segments are tiles, and each reads a random half of them.
    heads: a random half of the heads takes part and writes into what is there.
  """

  name: str
  feature_map: str
  d: int = 128
  grid: tuple[int, int, int] = (12, 20, 32)
  b: int = 1
  h: int = 4
  tiles: bool = False
  heads: bool = False


CASES = (
  LinearCase("linear, frames, softmax", "softmax", heads=True, b=2),
  LinearCase("linear, frames of 40-row runs, elu", "elu", grid=(9, 10, 24)),
  LinearCase("linear, frames that share boxes, elu", "elu", grid=(21, 30, 52), heads=True),
  LinearCase("linear, frames, relu, d=64", "relu", d=64, heads=True),
  LinearCase("linear, tiles that read others", "softmax", tiles=True),
  LinearCase("linear, long frames", "elu", grid=(2, 128, 128), h=2),
)


def tiny(case: LinearCase) -> LinearCase:
  """The same case at a size that a CPU checks in a second."""
  return dataclasses.replace(case, d=16, grid=(4, 8, 8), h=2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _both(implementation, feature_map, rows, d_log, segments, arrays):
  """out, log_den and the gradients of q, k, v (and into)."""
  *qkv, d_out, into = rows

  def call(q, k, v, into):
    how = arrays | ({"into": into} if "heads" in arrays else {})
    return linear_attention(
      q, k, v, segments, feature_map=feature_map, implementation=implementation, **how
    )

  found, rule = jax.vjp(call, *qkv, into)
  return *found, *rule((d_out, d_log))


def frames(layout: TileLayout) -> Segments:
  """One segment per frame of the grid."""
  arrays = layout.arrays()
  return Segments.of_ids(np.where(arrays.valid, arrays.positions[:, 0], -1).astype(np.int32))


def _draw(case: LinearCase):
  layout, rng = TileLayout.fit(case.grid, 128), np.random.default_rng(len(case.name))
  segments, arrays = frames(layout), {}
  if case.tiles:
    segments = Segments.of_tiles(layout.arrays().kv_len, layout.block)
    arrays["reads"] = rng.random((case.b, case.h, layout.tiles, layout.tiles)) < 0.5
  if case.heads:
    arrays["heads"] = np.arange(case.b * case.h).reshape(case.b, case.h) % 2 == 0
  shape = (case.b, layout.n_buffer, case.h, case.d)
  rows = [
    jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(7), 5)
  ]
  return (
    rows,
    rng.standard_normal((case.b, case.h, layout.n_buffer)).astype(np.float32),
    segments,
    arrays,
  )


def _known(implementation: str) -> str:
  """Returns the implementation of attention, or "xla" where linear attention has none of that name."""
  name = ALIASES.get(implementation, implementation)
  return name if name in LINEAR_ATTENTION.implementations else "xla"


def check(case: LinearCase, implementation: str) -> dict:
  """Errors of all results, each at most twice that of the portable backend with the same bfloat16 operands; two runs equal.

  An implementation of attention that linear attention has none of stands for the portable one.
  """
  rows, d_log, segments, arrays = _draw(case)
  run = functools.partial(_both, _known(implementation), case.feature_map)
  found, again = run(rows, d_log, segments, arrays), run(rows, d_log, segments, arrays)
  plain = _both("xla", case.feature_map, rows, d_log, segments, arrays)
  exact = _both(
    "xla", case.feature_map, [x.astype(jnp.float32) for x in rows], d_log, segments, arrays
  )
  repeat = all(np.array_equal(x, y) for x, y in zip(found, again, strict=True))
  row, correct = {"two_runs_bit_equal": repeat}, repeat
  for name, got, model, want in zip(_RESULTS, found, plain, exact, strict=True):
    error, bound = Error.of(got, want), Error.of(model, want)
    row |= {
      f"error_{name}": error.relative,
      f"error_{name}_max": error.largest,
      f"plain_error_{name}": bound.relative,
    }
    correct = correct and bool(error.relative <= max(2 * bound.relative, 1e-5))  # NaN never is
  return row | {"correct": correct}


def timed(spec: AttentionSpec, implementation: str, effort: Effort) -> dict:
  """Seconds of frames' linear attention on all heads, on 5 of 12 of them in place, and with its backward; beside XLA's.

  `tb_per_s`: bytes of reading q, k, v and writing the output once, over seconds on all heads.
  """
  q, k, v, d_out = gpu_masks.dense(spec).inputs(4)
  segments = jax.tree.map(jnp.asarray, frames(spec.layout))
  heads = jnp.arange(spec.heads)[None] >= spec.heads - round(5 * spec.heads / 12)
  name = _known(implementation)

  def forward(q, k, v, segments, name):
    return linear_attention(q, k, v, segments, feature_map="elu", implementation=name)[0]

  def some(q, k, v, segments, heads):
    return linear_attention(
      q, k, v, segments, feature_map="elu", implementation=name, heads=heads, into=v * 2
    )[0]

  def backward(q, k, v, d_out, segments):
    out, rule = jax.vjp(lambda *x: forward(*x, segments, name), q, k, v)
    return out, rule(d_out)

  calls = {
    "all_heads": Call(functools.partial(forward, name=name), (q, k, v, segments)),
    "xla": Call(functools.partial(forward, name="xla"), (q, k, v, segments)),
    "some_heads": Call(some, (q, k, v, segments, heads)),
    "with_backward": Call(backward, (q, k, v, d_out, segments)),
  }
  t = measure(calls, effort)
  seconds = t["all_heads"].seconds
  return {key: measured.row() for key, measured in t.items()} | {
    "n": spec.n,
    "seconds": seconds,
    "ratio": t["xla"].seconds / seconds,
    "tb_per_s": 4 * q.size * q.dtype.itemsize / seconds / 1e12,
    "note": "elu; some_heads also holds the pass (4 bytes per element) that makes what it writes into",
  }
