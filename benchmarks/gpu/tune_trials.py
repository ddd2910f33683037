"""One key of the search over kernel configurations: candidates that fit, are right, are fastest."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse.api import ATTENTION, attention
from freqformer.kernels.block_sparse.table import BlockMask, TransposedMask

from benchmarks.arg_specs import AttentionSpec
from benchmarks.gpu import masks, oracle
from benchmarks.gpu.device import Deadline
from benchmarks.gpu.timing import Call, Effort, measure
from benchmarks.gpu.tune_subjects import Subject
from tools import offline

# choice: a configuration must be faster than the default by more than this share of its time.
MARGIN = 0.01
# choice: both round to bf16, which are two roundings of 2^-8 at most.
_TOLERANCE = 2**-7
# Enough work to fill the device many times; lists so long that the pipeline's depth shows, and so
# short that its fill does.
_GRID = (16, 64, 64)
_HEADS = 12
_DENSITY = 0.1


@dataclasses.dataclass(frozen=True)
class Trial:
  """One candidate and its fate; None where nothing was compiled or ran.

  Attributes:
    config: of the subject's.
    refused: why it is out; "" if it is not.
    registers: per thread of its kernel.
    shared_bytes: of a thread block of its kernel.
    final: among the best, timed again in turns.
    error: relative error against XLA's.
  """

  config: Any
  refused: str = ""
  registers: int | None = None
  shared_bytes: int | None = None
  seconds: float | None = None
  final: bool = False
  error: float | None = None


@dataclasses.dataclass(frozen=True)
class Budget:
  """The time that a search may take.

  Attributes:
    brief: for every candidate that is right.
    full: for the `finalists` best and the default, in turns.
  """

  deadline: Deadline
  brief: Effort = Effort(samples=5, slow_samples=3, chain_s=0.01, turns=1)
  full: Effort = Effort()
  finalists: int = 4


def run(direction: str, implementation: str, q, rest, mask):
  """Runs one direction by the implementation itself; XLA drops the kernels of the others.

  Args:
    direction: of `kernels.block_sparse.tuning_table.DIRECTIONS`.
    implementation: an implementation's name.
    q: apart from `rest`, because a timed chain goes through its first argument.
    rest: k, v, d_out `[b, n, h, d]` and lse, delta `[b, h, n]`, residuals of the backward.
    mask: the table.

  Returns:
    out and LSE, dQ, or dK and dV.
  """
  k, v, d_out, lse, delta = rest
  scale = 1 / math.sqrt(q.shape[-1])
  if direction == "forward":
    return ATTENTION.module(implementation).forward(q, k, v, mask, scale=scale)
  backward = ATTENTION.module(implementation).backward
  dq, dk, dv = backward(q, k, v, mask, lse, delta, d_out, scale=scale)
  return dq if direction == "dq" else (dk, dv)


def compile_kernel(subject: Subject, key, config) -> offline.KernelResources:
  """Compiles the kernel of a key for the device, present or not."""
  n = 4096
  heads = 2
  listed = 4  # tiles of a list

  def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  q_tiles = n // key.block_q
  kv_tiles = n // key.block_kv
  x = jax.ShapeDtypeStruct((1, n, heads, key.head_dim), jnp.bfloat16)
  row = jax.ShapeDtypeStruct((1, heads, n), jnp.float32)
  transposed = TransposedMask(ints(1, heads, q_tiles * listed), ints(1, heads, kv_tiles + 1))
  mask = BlockMask(
    ints(1, heads, q_tiles, listed),
    ints(1, heads, q_tiles),
    ints(kv_tiles),
    None,
    key.block_q,
    key.block_kv,
    transposed,
  )
  with subject.tuning.override({key: config}):
    call = functools.partial(run, key.direction, subject.implementation)
    args = (call, x, (x, x, x, row, row), mask)
    device = subject.targets[key.device]
    if subject.implementation == "triton":  # the program around it need not be compiled
      found = offline.triton_resources(offline.lower_for(*args, device=device))
    else:
      found = offline.compile_for(*args, device=device).kernels
  (own,) = [kernel for kernel in found if key.direction in kernel.name]
  return own


def compile_candidate(subject: Subject, key, config) -> Trial:
  """Compiles for the device, present or not, and refuses what spills or does not fit."""
  try:
    own = compile_kernel(subject, key, config)
  except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
    return Trial(config, f"does not compile: {str(error)[:200]}")
  found = Trial(config, "", own.registers, own.shared_bytes)
  if spilled := own.spill_stores + own.spill_loads:
    return dataclasses.replace(found, refused=f"spills {spilled} bytes per thread")
  limit = subject.shared_bytes[key.device]
  if own.shared_bytes > limit:
    words = f"{own.shared_bytes} bytes of shared memory, the limit is {limit}"
    return dataclasses.replace(found, refused=words)
  return found


def time_candidates(
  subject: Subject,
  key,
  trials: list[Trial],
  implementation: str,
  budget: Budget,
  grid: tuple[int, int, int] = _GRID,
) -> list[Trial]:
  """Checks each remaining candidate against XLA's and times those that are right.

  All are timed briefly on random lists; the best ones and the default again, in turns.
  """
  block = max(key.block_q, key.block_kv)
  spec = AttentionSpec("tune", grid, _HEADS, key.head_dim, keys=block, block=block)
  problem = masks.rectangular(spec, key.block_q, key.block_kv, _DENSITY)
  q, k, v, d_out = problem.inputs(4)
  mask = masks.on_device(problem.mask.with_transpose())
  out, lse = jax.jit(lambda *a: attention(*a, implementation="xla"))(q, k, v, mask)
  delta = jnp.einsum("bnhd,bnhd->bhn", d_out.astype(jnp.float32), out.astype(jnp.float32))
  args = (q, (k, v, d_out, lse, delta), mask)
  want = jax.jit(functools.partial(run, key.direction, "xla"))(*args)
  found = []
  calls = {}
  for i, trial in enumerate(trials):
    if not trial.refused and budget.deadline.left <= 0:
      trial = dataclasses.replace(trial, refused="not reached in time")
    elif not trial.refused:
      call = _call(subject, key, trial.config, implementation, args)
      trial = checked(trial, call, want)
      if not trial.refused:
        calls[i] = call
        seconds = measure({"it": call}, budget.brief)["it"].seconds
        trial = dataclasses.replace(trial, seconds=seconds)
    found.append(trial)
  finals = sorted(calls, key=lambda i: found[i].seconds)[: budget.finalists]
  defaults = [i for i in calls if trials[i].config == subject.tuning.default(key)]
  again = {i: calls[i] for i in dict.fromkeys([*finals, *defaults])}
  for i, measured in measure(again, budget.full).items():
    found[i] = dataclasses.replace(found[i], seconds=measured.seconds, final=True)
  return found


def _call(subject: Subject, key, config, implementation: str, args: tuple) -> Call:
  """Returns the call of one candidate."""

  # A function of its own: jit would otherwise give back what the last candidate traced.
  def candidate(*args):
    with subject.tuning.override({key: config}):
      return run(key.direction, implementation, *args)

  return Call(candidate, args)


def checked(trial: Trial, call: Call, want) -> Trial:
  """Returns the trial with its error, refused if it is wrong or does not run."""
  try:
    found = call()
  except Exception as error:
    reason = f"does not run: {type(error).__name__}: {str(error)[:200]}"
    return dataclasses.replace(trial, refused=reason)
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
  worst = max(oracle.relative_error(got, exact) for got, exact in pairs)
  wrong = not worst < _TOLERANCE  # a NaN is not below it
  reason = f"wrong: relative error {worst:.2g} against XLA's" if wrong else ""
  return dataclasses.replace(trial, error=worst, refused=reason)


def choose(subject: Subject, key, trials: list[Trial]):
  """Returns the fastest finalist; None if nothing was timed.

  The default stays unless another is faster by more than the margin.
  """
  timed = [trial for trial in trials if trial.final]
  if not timed:
    return None
  best = min(timed, key=lambda trial: trial.seconds)
  default = next((trial for trial in timed if trial.config == subject.tuning.default(key)), None)
  if default is not None and best.seconds > default.seconds * (1 - MARGIN):
    return default.config
  return best.config
