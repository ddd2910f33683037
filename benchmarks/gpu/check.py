"""Checks the attention kernels at real sizes against a float32 oracle on sampled rows.

  python -m benchmarks.gpu.check      # on the GPU, about 2 minutes; exits with 1 if a case is wrong
  python -m benchmarks.gpu.check --only="^plain$" --config="take_turns=False"    # one case
  python -m benchmarks.gpu.check --rehearse --out=/tmp/x     # tiny shapes, a stand-in, any device

It is the part "checks" of the GPU benchmark. The conformance tests (`pytest --device=gpu`) are
small and need pytest; the cases here need jax alone, fill the device, have more than 2^31 elements,
or hand the kernels operands as a program does. Errors on sampled rows must stay within twice those
of the plain computation in the input's type, and two runs must agree bit for bit.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask, dense_mask, from_tiles
from freqformer.kernels.selection.topk import top_ids

from benchmarks.gpu import device, masks, oracle
from benchmarks.gpu.bench import Bench


@dataclasses.dataclass(frozen=True)
class Case:
  """One attention call.

  Attributes:
    b: samples.
    h: heads.
    n: rows of the buffer.
    d: channels of a head.
    keep: probability that a tile is listed; 0: dense mode, no lists.
    ragged: tiles hold random numbers of valid rows.
    empty: this share of query tiles lists nothing.
    shared: one table for all samples and heads; else each has its own.
    bias: key tiles carry one.
    keys: instead of `keep`: key rows per list, drawn as the benchmark does (large shapes).
    backward: check gradients, too.
  """

  name: str
  b: int = 1
  h: int = 4
  n: int = 2048
  d: int = 128
  block_q: int = 128
  block_kv: int = 128
  dtype: str = "bfloat16"
  keep: float = 0.4
  ragged: bool = False
  empty: float = 0.0
  shared: bool = False
  bias: bool = False
  keys: int = 0
  backward: bool = True


_ODD = {"b": 2, "ragged": True, "empty": 0.2, "bias": True}
# Every configuration of the kernels, and every kind of table, at a size that fills the device.
CASES = (
  Case("plain"),
  Case("dense mode, ragged", keep=0.0, ragged=True, d=64),
  Case("ragged, empty rows", ragged=True, empty=0.3),
  Case("one table for all heads", b=2, shared=True, ragged=True),
  Case("float16", dtype="float16", **_ODD),
  Case("d=64", d=64, **_ODD),
  Case("64x64 tiles", block_q=64, block_kv=64, **_ODD),
  Case("64x64 tiles, d=64", d=64, block_q=64, block_kv=64, **_ODD),
  Case("64x128 tiles", block_q=64, block_kv=128, **_ODD),
  Case("128x64 tiles", block_q=128, block_kv=64, **_ODD),
  Case("128x64 tiles, odd counts", block_q=128, block_kv=64, keep=0.15, empty=0.3, ragged=True),
  Case("one tile", n=128, keep=1.0, h=1),
  Case("long lists", n=16384, keep=0.5, h=2),
)
# The first has more than 2^31 elements in each of q, k, v: an int32 offset anywhere would show in
# the last heads and rows.
LARGE = (
  Case("1M tokens, 4K keys, 18 heads", n=1 << 20, h=18, keys=4096, backward=False),
  Case("1M tokens, 4K keys, 6 heads, gradients", n=1 << 20, h=6, keys=4096),
)
# 15 tiles and 3 heads: no array of the table is a multiple of 256 bytes. The runtime of Mosaic
# kernels refuses arguments that are not aligned to that ("Input buffer N is not 256-byte aligned"),
# and an array right behind another one would not be.
UNALIGNED = Case("", n=15 * 128, h=3, d=64, bias=True)
# Widths of rows and tiles that are selected from them: 5 % of a tile's candidates at 64K to 2M
# tokens, and odd ones.
SELECTIONS = ((512, 26), (630, 126), (2048, 102), (8192, 409), (16384, 819))


def tiny(case: Case) -> Case:
  """Returns the same case at a size that a CPU checks in a second."""
  return dataclasses.replace(
    case,
    n=min(case.n, 2048) // 8,
    h=min(case.h, 3),
    d=16,
    block_q=case.block_q // 8,
    block_kv=case.block_kv // 8,
    keys=case.keys // 64,
  )


def draw_mask(case: Case, seed: int) -> BlockMask:
  """Draws a random table of the case."""
  rng = np.random.default_rng(seed)
  q_tiles = case.n // case.block_q
  kv_tiles = case.n // case.block_kv
  blocks = (case.block_q, case.block_kv)
  lead = (1, 1) if case.shared else (case.b, case.h)
  kv_len = np.full((case.b, kv_tiles) if lead[0] > 1 else kv_tiles, case.block_kv, np.int32)
  if case.ragged:
    kv_len = rng.integers(0, case.block_kv + 1, kv_len.shape).astype(np.int32)
    kv_len[..., 0] = case.block_kv - 1
  if case.keys:
    ids = masks.random_ids(case.h, (q_tiles, kv_tiles), case.keys // case.block_kv, seed)
    mask = masks.full_lists(ids, kv_len, *blocks)
  elif case.keep == 0:
    mask = dataclasses.replace(dense_mask(case.n, case.n, *blocks), kv_len=kv_len)
  else:
    tiles = rng.random((*lead, q_tiles, kv_tiles)) < case.keep
    tiles[..., 0] |= ~tiles.any(-1)
    tiles &= rng.random((*lead, q_tiles, 1)) >= case.empty
    tiles[:, :, 0] &= case.empty == 0  # at least one
    mask = from_tiles(tiles, kv_len, *blocks)
    # Lists of equal length for every seed: one compilation each.
    longer = ((0, 0),) * 3 + ((0, kv_tiles - mask.max_kv),)
    mask = dataclasses.replace(mask, kv_indices=np.pad(mask.kv_indices, longer, mode="edge"))
  bias = rng.standard_normal(kv_tiles).astype(np.float32) if case.bias else None
  return dataclasses.replace(mask, kv_bias=bias)


def draw_inputs(case: Case, seed: int, mask: BlockMask) -> tuple[tuple, tuple]:
  """Draws q, k, v, and cotangents of the output and of the LSE.

  The outputs of padding query rows mean nothing and get no cotangent.
  """
  keys = jax.random.split(jax.random.key(100 + seed), 5)
  shape = (case.b, case.n, case.h, case.d)
  data = [jax.random.normal(key, shape, jnp.dtype(case.dtype)) for key in keys[:3]]
  if not case.backward:
    return tuple(data), ()
  lengths = np.atleast_2d(np.asarray(mask.kv_len))
  valid = (np.arange(mask.block_kv) < lengths[..., None]).reshape(len(lengths), case.n)
  d_out = jax.random.normal(keys[3], shape, jnp.dtype(case.dtype))
  d_lse = jax.random.normal(keys[4], (case.b, case.h, case.n))
  cotangents = (jnp.where(valid[:, :, None, None], d_out, 0), jnp.where(valid[:, None], d_lse, 0))
  return tuple(data), cotangents


@functools.partial(jax.jit, static_argnames="implementation")
def run(inputs, mask, cotangents, implementation):
  """Returns `(out, lse)`, and `(dq, dk, dv)` for cotangents of both; `()` without cotangents."""

  def call(*qkv):
    return attention(*qkv, mask, implementation=implementation)

  if not cotangents:
    return call(*inputs), ()
  found, pullback = jax.vjp(call, *inputs)
  return found, pullback(cotangents)


def judged(inputs, mask: BlockMask, cotangents, results, count: int) -> dict:
  """Returns errors of a call's results, and `correct`: all of them within tolerance."""
  found, grads = results
  if not cotangents:
    return oracle.forward_error(inputs, mask, found, count)
  return oracle.backward_error(inputs, mask, found, cotangents, grads, count)


