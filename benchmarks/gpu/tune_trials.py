"""One key of the search over kernel configurations: which candidates fit, which are right, which is fastest."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse import tuning
from freqformer.kernels.block_sparse.api import ATTENTION, attention
from freqformer.kernels.block_sparse.table import TransposedMask
from freqformer.kernels.block_sparse.tuning import Key, TuningConfig

from benchmarks.arg_specs import AttentionSpec
from benchmarks.gpu import masks as gpu_masks
from benchmarks.gpu import oracle as gpu_oracle
from benchmarks.gpu.rows import Deadline
from benchmarks.gpu.timing import Call, Effort, measure
from tools import offline

MARGIN = 0.01
# Enough work to fill the device many times; long enough lists that the pipeline's depth shows, short enough that its fill does.
_SHAPE = dict(grid=(16, 64, 64), heads=12, dtype="bfloat16")
_DENSITY = 0.1


@dataclasses.dataclass(frozen=True)
class Trial:
  """What became of one candidate.

  Attributes:
    config: the candidate.
    refused: why it is out; "" if it is not.
    registers, shared_bytes: of its kernel.
    seconds: measured; None where nothing was.
    final: among the best, timed again in turns.
    error: relative error against the XLA backend; None where nothing ran.
  """

  config: TuningConfig
  refused: str = ""
  registers: int | None = None
  shared_bytes: int | None = None
  seconds: float | None = None
  final: bool = False
  error: float | None = None

  def row(self) -> dict:
    return {"config": vars(self.config)} | {k: v for k, v in vars(self).items() if k != "config"}


@dataclasses.dataclass(frozen=True)
class Budget:
  """Of a search.

  Attributes:
    deadline: nothing is begun after it.
    brief: for every candidate that is right.
    full: for the `finalists` best and the default, in turns.
  """

  deadline: Deadline
  brief: Effort = Effort(samples=5, slow_samples=3, chain_s=0.01, turns=1)
  full: Effort = Effort()
  finalists: int = 4


def problem_of(key: Key, grid: tuple[int, int, int] | None = None) -> gpu_masks.Problem:
  """The call on which a key is tuned: random lists at 64K tokens, 12 heads."""
  shape = _SHAPE | ({"grid": grid} if grid else {})
  block = max(key.block_q, key.block_kv)
  spec = AttentionSpec("tune", head_dim=key.head_dim, keys=block, block=block, **shape)
  return gpu_masks.rectangular(spec, key.block_q, key.block_kv, _DENSITY)


def run(direction: str, implementation: str, data, mask):
  """What a direction computes, by the backend itself: out and LSE, dQ, or dK and dV; XLA drops the kernels of the others.

  Args:
    direction: of `kernels.block_sparse.tuning.DIRECTIONS`.
    implementation: a backend's name.
    data: q, k, v, d_out `[b, n, h, d]` and lse, delta `[b, h, n]`, residuals of the backward.
    mask: the table.
  """
  q, k, v, d_out, lse, delta = data
  scale = 1 / math.sqrt(q.shape[-1])
  if direction == "forward":
    return ATTENTION.module(implementation).forward(q, k, v, mask, scale=scale)
  backward = ATTENTION.module(implementation).backward
  dq, dk, dv = backward(q, k, v, mask, lse, delta, d_out, scale=scale)
  return dq if direction == "dq" else (dk, dv)


def _run(direction, implementation, q, rest, mask):
  """The same with q apart: a timed chain goes through its first argument."""
  return run(direction, implementation, (q, *rest), mask)


def compile_kernel(key: Key, config: TuningConfig) -> offline.KernelResources:
  """Compiles the kernel of a key for the device, present or not."""
  n, heads = 4096, 2
  x = jax.ShapeDtypeStruct((1, n, heads, key.head_dim), jnp.bfloat16)
  row = jax.ShapeDtypeStruct((1, heads, n), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, heads, n // key.block_q, 4), jnp.int32)
  mask = gpu_masks.BlockMask(
    ids,
    jax.ShapeDtypeStruct(ids.shape[:3], jnp.int32),
    jax.ShapeDtypeStruct((n // key.block_kv,), jnp.int32),
    None,
    key.block_q,
    key.block_kv,
    TransposedMask(
      jax.ShapeDtypeStruct((1, heads, n // key.block_q * 4), jnp.int32),
      jax.ShapeDtypeStruct((1, heads, n // key.block_kv + 1), jnp.int32),
    ),
  )
  with tuning.override({key: config}):
    call = functools.partial(run, key.direction, "pallas_mgpu")
    compiled = offline.compile_for(call, (x, x, x, x, row, row), mask, device=key.device)
  (own,) = [kernel for kernel in compiled.kernels if key.direction in kernel.name]
  return own


def compile_candidate(key: Key, config: TuningConfig) -> Trial:
  """Compiles for the device, present or not, and refuses what spills or does not fit."""
  try:
    own = compile_kernel(key, config)
  except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
    return Trial(config, f"does not compile: {str(error)[:200]}")
  found = Trial(config, "", own.registers, own.shared_bytes)
  if spilled := own.spill_stores + own.spill_loads:
    return dataclasses.replace(found, refused=f"spills {spilled} bytes per thread")
  if own.shared_bytes > offline.SHARED_LIMIT:
    return dataclasses.replace(
      found,
      refused=f"{own.shared_bytes} bytes of shared memory, the limit is {offline.SHARED_LIMIT}",
    )
  return found


def time_candidates(
  key: Key, trials: list[Trial], implementation: str, budget: Budget, grid=None
) -> list[Trial]:
  """Checks each remaining candidate against the XLA backend and times the right ones: all briefly, the best again, in turns.

  Args:
    key, trials: what `compile_candidate` left.
    implementation: a backend's name.
    budget: of time.
    grid: tokens per axis; default 64K in all.
  """
  problem = problem_of(key, grid)
  q, k, v, d_out = problem.inputs(4)
  mask = gpu_masks.on_device(problem.mask.with_transpose())
  out, lse = jax.jit(lambda *a: attention(*a, implementation="xla"))(q, k, v, mask)
  delta = jnp.einsum("bnhd,bnhd->bhn", d_out.astype(jnp.float32), out.astype(jnp.float32))
  args = (q, (k, v, d_out, lse, delta), mask)
  want = jax.jit(functools.partial(_run, key.direction, "xla"))(*args)
  checked, calls, times = [], {}, {}
  for i, trial in enumerate(trials):
    if not trial.refused and budget.deadline.left <= 0:
      trial = dataclasses.replace(trial, refused="not reached in time")
    elif not trial.refused:
      trial, call = _checked(key, trial, implementation, args, want)
      if call:
        calls[i], times[i] = call, measure({"it": call}, budget.brief)["it"].seconds
    checked.append(trial)
  finals = sorted(times, key=times.get)[: budget.finalists]
  finals += [i for i in times if trials[i].config == tuning.default(key) and i not in finals]
  times |= {i: t.seconds for i, t in measure({i: calls[i] for i in finals}, budget.full).items()}
  found = [dataclasses.replace(t, seconds=times.get(i)) for i, t in enumerate(checked)]
  return [dataclasses.replace(t, final=i in finals) for i, t in enumerate(found)]


def _checked(key, trial, implementation, args, want):
  """The trial with its error, and its call if it is right."""

  # A function of its own: jit would otherwise give back what the last candidate traced.
  def candidate(*args):
    with tuning.override({key: trial.config}):
      return _run(key.direction, implementation, *args)

  call = Call(candidate, args)
  try:
    found = call()
  except Exception as error:
    return dataclasses.replace(
      trial, refused=f"does not run: {type(error).__name__}: {str(error)[:200]}"
    ), None
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
  worst = max(gpu_oracle.Error.of(got, exact).relative for got, exact in pairs)
  trial = dataclasses.replace(trial, error=worst)
  # Both round to bf16: two roundings apart at most, 2^-8 each; NaN is not below it.
  if not worst < 2**-7:
    return dataclasses.replace(
      trial, refused=f"wrong: relative error {worst:.2g} against the XLA backend"
    ), None
  return trial, call


def choose(key: Key, trials: list[Trial]) -> TuningConfig | None:
  """The fastest finalist; the default unless another is faster by more than the margin. None if nothing was timed."""
  timed = [t for t in trials if t.final]
  if not timed:
    return None
  best = min(timed, key=lambda t: t.seconds)
  default = next((t for t in timed if t.config == tuning.default(key)), None)
  return (
    default.config if default and best.seconds > default.seconds * (1 - MARGIN) else best.config
  )
