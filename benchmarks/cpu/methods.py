"""Attention of every sparse method against the dense mode of the same backend, on the same machine in the same run.

  python -m benchmarks.cpu.methods            # about 3 minutes on 2 idle CPU cores; rows go to results/methods_cpu.json
  python -m benchmarks.cpu.methods --quick    # a small shape, no rows

A row's value is what is retained of the ideal: speed-up over the dense mode times density, 1 where time falls as pairs do. All
attention calls of a layer count, the pooled one of block_topk too. Beside it stands the same by CPU time of all threads. What
else a method does between its projections (selection, search, compression, linear heads) is timed apart, for every phase of a
sampling run. Where a method has linear heads, a second row takes both ops together and counts linear attention by its FLOPs:
the time that the dense mode would take for as many FLOPs, over the time of both. Inputs are random, so selections are
arbitrary, their number is not.
"""

import contextlib
import dataclasses
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx
from freqformer.kernels.block_sparse.table import dense_mask
from freqformer.kernels.linear.api import linear_attention

from benchmarks import rows, timing
from benchmarks.arg_specs import SPECS, AttentionSpec
from benchmarks.cpu.competitors import call, sparse
from benchmarks.layer import projected
from freqformer.cost import attention_cost
from freqformer.methods.base import Cond, Dims
from freqformer.methods.registry import METHODS, method_class, parse_method, with_fields

_QUICK = flags.DEFINE_bool(
  "quick", False, "A small shape and few repeats; writes no rows.", allow_override=True
)

# At densities of 0.05 to 0.25 on the 128 tiles of cpu_16k; no router, so that a head's branch is known.
SETTINGS = (
  "freqformer(allocation=(1, 1, 2), mid_tiles=8, window=(2, 3, 3))",
  "sliding_tile(window=(12, 12, 16))",
  "radial(decay=0.25, sink=0)",
  "block_topk(density=0.1)",
  "spatial_temporal(frames=0, places=1, sink=0)",
  "sparse_linear(critical=0.05)",
  "sparseflow(allocation=(2, 2), schedule=dict(frames=(3, 3)), anchors=0)",
  "adaspa(sparsity=0.9)",
)
STEPS = 50  # of the sampling run whose phases are looked at
_COND_DIM = 8
_BUSY = 0.3  # share of the machine's time in others' hands above which wall times say little


@dataclasses.dataclass(frozen=True)
class Calls:
  """Attention calls that a method made at one phase, with their inputs: functions without arguments, ready to be timed."""

  around: object  # the method with its attention and linear attention taken out; what they would have got is computed
  attention: object
  linear: object  # None where there is none
  linear_flops: float
  density: float  # of the attention calls, over heads
  state: object


@contextlib.contextmanager
def _taken_out(found: dict):
  """Replaces both ops in every method's module: their inputs go to `found`, their outputs are stand-ins."""

  def attention(q, k, v, mask=None, **_):
    found["attention"].append(
      (q, k, v, dense_mask(q.shape[1], k.shape[1]) if mask is None else mask)
    )
    return v[:, : q.shape[1]], jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)

  def linear(q, k, v, segments, *, feature_map, implementation=None, **arrays):
    found["linear"].append((q, k, v, segments, arrays))
    found["feature_map"] = feature_map
    return v, None

  with contextlib.ExitStack() as stack:
    for module in [m for name, m in sys.modules.items() if name.startswith("freqformer.methods.")]:
      for name, stand_in in (("attention", attention), ("linear_attention", linear)):
        if callable(getattr(module, name, None)):
          stack.enter_context(mock.patch.object(module, name, stand_in))
    yield


def calls_of(method, spec: AttentionSpec, phase: str, state) -> Calls:
  """What one layer does at a phase, between its projections: QK-norm and rotary included."""
  layout, (q, k, v) = spec.layout, spec.inputs()
  graphdef, params = nnx.split(
    method.build(Dims(spec.heads, spec.head_dim, _COND_DIM), layout, nnx.Rngs(0))
  )
  found = {}

  def around(params, q, k, v, arrays, tables, state):
    found.update(attention=[], linear=[])
    cond = Cond(jnp.full(q.shape[0], 0.5), jnp.zeros((q.shape[0], _COND_DIM)), phase=phase)
    with _taken_out(found):
      qkv = projected(jnp.stack([q, k, v], 2), arrays)
      out, state, _ = method(nnx.merge(graphdef, params), qkv, cond, tables, state)
    return found["attention"], found["linear"], state, out

  taken = call(around, params, q, k, v, layout.arrays(), method.tables(layout), state)
  attentions, linears, state, _ = taken()
  # A call may take some of the heads only.
  pairs = sum(
    float(np.broadcast_to(mask.density(layout.n), (1, q.shape[2])).sum())
    for q, _, _, mask in attentions
  )

  def linear(inputs):
    return [linear_attention(*x[:-1], feature_map=found["feature_map"], **x[-1]) for x in inputs]

  return Calls(
    taken,
    call(lambda inputs: [sparse(*x) for x in inputs], attentions),
    call(linear, linears) if linears else None,
    sum(linear_flops(*inputs) for inputs in linears),
    pairs / spec.heads,
    state,
  )


