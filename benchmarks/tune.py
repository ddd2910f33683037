"""Searches the kernels' configurations on this device and writes `kernels/tuning.json`.

  python -m benchmarks.tune --minutes=10        # on the GPU
  python -m benchmarks.tune --static            # anywhere: which candidates fit; prints and stores a report, writes no table

Per key (head dimension, tile sizes, direction): candidates -> those that compile for the device without spilling and within
shared memory -> those that agree with the XLA backend -> the fastest. The default is always a candidate, and another one is
taken only where it is faster by more than `_MARGIN`: below that, noise would write the table.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from benchmarks import gpu_masks, gpu_oracle, rows
from benchmarks.arg_specs import AttentionSpec
from benchmarks.gpu_rows import Deadline, Store, kernels_digest, open_device
from benchmarks.gpu_timing import Call, Effort, measure
from kernels import offline, tuning
from kernels.attention import attention, backend
from kernels.block_mask import TransposedMask
from kernels.tuning import DIRECTIONS, Key, TuningConfig

_MINUTES = flags.DEFINE_float("minutes", 10, "Stop by then; keys not reached keep what they have.", 0)
_STATIC = flags.DEFINE_bool("static", False, "Only compile (no GPU needed) and report; no table is written.")
_OUT = flags.DEFINE_string("out", None, "Folder for the report's rows; default $OUT, else benchmarks/results.")
_KEYS = flags.DEFINE_list("keys", None, "Only these keys, as head_dim:block_q:block_kv:direction; default all.")

_MARGIN = 0.01
HEAD_DIMS, BLOCKS = (128, 64), (128, 64)
# Enough work to fill the device many times; long enough lists that the pipeline's depth shows, short enough that its fill does.
_SHAPE = dict(grid=(16, 64, 64), heads=12, dtype="bfloat16")
_DENSITY = 0.1


def all_keys(device: str) -> list[Key]:
  """Every key that the kernels look up, the most used first."""
  return [Key(device, d, q, kv, way) for d, q, kv, way in itertools.product(HEAD_DIMS, BLOCKS, BLOCKS, DIRECTIONS)]


def parse_key(text: str, device: str) -> Key:
  """`128:128:64:dq`.

  Raises:
    ValueError: if it is not of that form.
  """
  try:
    d, q, kv, direction = text.split(":")
    return Key(device, int(d), int(q), int(kv), direction)
  except ValueError as error:
    raise ValueError(f"--keys={text!r} must be head_dim:block_q:block_kv:direction, e.g. 128:128:128:forward.") from error


# ---- one key -------------------------------------------------------------------------------------------------------------


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


def run(direction: str, implementation: str, q, k, v, d_out, lse, delta, mask):
  """What a direction computes, by the backend itself: out and LSE, dQ, or dK and dV; XLA drops the kernels of the others.

  Args:
    direction: of `kernels.tuning.DIRECTIONS`.
    implementation: a backend's name.
    q, k, v, d_out: `[b, n, h, d]`; lse, delta: `[b, h, n]`, residuals of the backward.
    mask: the table.
  """
  scale = 1 / math.sqrt(q.shape[-1])
  if direction == "forward":
    return backend(implementation).forward(q, k, v, mask, scale)
  dq, dk, dv = backend(implementation).backward(q, k, v, mask, scale, lse, delta, d_out)
  return dq if direction == "dq" else (dk, dv)


def compile_candidate(key: Key, config: TuningConfig) -> Trial:
  """Compiles for the device, present or not, and refuses what spills or does not fit."""
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
      n // key.block_q,
      4,
    ),
  )
  try:
    with tuning.override({key: config}):
      compiled = offline.compile_for(
        functools.partial(run, key.direction, "pallas_mgpu"), x, x, x, x, row, row, mask, device=key.device
      )
  except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
    return Trial(config, f"does not compile: {str(error)[:200]}")
  (own,) = [kernel for kernel in compiled.kernels if key.direction in kernel.name]
  found = Trial(config, "", own.registers, own.shared_bytes)
  if spilled := own.spill_stores + own.spill_loads:
    return dataclasses.replace(found, refused=f"spills {spilled} bytes per thread")
  if own.shared_bytes > offline.SHARED_LIMIT:
    return dataclasses.replace(found, refused=f"{own.shared_bytes} bytes of shared memory, the limit is {offline.SHARED_LIMIT}")
  return found


def time_candidates(key: Key, trials: list[Trial], implementation: str, budget: Budget, grid=None) -> list[Trial]:
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
  args = (q, k, v, d_out, lse, delta, mask)
  want = jax.jit(functools.partial(run, key.direction, "xla"))(*args)
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
      return run(key.direction, implementation, *args)

  call = Call(candidate, args)
  try:
    found = call()
  except Exception as error:
    return dataclasses.replace(trial, refused=f"does not run: {type(error).__name__}: {str(error)[:200]}"), None
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
  worst = max(gpu_oracle.Error.of(got, exact).relative for got, exact in pairs)
  trial = dataclasses.replace(trial, error=worst)
  # Both round to bf16: two roundings apart at most, 2^-8 each; NaN is not below it.
  if not worst < 2**-7:
    return dataclasses.replace(trial, refused=f"wrong: relative error {worst:.2g} against the XLA backend"), None
  return trial, call


def choose(key: Key, trials: list[Trial]) -> TuningConfig | None:
  """The fastest finalist; the default unless another is faster by more than the margin. None if nothing was timed."""
  timed = [t for t in trials if t.final]
  if not timed:
    return None
  best = min(timed, key=lambda t: t.seconds)
  default = next((t for t in timed if t.config == tuning.default(key)), None)
  return default.config if default and best.seconds > default.seconds * (1 - _MARGIN) else best.config


# ---- the search ----------------------------------------------------------------------------------------------------------


def search(keys: list[Key], store: Store, budget: Budget, static: bool) -> dict[Key, TuningConfig]:
  """Goes through the keys, a row of trials each.

  Returns:
    what was chosen, for the keys that were timed.
  """
  chosen = {}
  for key in keys:
    if budget.deadline.left <= 0:
      logging.warning("no time left for %s and what follows", key)
      break
    trials = _known_trials(key) or _compiled(key, static)
    if not static:
      trials = time_candidates(key, trials, "pallas_mgpu", budget)
      if (best := choose(key, trials)) is not None:
        chosen[key] = best
    row = {
      "name": row_name(key),
      "key": vars(key),
      "static": static,
      "kernels": kernels_digest(),
      "trials": [t.row() for t in trials],
    }
    store.add(row | {"chosen": vars(chosen[key]) if key in chosen else None})
    print(report(key, trials, chosen.get(key)), flush=True)
  return chosen


def _compiled(key: Key, static: bool) -> list[Trial]:
  """Every candidate after the compiler; on a device, running them decides if compiling ahead of time does not work there."""
  configs = tuning.candidates(key)
  try:
    trials = [compile_candidate(key, config) for config in configs]
  except RuntimeError as error:
    if static:
      raise
    logging.warning("no compiling ahead of time here, candidates are judged by running them: %s", error)
    return [Trial(config) for config in configs]
  if not static and all(trial.refused.startswith("does not compile") for trial in trials):
    logging.warning("no candidate of %s compiles ahead of time (%s); trying them on the device", key, trials[0].refused)
    return [Trial(config) for config in configs]
  return trials


def row_name(key: Key) -> str:
  return f"tune: d={key.head_dim} {key.block_q}x{key.block_kv} {key.direction}"


def _known_trials(key: Key) -> list[Trial]:
  """What `--static` found for the same kernels: compiling forty candidates again would cost a minute per key on the GPU."""
  for row in rows.read_rows(rows.RESULTS / "tuning_static.json"):
    if row["name"] == row_name(key) and row["kernels"] == kernels_digest():
      return [Trial(TuningConfig(**t["config"]), t["refused"], t["registers"], t["shared_bytes"]) for t in row["trials"]]
  return []


def report(key: Key, trials: list[Trial], chosen: TuningConfig | None) -> str:
  """One key for people."""
  fit = [t for t in trials if not t.refused]
  lines = [f"d={key.head_dim} {key.block_q}x{key.block_kv} {key.direction}: {len(fit)} of {len(trials)} candidates fit"]
  for t in sorted(trials, key=lambda t: (bool(t.refused), t.seconds or 0.0)):
    time = f"{1e3 * t.seconds:.3f} ms" if t.seconds else t.refused or "not timed"
    mark = "*" if t.config == chosen else " "
    fields = " ".join(f"{k}={v}" for k, v in vars(t.config).items())
    lines.append(f"  {mark} {fields:<86} {t.registers or '-':>4} registers  {time}")
  return "\n".join(lines)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  static = _STATIC.value
  open_device(static)
  device = "h100"  # the one that configurations are keyed by; other Hopper cards share its resources
  keys = [parse_key(text, device) for text in _KEYS.value or ()] or all_keys(device)
  folder = pathlib.Path(_OUT.value or os.environ.get("OUT") or rows.RESULTS)
  command = "python -m benchmarks.tune" + (" --static" if static else "")
  store = Store.open(folder, "tuning_static" if static else "tuning", command)
  chosen = search(keys, store, Budget(Deadline(60 * _MINUTES.value)), static)
  print(f"report: {store.path}")
  if static:
    print("static: nothing was timed, kernels/tuning.json is unchanged")
  elif chosen:
    facts = {k: store.context[k] for k in ("command", "device", "jax", "jaxlib", "commit", "date")}
    tuning.write(committed() | chosen, facts, tuning.TABLE)
    print(f"wrote {len(chosen)} new configurations to {tuning.TABLE}; commit it")
  else:
    sys.exit("nothing was timed: kernels/tuning.json is unchanged")


def committed() -> dict[Key, TuningConfig]:
  """The table as it is: what this run does not reach stays."""
  if not tuning.TABLE.exists():
    return {}
  found = json.loads(tuning.TABLE.read_text())["configs"]
  return {Key(**row["key"]): TuningConfig(**row["config"]) for row in found}


if __name__ == "__main__":
  app.run(main)