def check(bench: Bench, case: Case) -> dict:
  """Runs one case, twice where it is not a large one."""
  mask = draw_mask(case, 0)
  inputs, cotangents = draw_inputs(case, 0, mask)
  operands = (inputs, masks.on_device(mask), cotangents, bench.implementation)
  results = run(*operands)
  row = judged(inputs, mask, cotangents, results, bench.sizes.oracle_rows)
  if case.keys:
    return row
  again = run(*operands)
  pairs = zip(jax.tree.leaves(results), jax.tree.leaves(again), strict=True)
  repeat = all(bool(jnp.array_equal(x, y, equal_nan=True)) for x, y in pairs)
  return row | {"two_runs_bit_equal": repeat, "correct": row["correct"] and repeat}


def check_constant_table(bench: Bench, case: Case) -> dict:
  """Checks a call whose table is a constant of the program, as a method's static one may be."""
  mask = draw_mask(case, 3)
  inputs, cotangents = draw_inputs(case, 3, mask)
  results = jax.jit(lambda inputs: run(inputs, mask, cotangents, bench.implementation))(inputs)
  return judged(inputs, mask, cotangents, results, bench.sizes.oracle_rows)


def check_sliced_in_scan(bench: Bench, case: Case) -> dict:
  """Checks calls whose operands and tables are slices of stacked arrays, as in a scan over layers.

  A slice need not begin at a multiple of 256 bytes.
  """
  tables = [draw_mask(case, seed) for seed in (6, 7)]
  data = [draw_inputs(case, seed, mask) for seed, mask in zip((6, 7), tables, strict=True)]
  operands = [(masks.on_device(m), *each) for m, each in zip(tables, data, strict=True)]
  layers = jax.tree.map(lambda *x: jnp.stack(x), *operands)

  def layer(_, operands):
    mask, inputs, cotangents = operands
    return None, run(inputs, mask, cotangents, bench.implementation)

  _, stacked = jax.jit(lambda layers: jax.lax.scan(layer, None, layers))(layers)
  errors = []
  for i, (mask, (inputs, cotangents)) in enumerate(zip(tables, data, strict=True)):
    results = jax.tree.map(lambda x, i=i: x[i], stacked)
    errors.append(judged(inputs, mask, cotangents, results, bench.sizes.oracle_rows))
  worst = {name: max(error[name] for error in errors) for name in errors[0] if name != "correct"}
  return worst | {"correct": all(error["correct"] for error in errors)}


