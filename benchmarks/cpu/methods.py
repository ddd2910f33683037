"""Attention of every sparse method against the dense mode of the same backend, in the same run.

  python -m benchmarks.cpu.methods            # 3 minutes on 2 idle cores: results/methods_cpu.json
  python -m benchmarks.cpu.methods --quick    # a small shape, no rows

A row's value is the share of the ideal that is retained: speed-up over the dense mode times
density, 1 if time falls as pairs do. All attention calls of a layer count, also the pooled one of
block_topk. The rest of a method between its projections (selection, search, compression, linear
heads) is timed apart, for every phase of a sampling run. For a method with linear heads a second
row takes both ops together and counts linear attention by its FLOPs: the time that the dense mode
would take for as many FLOPs, over the time of both. Inputs are random, so selections are arbitrary,
their number is not.
"""

import dataclasses
from collections.abc import Callable

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
from benchmarks.layer import projected, taken_out
from freqformer.cost import attention_cost
from freqformer.methods.base import Cond, Dims
from freqformer.methods.registry import METHODS, parse_method
from freqformer.simulation.forward import make_method

_QUICK = flags.DEFINE_bool(
  "quick", False, "A small shape and few repeats; writes no rows.", allow_override=True
)

# Densities of 0.05 to 0.25 on the 128 tiles of cpu_16k; no router: the branch of a head is known.
SETTINGS = (
  "freqformer(allocation=(1, 1, 2), mid_tiles=8, window=(2, 3, 3), deal=as_is)",
  "octaves(levels=4, window=(2, 2, 3), deal=octant)",
  "sliding_tile(window=(12, 12, 16), deal=as_is)",
  "radial(decay=0.25, sink=0)",
  "block_topk(density=0.1)",
  "spatial_temporal(frames=0, places=1, sink=0)",
  "sparse_linear(critical=0.05)",
  "sparseflow(allocation=(2, 2), schedule=dict(frames=(3, 3)), anchors=0)",
  "adaspa(sparsity=0.9)",
)
STEPS = 50  # of the sampling run whose phases are measured
_COND_DIM = 8
_BUSY = 0.3  # share of the machine that others use above which wall times say little


@dataclasses.dataclass(frozen=True)
class Calls:
  """Calls of a layer at one phase: compiled functions without arguments, ready to be timed.

  Attributes:
    whole: the method, QK-norm and rotary included.
    around: the same with its attention and linear attention taken out; their inputs are computed.
    attention: its attention calls.
    linear: its linear attention calls, or None.
    linear_flops: of the linear calls.
    density: of the attention calls, mean over heads.
    state: the method's state after the phase.
  """

  whole: Callable
  around: Callable
  attention: Callable
  linear: Callable | None
  linear_flops: float
  density: float
  state: object


def calls_of(method, spec: AttentionSpec, phase: str = "", state=None) -> Calls:
  """Runs a layer at a phase (None: with the state that a run begins with) and takes it apart."""
  layout = spec.layout
  dims = Dims(spec.heads, spec.head_dim, _COND_DIM)
  state = method.init_state(spec.batch, dims, layout) if state is None else state
  graphdef, params = nnx.split(method.build(dims, layout, nnx.Rngs(0)))

  def whole(params, q, k, v, arrays, tables, state):
    cond = Cond(jnp.full(spec.batch, 0.5), jnp.zeros((spec.batch, _COND_DIM)), phase=phase)
    qkv = projected(jnp.stack([q, k, v], 2), arrays)
    return method(nnx.merge(graphdef, params), qkv, cond, tables, state)[:2]

  def around(*args):
    with taken_out() as taken:
      out, state = whole(*args)
    return *taken, state, out

  args = (params, *spec.inputs(), layout.arrays(), method.tables(layout), state)
  taken = call(around, *args)
  attentions, linears, state, _ = taken()
  # A call may take some of the heads only.
  pairs = sum(
    float(np.broadcast_to(mask.density(layout.n), (1, q.shape[2])).sum())
    for q, _, _, mask in attentions
  )

  def linear(inputs):
    return [linear_attention(*x[:-1], feature_map=method.feature_map, **x[-1]) for x in inputs]

  return Calls(
    whole=call(whole, *args),
    around=taken,
    attention=call(lambda inputs: [sparse(*x) for x in inputs], attentions),
    linear=call(linear, linears) if linears else None,
    linear_flops=sum(linear_flops(*inputs) for inputs in linears),
    density=pairs / spec.heads,
    state=state,
  )


