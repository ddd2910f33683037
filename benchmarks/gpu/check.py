"""Is the GPU kernel right? Forward, LSE and gradients of many small and a few huge calls, against a float32 oracle.

  python -m benchmarks.gpu.check                    # on the GPU, about 4 minutes; exits with 1 if anything is wrong
  python -m benchmarks.gpu.check --only="^plain, seed 0$" --config="take_turns=False"     # one case, configured otherwise
  python -m benchmarks.gpu.check --rehearse --out=/tmp/x   # the sweep's own check: tiny shapes, a stand-in, any device

A case that is right already (same device, same code) is skipped. A case for which no time is left gets no row: it is printed
as unreached, and the exit status is 1. Each case is announced before it begins, so that a run that is killed names its case.

Every case draws random inputs, cotangents of the output and of the LSE, and a random table. Errors must stay within twice those
of the plain computation in the input's type (DESIGN: error model); on sampled rows, first and last among them. Two runs
must agree bit for bit, and 1e4 written into padding rows must change nothing that is valid.
"""

import dataclasses
import functools
import gc
import os
import pathlib
import re
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from freqformer.kernels.block_sparse import tuning
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask, dense_mask, from_tiles

from benchmarks import rows
from benchmarks.gpu import around as gpu_around
from benchmarks.gpu import config as gpu_config
from benchmarks.gpu import linear as gpu_linear
from benchmarks.gpu import masks as gpu_masks
from benchmarks.gpu import oracle as gpu_oracle
from benchmarks.gpu import search as gpu_search
from benchmarks.gpu import selection as gpu_selection
from benchmarks.gpu.rows import Deadline, Store, open_device
from benchmarks.gpu.run import device_slug

_OUT = flags.DEFINE_string(
  "out", None, "Folder for the rows; default $OUT, else benchmarks/results.", allow_override=True
)
_IMPLEMENTATION = flags.DEFINE_string(
  "implementation",
  None,
  "Backend to check; default the GPU kernel (rehearsal: xla).",
  allow_override=True,
)
_REHEARSE = flags.DEFINE_bool(
  "rehearse",
  False,
  "Tiny shapes on any device, with a stand-in: checks this program.",
  allow_override=True,
)
_ONLY = flags.DEFINE_string(
  "only", "", "Regular expression: only cases whose name it finds.", allow_override=True
)
_CONFIG = flags.DEFINE_string(
  "config",
  "",
  "Fields of kernels.block_sparse.tuning.TuningConfig to change for the attention kernels, e.g. take_turns=False,stages=2; "
  "the rows' names say so.",
  allow_override=True,
)
_MINUTES = flags.DEFINE_float(
  "minutes",
  8,
  "Stop by then; what was not checked is named, and the exit status is 1.",
  0,
  allow_override=True,
)


