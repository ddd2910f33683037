"""Block-sparse attention against dense attention on a CPU, in the same run.

  python -m benchmarks.attention --device=cpu

The competitors take turns, so that drift cancels in the ratios. The dense competitor is a loop over
chunks of queries in plain JAX, at the best of several chunk sizes and forms;
`jax.nn.dot_product_attention` runs as it comes. Goals that are missed are printed and stored as
missed, with the floor that the machine's own matmuls set.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.table import dense_mask

from benchmarks import rows, timing
from benchmarks.arg_specs import SPECS, AttentionSpec
from benchmarks.cpu.competitors import DenseForm, by_speed, call, gradients, sparse
from benchmarks.cpu.methods import calls_of
from freqformer.cost import attention_cost
from freqformer.grid.rotary import rotate
from freqformer.methods.freqformer import FreqFormer

THETA = 100.0  # of rotary; no figure depends on it


@dataclasses.dataclass(frozen=True)
class Run:
  """Shapes and competitors of one run.

  Attributes:
    base: the shape of the comparisons.
    large: the shape of the scaling and memory rows.
    plain: shapes of the comparison with JAX's own attention, forward and backward.
    chunks: query rows per step that the dense loop may choose from.
    backward_chunks: the same for its gradients.
    rounds: turns of every competitor.
    methods: FreqFormer configurations by name, with the block size that each runs at.
    goals: whether the goals are for these shapes.
  """

  base: AttentionSpec
  large: AttentionSpec
  plain: tuple[AttentionSpec, ...]
  chunks: tuple[int, ...]
  backward_chunks: tuple[int, ...]
  rounds: int
  methods: tuple[tuple[str, int, FreqFormer], ...]
  goals: bool = False


FULL = Run(
  base=SPECS["cpu_16k"],
  large=SPECS["cpu_64k"],
  plain=(SPECS["cpu_4k_2h"], SPECS["cpu_16k_2h"]),
  chunks=(256, 512, 1024),
  backward_chunks=(128, 256, 512),
  rounds=7,
  methods=(
    ("block64", 64, FreqFormer(allocation=(1, 1, 2), mid_tiles=16)),
    ("block128", 128, FreqFormer(allocation=(1, 1, 2), mid_tiles=8)),
  ),
  goals=True,
)
QUICK = Run(
  base=SPECS["cpu_1k"],
  large=SPECS["cpu_4k"],
  plain=(SPECS["cpu_4k_2h"],),
  chunks=(128, 256),
  backward_chunks=(128,),
  rounds=2,
  methods=(("block64", 64, FreqFormer(allocation=(0, 1, 1), mid_tiles=4)),),
)


def described(found: list[dict], run: Run) -> list[dict]:
  """Adds `attention_calls` to the rows of a run: which of their times is which forward call.

  The simulator is compared with these (`freqformer/simulation/measurements.py`).
  """
  base = run.base

  def call_of(spec, **lists):
    return {"heads": spec.heads, "head_dim": spec.head_dim, "batch": spec.batch} | lists

  def listed(spec, keys):
    return call_of(spec, tokens=spec.n, block=spec.block, density=keys / spec.n)

  small = listed(base, base.keys)
  large = listed(run.large, run.large.keys)
  calls = {
    f"forward_vs_dense_loop_{base.name}": {"sparse": small},
    f"dense_mode_vs_dense_loop_{base.name}": {"dense_mode": listed(base, base.n)},
    f"time_{run.large.name}_over_{base.name}": {"small": small, "large": large},
  }
  for name, block, method in run.methods:
    text = f"freqformer(allocation={method.allocation}, mid_tiles={method.mid_tiles})"
    alone = call_of(base, grid=list(base.grid), block=block, method=text)
    calls[f"freqformer_{name}_vs_dense_loop_{base.name}"] = {"attention_alone": alone}
  return [
    row | ({"attention_calls": calls[row["name"]]} if row["name"] in calls else {}) for row in found
  ]


# ---- measurements ------------------------------------------------------------------------


def _forms(chunks, late=(False, True)):
  return [DenseForm(chunk, l) for chunk in chunks for l in late]


def measure_forward(run: Run) -> list[dict]:
  """Times the sparse call against the best dense loop, the best one with `jax.nn.softmax`,
  `dot_product_attention`, and a bare matmul."""
  spec = run.base
  q, k, v = spec.inputs()
  mask = spec.mask()
  loops = by_speed(_forms(run.chunks), (q, k, v))
  best, loop = loops[0]
  plain, softmax_loop = next(found for found in loops if not found[0].late)
  square = jnp.ones((2048, 2048), q.dtype)
  everything = dense_mask(q.shape[1], q.shape[1], spec.block, spec.block)
  t = timing.interleave(
    {
      "sparse": call(sparse, q, k, v, mask),
      "loop": loop,
      "softmax_loop": softmax_loop,
      "dense_mode": call(sparse, q, k, v, everything),
      "dot_product_attention": call(jax.nn.dot_product_attention, q, k, v),
      "matmul": call(jnp.matmul, square, square),
    },
    run.rounds,
  )
  flops = attention_cost(float(mask.pairs().sum()), spec.head_dim).attention_flops
  floor_s = flops / (2 * 2048**3) * t["matmul"].median
  density = float(np.mean(mask.density()))

  def race(name, competitor, goal, **fields):
    """A speed-up over one competitor, and the largest that its time allows at a matmul's speed."""
    return rows.goal_row(
      f"forward_vs_{name}_{spec.name}",
      t[competitor].median / t["sparse"].median,
      goal,
      unit="x",
      density=density,
      sparse=t["sparse"].row(),
      against=t[competitor].row(),
      largest_possible=t[competitor].median / floor_s,
      **fields,
    )

  return [
    race("dense_loop", "loop", ">= 14", form=str(best)),
    race("softmax_loop", "softmax_loop", ">= 14", form=str(plain)),
    race("dot_product_attention", "dot_product_attention", ">= 60"),
    rows.goal_row(f"forward_over_floor_{spec.name}", t["sparse"].median / floor_s, None, unit="x"),
    rows.goal_row(
      f"dense_mode_vs_dense_loop_{spec.name}",
      t["loop"].median / t["dense_mode"].median,
      None,
      unit="x",
      form=str(best),
      dense_mode=t["dense_mode"].row(),
      against=t["loop"].row(),
    ),
  ]


