"""Measurements of attention: a pass of the kernel under test, its rivals, and what both rest on.

The denominator of every speed-up is cuDNN in the same process; errors are against a float32 oracle
on sampled rows; rates count the table's own pairs.
"""

import dataclasses
import functools
import gc
from collections.abc import Callable

import jax
from freqformer.kernels.block_sparse import cost, tuning
from freqformer.kernels.core.target import current_target
from freqformer.kernels.hopper.machine import CAPABILITY as HOPPER

from benchmarks.arg_specs import AttentionSpec
from benchmarks.gpu import config, launches, masks, peers
from benchmarks.gpu.attempt import Job, measured
from benchmarks.gpu.device import Deadline
from benchmarks.gpu.launches import attend
from benchmarks.gpu.masks import Composition, Problem
from benchmarks.gpu.oracle import backward_error, forward_error
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Call, Measured, measure
from benchmarks.rows import Store
from freqformer.cost import BACKWARD_OVER_FORWARD, attention_cost

# The row that PyTorch's process measures last.
_LAST_TORCH_ROW = "torch_sdpa_cudnn/a_16k"
# A child process gets at least so many seconds.
_LEAST_CHILD_SECONDS = 30.0


class Bench:
  """Measures rows of attention.

  Attributes:
    store: of the rows; cuDNN's are added when the first ratio needs them.
    implementation: backend under test, or its named stand-in.
  """

  def __init__(self, sizes: Sizes, store: Store, deadline: Deadline, implementation: str):
    self.sizes = sizes
    self.store = store
    self.deadline = deadline
    self.implementation = implementation
    self._dense: dict[str, dict | None] = {}

  # ---- the kernel under test ---------------------------------------------------------------------

  def call(self, problem: Problem, configs: dict | None = None) -> Call:
    """Returns the forward pass of a problem, traced under these kernel configurations."""

    # A new function each time, so that no trace of another configuration is reused.
    def run(q, k, v, mask):
      with tuning.override(configs or {}):
        return attend(q, k, v, mask, self.implementation)

    return Call(run, (*problem.inputs(), masks.on_device(problem.mask)))

  def checked(self, problem: Problem, call: Call, times: Measured) -> dict:
    """Returns the row of a forward pass that was timed, with its errors on sampled rows."""
    errors = forward_error(call.args[:3], problem.mask, call(), self.sizes.oracle_rows)
    return self.describe(problem, times) | errors

  def forward(self, make: Callable[..., Problem], *args) -> dict:
    """Times and checks the forward pass of the problem `make(*args)`."""
    problem = make(*args)
    call = self.call(problem)
    row = self.checked(problem, call, self.measure({"ours": call})["ours"])
    return self.against_dense(row, problem.spec)

  def backward(self, make: Callable[..., Problem], *args) -> dict:
    """Times and checks the backward pass alone, from stored residuals and a transposed table."""
    problem = make(*args)
    *qkv, d_out = problem.inputs(4)
    mask = masks.on_device(problem.mask.with_transpose())
    shape = (problem.spec.batch, problem.heads, problem.rows)
    cotangents = (d_out, jax.random.normal(jax.random.key(9), shape))
    ours = functools.partial(attend, implementation=self.implementation)
    call, found = peers.backward_call(ours, tuple(qkv), cotangents, (mask,))
    times = self.measure({"ours": call})["ours"]
    rows = self.sizes.oracle_rows
    error = backward_error(tuple(qkv), problem.mask, found, cotangents, call(), rows)
    return self.against_dense(self.describe(problem, times, "backward") | error, problem.spec)

  def form(self, changes: str, make: Callable[..., Problem], *args) -> dict:
    """Times a forward as it is configured and with `changes`, in turns, and checks both.

    `ratio` is the time of the other form over that of the configured one.
    """
    problem = make(*args)
    mask = problem.mask
    sizes = (problem.spec.head_dim, mask.block_q, mask.block_kv)
    other = config.changed(config.parse(changes), [tuning.Key("h100", *sizes, "forward")])
    calls = {"configured": self.call(problem), "otherwise": self.call(problem, other)}
    t = self.measure(calls)
    row = {name: self.checked(problem, call, t[name]) for name, call in calls.items()}
    return row | {
      "changes": changes,
      "ratio": t["otherwise"].seconds / t["configured"].seconds,
      "correct": all(row[name]["correct"] for name in calls),
    }

  def launches(self, spec: AttentionSpec, bands: Composition, concurrent: bool) -> dict:
    """Times one launch against three, and against three that may overlap."""
    t = launches.compare(spec, bands, self.implementation, self.sizes.effort)
    row = {name: times.row() for name, times in t.items()}
    fused = [t["fused"].wall.median]
    separate = {"sequential": t["separate"].wall.median}
    if concurrent:
      gc.collect()
      limit = max(_LEAST_CHILD_SECONDS, self.deadline.left)
      child = launches.in_child(spec, bands, self.implementation, self.sizes.effort, limit)
      row |= {f"{name}_concurrent": fields for name, fields in child.items()}
      fused.append(child["fused"]["wall"]["median_s"])
      separate["concurrent"] = child["separate"]["wall"]["median_s"]
    return row | {
      "n": spec.n,
      "ratio": min(separate.values()) / min(fused),
      "fused_wall_s": min(fused),
      "separate_wall_s": separate,
    }

  # ---- rivals ------------------------------------------------------------------------------------

  def dense_mode(self, spec: AttentionSpec) -> dict:
    """Times dense mode and cuDNN in turns, and Hopper's kernel where another one is under test."""
    problem = masks.dense(spec)
    ours = self.call(problem)
    calls = {
      "ours": ours,
      "cudnn": Call(peers.cudnn, _without_padding(self.dense_problem(spec), 3)),
    }
    if self.implementation == "triton" and current_target().capability == HOPPER:
      hopper = functools.partial(attend, implementation="hopper")
      calls["hopper"] = Call(hopper, ours.args)
    t = self.measure(calls)
    cudnn = self.dense(spec, "forward", t["cudnn"])
    row = self.checked(problem, ours, t["ours"])
    if "hopper" in t:
      row["over_hopper"] = t["hopper"].seconds / t["ours"].seconds
    return row | {
      "dense_seconds": t["cudnn"].seconds,
      "over_cudnn": row["tflops"] / cudnn["tflops"],
    }

  def torch(self) -> dict:
    """Adds the rows of PyTorch's kernels and returns their names.

    Raises:
      RuntimeError: if there is no torch, or its process was cut short.
    """
    options = ["--rehearse"] if self.store.rehearsal else []
    names = []
    for row in peers.torch_rows(options, self.deadline.left):
      names.append(self.store.add(row)["name"])
    if _LAST_TORCH_ROW not in names:
      raise RuntimeError(f"PyTorch's process ended before {_LAST_TORCH_ROW}; it gave {names}")
    return {"rows": names}

  def dense_problem(self, spec: AttentionSpec) -> Problem:
    """Returns dense attention of a shape; one head where all would take seconds per call."""
    heads = 1 if spec.n > self.sizes.one_head_above else spec.heads
    tiles = masks.dense_mask(spec.n, spec.n, spec.block, spec.block)
    return Problem(spec, tiles, heads)

  def dense(
    self, spec: AttentionSpec, direction: str = "forward", times: Measured | None = None
  ) -> dict | None:
    """Returns cuDNN's row for a shape, measured once per process: no ratio mixes two runs.

    `times` are those of cuDNN where it has run in turns with another call. The row is None if cuDNN
    failed, which the stored one then says.
    """
    name = f"cudnn{'_backward' if direction == 'backward' else ''}/{spec.name}"
    if name not in self._dense:
      job = Job(name, lambda: self._dense_fields(spec, direction, times))
      row = self.store.add({"name": name} | measured(job))
      self._dense[name] = None if "error" in row else row
    return self._dense[name]

  def _dense_fields(self, spec: AttentionSpec, direction: str, times: Measured | None) -> dict:
    problem = self.dense_problem(spec)
    *qkv, d_out = _without_padding(problem, 4)
    if direction == "backward":
      call, _ = peers.backward_call(peers.cudnn, tuple(qkv), (d_out,))
    else:
      call = Call(peers.cudnn, tuple(qkv))
    times = times or self.measure({"cudnn": call})["cudnn"]
    row = self.describe(problem, times, direction) | {"implementation": "cudnn"}
    if direction == "forward":
      row |= forward_error(tuple(qkv), problem.mask, (call(), None), self.sizes.oracle_rows)
    scaled = problem.heads != spec.heads
    note = f"one head measured, times {spec.heads}" if scaled else "all heads measured"
    return row | {"all_heads_seconds": row["seconds"] * spec.heads / problem.heads, "note": note}

  # ---- fields ------------------------------------------------------------------------------------

  def measure(self, calls: dict[str, Call]) -> dict[str, Measured]:
    """Times calls in turns."""
    return measure(calls, self.sizes.effort)

  def describe(self, problem: Problem, times: Measured, direction: str = "forward") -> dict:
    """Returns the fields that every attention row has."""
    spec = problem.spec
    mask = problem.mask
    flops = attention_cost(problem.pairs, spec.head_dim).attention_flops
    if direction == "backward":
      flops *= BACKWARD_OVER_FORWARD
    row = {
      "n": spec.n,
      "grid": list(spec.grid),
      "heads": problem.heads,
      "head_dim": spec.head_dim,
      "dtype": spec.dtype,
      "block_q": mask.block_q,
      "block_kv": mask.block_kv,
      "density": problem.density,
      "direction": direction,
      "implementation": self.implementation,
      **times.row(),
      "flops": flops,
      "tflops": flops / times.seconds / 1e12,
    }
    if direction == "forward":
      # The simulator is calibrated by the lists as they are, padding rows included, which the
      # density does not tell.
      counts = cost.count(mask, spec.head_dim, batch=spec.batch, heads=problem.heads)
      row["counts"] = dataclasses.asdict(counts)
    return row

  def against_dense(self, row: dict, spec: AttentionSpec) -> dict:
    """Adds the speed-up over cuDNN in this run, and its product with the density."""
    dense = self.dense(spec, row["direction"])
    if dense is None:
      return row
    speedup = dense["all_heads_seconds"] / row["seconds"]
    return row | {
      "dense_seconds": dense["all_heads_seconds"],
      "speedup": speedup,
      "retained": speedup * row["density"],
    }


def _without_padding(problem: Problem, count: int) -> tuple[jax.Array, ...]:
  """Returns q, k, v (and a cotangent) without padding rows: `[b, n, heads, d]`."""
  return tuple(x[:, : problem.spec.n] for x in problem.inputs(count))