def linear_flops(q, k, v, segments, arrays) -> float:
  """Counts `4 n d (d + 1)` per head, and `2 segments^2 d (d + 1)` if segments read other sums."""
  b, n, h, d = q.shape
  segments = segments.length.shape[-1]
  return b * h * d * (d + 1) * (4.0 * n + 2.0 * segments**2 * ("reads" in arrays))


def measure_method(text: str, spec: AttentionSpec, rounds: int) -> list[dict]:
  """Measures a method's usual step: a row of attention, another of both ops for linear heads."""
  method = make_method(text)
  phases = {}
  state = None
  for phase in dict.fromkeys(method.phase(step, STEPS) for step in range(STEPS)):
    phases[phase] = calls_of(method, spec, phase, state)
    state = phases[phase].state
  usual = phases[method.phase(STEPS - 1, STEPS)]  # of most steps
  q, k, v = spec.inputs()
  everything = dense_mask(q.shape[1], q.shape[1], spec.block, spec.block)
  ops = {"dense_mode": call(sparse, q, k, v, everything), "attention": usual.attention}
  if usual.linear is not None:
    ops["linear"] = usual.linear
  around = {f"around_{phase or 'attention'}": calls.around for phase, calls in phases.items()}
  times = timing.interleave(ops | around, rounds)
  wall = {part: t.median for part, t in times.items()}
  every = {part: t.row() for part, t in times.items()}

  def retained(end, share, *parts, **fields):
    """A row of speed-up over the dense mode times the share of its work that is left."""
    speedup = wall["dense_mode"] / sum(wall[part] for part in parts)
    return rows.goal_row(
      f"{parse_method(text)[0]}{end}_vs_dense_mode_{spec.name}",
      speedup * share,
      ">= 0.6",
      unit="",
      method=text,
      density=usual.density,
      speedup=speedup,
      **fields,
    )

  found = [retained("", usual.density, "attention", **every)]
  if usual.linear is not None:
    dense_flops = attention_cost(spec.heads * q.shape[1] ** 2, spec.head_dim).attention_flops
    over_dense = usual.linear_flops / dense_flops
    found.append(
      retained(
        "_with_linear",
        usual.density + over_dense,
        "attention",
        "linear",
        linear_flops_over_dense=over_dense,
        linear_gflops=usual.linear_flops / wall["linear"] / 1e9,
        dense_mode_gflops=dense_flops / wall["dense_mode"] / 1e9,
        linear=every["linear"],
      )
    )
  return found


def measure(spec: AttentionSpec, rounds: int, settings=SETTINGS) -> list[dict]:
  """Measures all methods; on a busy machine a row does not say whether its goal is met."""
  if missing := set(METHODS) - {"dense"} - {parse_method(text)[0] for text in SETTINGS}:
    logging.warning(
      "not measured, there is no setting for %s: add one to SETTINGS", ", ".join(sorted(missing))
    )
  found = []
  for text in settings:
    found += timing.beside_others(lambda text=text: measure_method(text, spec, rounds))
  return [row if row["others_cpu"] < _BUSY else row | {"met": None} for row in found]


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  jax.config.update("jax_platforms", "cpu")
  logging.set_verbosity(logging.INFO)
  if _QUICK.value:
    # As many tiles, so that the settings mean the same.
    spec = dataclasses.replace(SPECS["cpu_4k"], name="quick", heads=4, block=32)
    print(rows.table(measure(spec, 2)))
    return
  # Before the run, so that it names the commit that is measured.
  context = rows.context("python -m benchmarks.cpu.methods")
  found = measure(SPECS["cpu_16k"], 5)
  print(rows.table(found))
  rows.write_rows("methods_cpu", [context | row for row in found], context["command"])


if __name__ == "__main__":
  app.run(main)