def linear_flops(q, k, v, segments, arrays) -> float:
  """`4 n d (d + 1)` per head, and where segments read sums of others, `2 segments^2 d (d + 1)` to add them up."""
  (b, n, h, d), segments = q.shape, segments.length.shape[-1]
  return b * h * d * (d + 1) * (4.0 * n + 2.0 * segments**2 * ("reads" in arrays))


def measure_method(text: str, spec: AttentionSpec, rounds: int) -> list[dict]:
  """Rows of one method: what its usual step retains, and where it has linear heads, the same with them."""
  name, fields = parse_method(text)
  method, layout = with_fields(method_class(name)(), fields, name), spec.layout
  state, phases = method.init_state(1, Dims(spec.heads, spec.head_dim, _COND_DIM), layout), {}
  for phase in [method.phase(step, STEPS) for step in range(STEPS)]:
    if phase not in phases:
      phases[phase] = calls_of(method, spec, phase, state)
      state = phases[phase].state
  usual = phases[method.phase(STEPS - 1, STEPS)]  # what most steps do
  q, k, v = spec.inputs()
  everything = dense_mask(q.shape[1], q.shape[1], spec.block, spec.block)
  timed = {"dense_mode": call(sparse, q, k, v, everything), "attention": usual.attention}
  timed |= {f"around_{phase or 'attention'}": calls.around for phase, calls in phases.items()}
  if usual.linear is not None:
    timed["linear"] = usual.linear
  t = timing.interleave(timed, rounds)
  speedup = t["dense_mode"].median / t["attention"].median
  by_cpu = cpu_seconds(timed["dense_mode"], rounds) / cpu_seconds(timed["attention"], rounds)
  found = [
    rows.goal_row(
      f"{name}_vs_dense_mode_{spec.name}",
      speedup * usual.density,
      ">= 0.6",
      unit="",
      method=text,
      density=usual.density,
      speedup=speedup,
      retained_by_cpu_time=by_cpu * usual.density,
      **{what: taken.row() for what, taken in t.items()},
    )
  ]
  if usual.linear is not None:
    dense_flops = attention_cost(spec.heads * layout.n_buffer**2, spec.head_dim).attention_flops
    both, share = (
      t["attention"].median + t["linear"].median,
      usual.density + usual.linear_flops / dense_flops,
    )
    spent = {
      part: cpu_seconds(timed[part], rounds) for part in ("dense_mode", "attention", "linear")
    }
    fields = dict(
      method=text,
      density=usual.density,
      linear_flops_over_dense=usual.linear_flops / dense_flops,
      speedup=t["dense_mode"].median / both,
      retained_by_cpu_time=spent["dense_mode"] / (spent["attention"] + spent["linear"]) * share,
      linear_gflops=usual.linear_flops / t["linear"].median / 1e9,
      dense_mode_gflops=dense_flops / t["dense_mode"].median / 1e9,
      linear=t["linear"].row(),
    )
    name = f"{name}_with_linear_vs_dense_mode_{spec.name}"
    found.append(rows.goal_row(name, fields["speedup"] * share, ">= 0.6", unit="", **fields))
  return found


def cpu_seconds(function, rounds: int) -> float:
  """CPU time of a call, all threads: the median. It moves less than wall time does when others use the machine."""
  times = []
  for _ in range(rounds):
    start = time.process_time()
    jax.block_until_ready(function())
    times.append(time.process_time() - start)
  return float(np.median(times))


def measure(spec: AttentionSpec, rounds: int, settings=SETTINGS) -> list[dict]:
  """Rows of all methods; one that others took much of the machine from claims neither that its goal is met nor missed."""
  if missing := set(METHODS) - {"dense"} - {parse_method(text)[0] for text in SETTINGS}:
    logging.warning(
      "not measured, there is no setting for %s: add one to SETTINGS", ", ".join(sorted(missing))
    )
  found = []
  for text in settings:
    bystanders = timing.Bystanders()
    measured = measure_method(text, spec, rounds)
    others = bystanders.share()
    found += [
      row | {"others_cpu": others, "met": row["met"] if others < _BUSY else None}
      for row in measured
    ]
  return found


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  jax.config.update("jax_platforms", "cpu")
  logging.set_verbosity(logging.INFO)
  command = "python -m benchmarks.cpu.methods" + (" --quick" if _QUICK.value else "")
  context = rows.context(command)  # asked before the run: the commit that is measured
  # The quick shape has as many tiles, so that the settings mean the same.
  quick = dataclasses.replace(SPECS["cpu_4k"], name="quick", heads=4, block=32)
  found = measure(quick, 2) if _QUICK.value else measure(SPECS["cpu_16k"], 5)
  print(rows.table(found))
  if not _QUICK.value:
    rows.write_rows("methods_cpu", [row | context for row in found], command)


if __name__ == "__main__":
  app.run(main)