@dataclasses.dataclass(frozen=True)
class Case:
  """One call of the sweep.

  Attributes:
    name: of the row.
    b, h, n, d: samples, heads, rows, head dimension.
    block_q, block_kv: tiles.
    dtype: of q, k, v.
    keep: probability that a tile is listed; 0: dense mode, no lists.
    ragged: tiles hold random numbers of valid rows.
    empty: this share of query tiles lists nothing.
    per_batch, per_head: tables differ.
    bias: key tiles carry one.
    ordered: lists ascend, as tables must; False: the kernel's own tolerance of any order.
    keys: instead of `keep`: so many key rows per list, drawn as the benchmark does (large shapes).
    backward: check gradients.
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
  per_batch: bool = False
  per_head: bool = True
  bias: bool = False
  ordered: bool = True
  keys: int = 0
  backward: bool = True


_ODD = dict(b=2, ragged=True, empty=0.2, bias=True, per_batch=True)
CASES = (
  Case("plain"),
  Case("dense mode", keep=0.0),
  Case("dense mode, ragged", keep=0.0, ragged=True, d=64),
  Case("ragged, empty rows", ragged=True, empty=0.3),
  Case("per batch, per head, bias", **_ODD),
  Case("one table for all heads", b=2, per_head=False, ragged=True),
  Case("float16", dtype="float16", **_ODD),
  Case("d=64", d=64, **_ODD),
  Case("d=64, float16", d=64, dtype="float16", ragged=True),
  Case("64x64 tiles", block_q=64, block_kv=64, **_ODD),
  Case("64x64 tiles, d=64", d=64, block_q=64, block_kv=64, **_ODD),
  Case("64x128 tiles", block_q=64, block_kv=128, **_ODD),
  Case("128x64 tiles", block_q=128, block_kv=64, **_ODD),
  Case("128x64 tiles, odd counts", block_q=128, block_kv=64, keep=0.15, empty=0.3, ragged=True),
  Case("dense mode, 64x64 tiles, d=64", d=64, keep=0.0, block_q=64, block_kv=64, ragged=True),
  Case("lists in any order", ordered=False),
  Case("one tile", n=128, keep=1.0, h=1),
  Case("long lists", n=16384, keep=0.5, h=2),
)
# More than 2^31 elements in each of q, k, v: an int32 offset anywhere would show in the last heads and rows.
LARGE = (
  Case("1M tokens, 4K keys, 18 heads", n=1 << 20, h=18, keys=4096, backward=False),
  Case("1M tokens, 4K keys, 6 heads, gradients", n=1 << 20, h=6, keys=4096),
)
SEEDS = (0, 1, 2)
LINEAR = gpu_linear.CASES
AROUND = gpu_around.CASES


def tiny(case: Case) -> Case:
  """The same case at a size that a CPU checks in a second."""
  n = 512 if not case.keys else 2048
  return dataclasses.replace(
    case,
    n=min(case.n, n) // 8,
    h=min(case.h, 2),
    d=16,
    block_q=case.block_q // 8,
    block_kv=case.block_kv // 8,
    keys=case.keys // 64,
  )


def draw_mask(case: Case, seed: int) -> BlockMask:
  """A random table of the case."""
  rng = np.random.default_rng(seed)
  q_tiles, kv_tiles = case.n // case.block_q, case.n // case.block_kv
  lead = (case.b if case.per_batch else 1, case.h if case.per_head else 1)
  kv_len = np.full((case.b, kv_tiles) if case.per_batch else kv_tiles, case.block_kv, np.int32)
  if case.ragged:
    kv_len = rng.integers(0, case.block_kv + 1, kv_len.shape).astype(np.int32)
    kv_len[..., 0] = case.block_kv - 1
  if case.keys or not case.ordered:
    keep = case.keys // case.block_kv or max(1, kv_tiles // 2)
    ids = gpu_masks.random_ids(case.h, (q_tiles, kv_tiles), keep, seed, case.ordered)
    mask = BlockMask(
      ids, np.full(ids.shape[:3], keep, np.int32), kv_len, None, case.block_q, case.block_kv
    )
  elif case.keep == 0:
    mask = dataclasses.replace(
      dense_mask(case.n, case.n, case.block_q, case.block_kv), kv_len=kv_len
    )
  else:
    tiles = rng.random((*lead, q_tiles, kv_tiles)) < case.keep
    tiles[..., 0] |= ~tiles.any(-1)
    tiles &= rng.random((*lead, q_tiles, 1)) >= case.empty
    tiles[:, :, 0] &= case.empty == 0  # at least one
    mask = from_tiles(tiles, kv_len, case.block_q, case.block_kv)
    # Lists of equal length for every seed: one compilation each.
    longer = ((0, 0),) * 3 + ((0, kv_tiles - mask.max_kv),)
    mask = dataclasses.replace(mask, kv_indices=np.pad(mask.kv_indices, longer, mode="edge"))
  bias = rng.standard_normal(kv_tiles).astype(np.float32) if case.bias else None
  return dataclasses.replace(mask, kv_bias=bias)


@functools.partial(jax.jit, static_argnames="implementation")
def forward_backward(q, k, v, mask, d_out, d_lse, implementation):
  """out, lse, and dq, dk, dv for cotangents of both."""
  found, pullback = jax.vjp(lambda *a: attention(*a, mask, implementation=implementation), q, k, v)
  return found, pullback((d_out, d_lse))


@functools.partial(jax.jit, static_argnames="implementation")
def forward(q, k, v, mask, implementation):
  """out and lse."""
  return attention(q, k, v, mask, implementation=implementation)


def _inputs(case: Case, seed: int):
  keys = jax.random.split(jax.random.key(100 + seed), 5)
  shape = (case.b, case.n, case.h, case.d)
  count = 4 if case.backward else 3
  data = [jax.random.normal(key, shape, jnp.dtype(case.dtype)) for key in keys[:count]]
  return tuple(data), jax.random.normal(
    keys[4], (case.b, case.h, case.n)
  ) if case.backward else None


def check(case: Case, seed: int, implementation: str, count: int = 64) -> dict:
  """Runs one case.

  Returns:
    errors, and `correct`: all of them within tolerance.
  """
  mask, (data, d_lse) = draw_mask(case, seed), _inputs(case, seed)
  table = gpu_masks.on_device(mask)
  if not case.backward:
    found = forward(*data, table, implementation)
    return gpu_oracle.forward_error(data, mask, found, count, seed)
  *qkv, d_out = data
  valid = _valid_rows(mask, case.n)
  d_out, d_lse = jnp.where(valid[:, :, None, None], d_out, 0), jnp.where(valid[:, None], d_lse, 0)
  found, grads = forward_backward(*qkv, table, d_out, d_lse, implementation)
  return gpu_oracle.backward_error(tuple(qkv), mask, found, (d_out, d_lse), grads, count)


def _valid_rows(mask: BlockMask, n: int) -> np.ndarray:
  """bool `[1 or b, n]`: rows that are no padding; outputs of padding query rows mean nothing and get no cotangent."""
  lengths = np.atleast_2d(np.asarray(mask.kv_len))
  return (np.arange(mask.block_kv) < lengths[..., None]).reshape(len(lengths), n)


def check_padding_and_repeat(implementation: str, small: bool) -> dict:
  """Bit-equal valid results with 1e4 in the padding rows, and bit-equal results of a second run."""
  case = Case("padding", ragged=True, empty=0.1)
  case = tiny(case) if small else case
  mask, (data, d_lse) = draw_mask(case, 5), _inputs(case, 5)
  valid, table = _valid_rows(mask, case.n), gpu_masks.on_device(mask)

  def cut(x):
    return (
      jnp.where(valid[:, :, None, None], x, 0) if x.ndim == 4 else jnp.where(valid[:, None], x, 0)
    )

  *qkv, d_out = data

  def run(*a):
    return jax.tree.map(cut, forward_backward(*a, table, cut(d_out), cut(d_lse), implementation))

  clean, again = run(*qkv), run(*qkv)
  soiled = run(*(jnp.where(valid[:, :, None, None], x, jnp.asarray(1e4, x.dtype)) for x in qkv))

  def equal(a, b):
    return all(
      np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )

  padding, repeat = equal(clean, soiled), equal(clean, again)
  return {
    "padding_changes_nothing": padding,
    "two_runs_bit_equal": repeat,
    "correct": padding and repeat,
  }


def check_constant_table(implementation: str, small: bool) -> dict:
  """Checks a call whose table is a constant of the program, as where a method's table is static and closed over.

  The runtime of Mosaic kernels refuses arguments that are not aligned to 256 bytes ("Input buffer N is not 256-byte
  aligned"); the sizes here are no multiples of that, so that an array right behind another one would be refused.
  """
  case = _odd_sizes("constant table", small)
  mask, (data, d_lse) = draw_mask(case, 3), _inputs(case, 3)
  *qkv, d_out = data

  @jax.jit
  def run(q, k, v):
    return forward_backward(q, k, v, mask, d_out, d_lse, implementation)

  found, grads = run(*qkv)
  return gpu_oracle.backward_error(
    tuple(qkv), mask, found, (d_out, d_lse), grads, 8 if small else 64
  )


def check_sliced_in_scan(implementation: str, small: bool) -> dict:
  """Checks calls whose operands and tables are slices of stacked arrays, as in a scan over layers.

  A slice need not begin at a multiple of 256 bytes, see `check_constant_table`.
  """
  case = _odd_sizes("sliced in a scan", small)
  masks = [draw_mask(case, seed) for seed in (6, 7)]
  inputs = [_inputs(case, seed) for seed in (6, 7)]
  layers = jax.tree.map(
    lambda *x: jnp.stack(x),
    *((gpu_masks.on_device(m), *i) for m, i in zip(masks, inputs, strict=True)),
  )

  def layer(_, operands):
    mask, (q, k, v, d_out), d_lse = operands
    return None, forward_backward(q, k, v, mask, d_out, d_lse, implementation)

  _, results = jax.jit(lambda layers: jax.lax.scan(layer, None, layers))(layers)
  errors = []
  for i, (mask, (data, d_lse)) in enumerate(zip(masks, inputs, strict=True)):
    *qkv, d_out = data
    found, grads = jax.tree.map(lambda x, i=i: x[i], results)
    errors.append(
      gpu_oracle.backward_error(tuple(qkv), mask, found, (d_out, d_lse), grads, 8 if small else 64)
    )
  worst = {name: max(error[name] for error in errors) for name in errors[0] if name != "correct"}
  return worst | {"correct": all(error["correct"] for error in errors)}


def _odd_sizes(name: str, small: bool) -> Case:
  """A case whose table's arrays are no multiples of 256 bytes: 15 tiles, 3 heads."""
  if small:
    return Case(name, n=15 * 8, h=3, d=16, block_q=8, block_kv=8, keep=0.4, bias=True)
  return Case(name, n=15 * 128, h=3, d=64, keep=0.4, bias=True)


@dataclasses.dataclass(frozen=True)
class Job:
  """One case to run.

  Attributes:
    name: of the row, without "check: ".
    run: `(implementation) -> errors and "correct"`.
    case: the attention call at its full size, whose kernels `--config` changes; None for the other kernels.
  """

  name: str
  run: Callable[[str], dict]
  case: Case | None = None

  def keys(self) -> list[tuning.Key]:
    """The kernel configurations that the case looks up."""
    if self.case is None:
      return []
    directions = tuning.DIRECTIONS if self.case.backward else ("forward",)
    return [
      tuning.Key("h100", self.case.d, self.case.block_q, self.case.block_kv, way)
      for way in directions
    ]


def jobs(small: bool) -> list[Job]:
  """Every case, in order of value: each once, the large ones, then more seeds of what is compiled already.

  Args:
    small: tiny shapes.
  """

  def seeded(cases, seeds):
    size, count = (tiny, 8) if small else (lambda case: case, 64)
    for seed in seeds:
      for case in cases:
        run = functools.partial(check, size(case), seed, count=count)
        yield Job(
          f"{case.name}, seed {seed}",
          lambda implementation, run=run: run(implementation=implementation),
          case,
        )

  def other(name, module, case):
    case = module.tiny(case) if small else case
    return Job(name, lambda implementation: module.check(case, implementation))

  found = [
    Job(
      "padding and repeat",
      functools.partial(check_padding_and_repeat, small=small),
      Case("padding"),
    ),
    *seeded(CASES, SEEDS[:1]),
    Job(
      "constant table", functools.partial(check_constant_table, small=small), _odd_sizes("", False)
    ),
    Job(
      "sliced in a scan",
      functools.partial(check_sliced_in_scan, small=small),
      _odd_sizes("", False),
    ),
  ]
  found += [other(case.name, gpu_linear, case) for case in LINEAR]
  found += [other(case.name, gpu_around, case) for case in AROUND]
  found.append(Job("selection", functools.partial(gpu_selection.check, small)))
  found.append(Job("search", functools.partial(gpu_search.check, small)))
  return [*found, *seeded(LARGE, SEEDS[:1]), *seeded(CASES, SEEDS[1:])]


def selected(small: bool, only: str, config: str) -> tuple[list[Job], dict]:
  """Returns the jobs that `--only` finds and the configurations that `--config` gives their kernels.

  Raises:
    ValueError: if `only` finds none, if `config` is invalid, or if it names cases that have no configuration to change.
  """
  found = [job for job in jobs(small) if re.search(only, job.name)]
  if not found:
    raise ValueError(
      f"--only={only!r} finds no case; cases are {'; '.join(job.name for job in jobs(small))}."
    )
  fields = gpu_config.parse(config)
  if fixed := [job.name for job in found if fields and not job.keys()]:
    raise ValueError(
      f"--config changes attention's kernels only; leave out {'; '.join(fixed)} with --only."
    )
  return found, gpu_config.changed(
    fields, {key for job in found for key in job.keys()}
  ) if fields else {}


def sweep(
  store: Store, implementation: str, found: list[Job], deadline: Deadline, config: str = ""
) -> tuple[list, list]:
  """Runs cases one by one; a case that raises is not correct.

  Returns:
    the rows, and the names of the cases for which there was no time: these are unknown, not wrong, and have no row.
  """
  rows_found, unreached = [], []
  names = {job.name: job.name + (f" [{config}]" if config else "") for job in found}
  print("\n".join(f"wanted {name}" for name in names.values()), flush=True)
  for job in found:
    name = names[job.name]
    row = store.get(f"check: {name}")
    if row is None or not row["correct"]:
      if deadline.left <= 0:
        unreached.append(name)
        print(f"unreached {name}", flush=True)
        continue
      print(f"begin {name}", flush=True)
      try:
        result = job.run(implementation=implementation)
      except Exception as error:
        logging.exception("%s", name)
        result = {"correct": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
      gc.collect()
      configured = {"config": config} if config else {}
      row = store.add(
        {"name": f"check: {name}", "implementation": implementation} | configured | result
      )
    rows_found.append(row)
    print(line(row), flush=True)
  return rows_found, unreached


def line(row: dict) -> str:
  """One row for people."""
  errors = [
    f"{k.removeprefix('error_')} {row[k]:.1e}"
    for k in row
    if k.startswith("error_") and not k.endswith("_max")
  ]
  state = "ok   " if row["correct"] else "WRONG"
  return f"{state} {row['name'].removeprefix('check: '):<48}  {'  '.join(errors)}{row.get('error', '')[:160]}"


def run(
  out: str | None,
  implementation: str | None,
  rehearse: bool,
  minutes: float,
  only: str = "",
  config: str = "",
) -> bool:
  """Runs the cases asked for.

  Args:
    out: folder for rows; default `$OUT`, else benchmarks/results (refused for a rehearsal).
    implementation: backend; default the GPU kernel, for a rehearsal "xla".
    rehearse: tiny shapes.
    minutes: time limit.
    only: a regular expression that finds the cases by name.
    config: fields of the kernels' configuration to change.

  Returns:
    whether everything was reached and is right.

  Raises:
    ValueError: if a rehearsal would write among the measured rows, or `only` or `config` is invalid.
  """
  folder = pathlib.Path(out or os.environ.get("OUT") or rows.RESULTS)
  if rehearse and folder.resolve() == rows.RESULTS.resolve():
    raise ValueError(
      "a rehearsal checks no kernel: name a folder of its own with --out, not benchmarks/results."
    )
  found, configs = selected(rehearse, only, config)
  kind = "rehearsal" if rehearse else device_slug(jax.devices()[0].device_kind)
  command = (
    "python -m benchmarks.gpu.check"
    + (" --rehearse" if rehearse else "")
    + (f" --config={config}" if config else "")
  )
  store = Store.open(folder, f"gpu_check_{kind}", command, rehearse)
  implementation = implementation or ("xla" if rehearse else "pallas_mgpu")
  # One configuration for the whole process: traces are cached without it.
  with tuning.override(configs):
    checked, unreached = sweep(store, implementation, found, Deadline(60 * minutes), config)
  wrong = [row["name"] for row in checked if not row["correct"]]
  print(
    f"{len(checked) - len(wrong)} of {len(checked) + len(unreached)} right"
    + (f"; wrong: {', '.join(wrong)}" if wrong else "")
    + (f"; no time for: {', '.join(unreached)}" if unreached else "")
  )
  print(f"rows: {store.path}")
  return not wrong and not unreached


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  open_device(_REHEARSE.value)
  right = run(
    _OUT.value, _IMPLEMENTATION.value, _REHEARSE.value, _MINUTES.value, _ONLY.value, _CONFIG.value
  )
  sys.exit(0 if right else 1)


if __name__ == "__main__":
  app.run(main)