def measure_backward(run: Run) -> list[dict]:
  """Times forward and backward together, against the dense loop's with rematerialised chunks."""
  spec = run.base
  q, k, v, d_out = spec.inputs(4)
  args = (d_out, q, k, v)
  mask = spec.mask()
  best, loop = by_speed(_forms(run.backward_chunks), args, gradients, remat=True)[0]
  calls = {"sparse": call(gradients(sparse), *args, mask), "loop": loop}
  t = timing.interleave(calls, max(2, run.rounds // 2))
  return [
    rows.goal_row(
      f"forward_backward_vs_dense_loop_{spec.name}",
      t["loop"].median / t["sparse"].median,
      ">= 8",
      unit="x",
      form=str(best),
      sparse=t["sparse"].row(),
      against=t["loop"].row(),
    )
  ]


def measure_plain(run: Run) -> list[dict]:
  """Times the sparse call against `jax.nn.dot_product_attention`, alone and with gradients.

  This is what a model gains that calls JAX's attention and takes this one with a sparse mask.
  """
  found = []
  for spec in run.plain:
    d_out, *qkv = spec.inputs(4)
    mask = spec.mask()
    dense = jax.nn.dot_product_attention
    backward = {
      "sparse": call(gradients(sparse), d_out, *qkv, mask),
      "against": call(gradients(dense), d_out, *qkv),
    }
    forward = {"sparse": call(sparse, *qkv, mask), "against": call(dense, *qkv)}
    for what, calls in (("forward", forward), ("forward_backward", backward)):
      t = timing.interleave(calls, max(2, run.rounds // 2))
      found.append(
        rows.goal_row(
          f"{what}_vs_dot_product_attention_{spec.name}",
          t["against"].median / t["sparse"].median,
          None,
          unit="x",
          density=float(np.mean(mask.density())),
          sparse=t["sparse"].row(),
          against=t["against"].row(),
        )
      )
  return found


def measure_scaling(run: Run) -> list[dict]:
  """Times four times the tokens at the same keys per query: linear would be 4."""
  calls = {s.name: call(sparse, *s.inputs(), s.mask()) for s in (run.base, run.large)}
  small, large = timing.interleave(calls, run.rounds).values()
  name = f"time_{run.large.name}_over_{run.base.name}"
  times = dict(small=small.row(), large=large.row())
  return [rows.goal_row(name, large.median / small.median, "<= 4.5", unit="x", **times)]


def measure_memory(run: Run) -> list[dict]:
  """Measures the peak resident memory of a process that makes one call at the large shape.

  Interpreter and inputs are included.
  """
  found = []
  for what, bound in (("forward", "<= 2"), ("backward", "<= 3")):
    arguments = ["-m", "benchmarks.attention", f"--memory_of={what}", f"--spec={run.large.name}"]
    gigabytes = int(timing.in_child(arguments)) / 1e9
    name = f"peak_memory_{what}_{run.large.name}"
    found.append(rows.goal_row(name, gigabytes, bound, unit="GB"))
  return found


def print_memory(spec: AttentionSpec, what: str):
  """Makes one call and prints the process's peak memory: the child of `measure_memory`."""
  q, k, v, d_out = spec.inputs(4)
  if what == "forward":
    run = call(sparse, q, k, v, spec.mask())
  else:
    run = call(gradients(sparse), d_out, q, k, v, spec.mask())
  jax.block_until_ready(run())
  print(timing.peak_rss())


# ---- FreqFormer ------------------------------------------------------------------------


def _rotated(f):
  """Makes `f(q, k, v, positions)` of `f(q, k, v)`: q and k are rotated first."""

  def run(q, k, v, positions):
    return f(rotate(q, positions, THETA), rotate(k, positions, THETA), v)

  return run


def measure_freqformer(run: Run) -> list[dict]:
  """Times FreqFormer with a fixed allocation, on its own tables and buffer, against rotary and the
  dense loop."""
  found = []
  for name, block, method in run.methods:
    spec = dataclasses.replace(run.base, block=block)
    args = (*spec.inputs(), spec.layout.arrays().positions)
    best, loop = by_speed(_forms(run.chunks, (True,)), args, _rotated)[0]
    own = calls_of(method, spec)
    calls = {"whole": own.whole, "around": own.around, "attention": own.attention, "loop": loop}
    t = timing.interleave(calls, run.rounds)
    speedup = t["loop"].median / t["whole"].median
    found.append(
      rows.goal_row(
        f"freqformer_{name}_vs_dense_loop_{spec.name}",
        speedup,
        None,
        unit="x",
        density=own.density,
        retained=speedup * own.density,
        allocation=method.allocation,
        form=str(best),
        whole=t["whole"].row(),
        selection_and_transforms=t["around"].row(),
        attention_alone=t["attention"].row(),
        against=t["loop"].row(),
      )
    )
  return found


# ---- the run ---------------------------------------------------------------------------


def measure(run: Run, memory: bool = True) -> list[dict]:
  """Measures all rows of a run."""
  parts = [measure_forward, measure_backward, measure_plain, measure_scaling, measure_freqformer]
  found = []
  for part in [measure_memory] * memory + parts:
    found += timing.beside_others(functools.partial(part, run))
  return found if run.goals else [row | {"goal": None, "met": None} for row in found]


def main(quick: bool, command: str) -> None:
  """Measures, prints and, unless `quick`, writes rows."""
  context = rows.context(command)  # before the run, so that it names the commit that is measured
  found = measure(QUICK if quick else FULL)
  print(rows.table(found))
  if not quick:
    rows.write_rows("attention_cpu", [row | context for row in described(found, FULL)], command)