def check_selection(_: Bench, sizes: tuple[tuple[int, int], ...]) -> dict:
  """Checks that lists of real lengths, with fixed places and many ties, are an exact top-k's.

  `sizes` are pairs: width of a row, entries to select.
  """
  rng = np.random.default_rng(0)
  correct = True
  select = jax.jit(top_ids, static_argnums=1)
  rows = np.arange(64)
  for width, budget in sizes:
    shape = (1, 3, len(rows), width)
    always = np.stack([rows, np.full(len(rows), width - 1)], -1)
    for scores in (rng.standard_normal(shape), rng.integers(-9, 9, shape)):
      scores = scores.astype(np.float32)
      found = np.asarray(select(jnp.asarray(scores), budget, jnp.asarray(always)))
      scores[..., rows[:, None], always] = np.inf
      order = np.argsort(-scores, axis=-1, kind="stable")
      correct &= np.array_equal(found, np.sort(order[..., :budget], axis=-1))
  return {"correct": bool(correct)}


def checks(small: bool) -> dict[str, Callable[[Bench], dict]]:
  """Returns the measurement of every case by name, in order of value."""
  sized = tiny if small else (lambda case: case)
  unaligned = sized(UNALIGNED)
  found = {case.name: functools.partial(check, case=sized(case)) for case in CASES}
  found["constant table"] = functools.partial(check_constant_table, case=unaligned)
  found["sliced in a scan"] = functools.partial(check_sliced_in_scan, case=unaligned)
  sizes = SELECTIONS[: 2 if small else None]
  found["long selections"] = functools.partial(check_selection, sizes=sizes)
  return found | {case.name: functools.partial(check, case=sized(case)) for case in LARGE}


def main() -> int:
  from benchmarks.gpu import run as gpu_run  # which lists these checks among its cases

  parser = device.command_line(__doc__, minutes=8)
  parser.add_argument("--implementation", help="default the GPU kernel; in a rehearsal xla")
  parser.add_argument("--only", default="", help="regular expression: only cases that it finds")
  parser.add_argument("--config", default="", help="as of python -m benchmarks.attention")
  o = parser.parse_args()
  found = gpu_run.main(
    o.minutes, o.out, o.implementation, o.rehearse, ("checks",), o.only, o.config
  )
  return 1 if found.troubles or found.skipped else 0


if __name__ == "__main__":
  sys.exit(main())
