"""The GPU benchmark: parts in order of value, each row written at once, skipped when it is already there.

`python -m benchmarks.attention --device=gpu` runs it (docs/benchmarks.md). The denominator of every speed-up is cuDNN in the
same process; errors are against a float32 oracle on sampled rows; rates count the table's own pairs.
"""

import dataclasses
import functools
import gc
import re
from collections.abc import Callable

import jax
from absl import logging
from freqformer.kernels.block_sparse import cost, tuning

from benchmarks.arg_specs import AttentionSpec
from benchmarks.gpu import config as gpu_config
from benchmarks.gpu import launches as gpu_launches
from benchmarks.gpu import masks as gpu_masks
from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu.launches import attend
from benchmarks.gpu.masks import Composition, Problem
from benchmarks.gpu.oracle import backward_error, forward_error
from benchmarks.gpu.plan import Form, Plan
from benchmarks.gpu.rows import Deadline, Store
from benchmarks.gpu.timing import Call, Measured, measure
from freqformer.cost import BACKWARD_OVER_FORWARD, attention_cost


class Session:
  """One run over a plan.

  Attributes:
    plan: shapes.
    store: where rows go.
    deadline: when to stop.
    implementation: of `kernels.block_sparse.api.attention`: the kernel under test, or its named stand-in.
    only: a regular expression; rows whose name it does not find are left out.
    skipped: names of rows for which there was no time.
  """

  def __init__(
    self, plan: Plan, store: Store, deadline: Deadline, implementation: str, only: str = ""
  ):
    self.plan = plan
    self.store = store
    self.deadline = deadline
    self.implementation = implementation
    self.only = only
    self.skipped = []
    self._dense = {}

  # ---- rows ------------------------------------------------------------------------------------------------------------

  def wants(self, name: str) -> bool:
    """Returns True if a row of that name was asked for."""
    return re.search(self.only, name) is not None

  def skip(self, name: str):
    """Notes and prints that there was no time for a row."""
    self.skipped.append(name)
    print(f"unreached {name}", flush=True)

  def row(self, name: str, make: Callable[[], dict], seconds: float = 15.0) -> dict | None:
    """Measures and writes one row, unless it is there, there is no time for it, or it fails (then the row says why).

    The row is announced before it is measured: a run that is killed has named what it was doing.

    Args:
      name: of the row.
      make: returns its fields.
      seconds: what it may take, at a guess; nothing is begun that would end after the deadline.
    """
    if not self.wants(name):
      return None
    if (found := self.store.get(name)) is not None:
      print(stated(found), flush=True)
      return found
    if self.deadline.left < seconds:
      self.skip(name)
      return None
    print(f"begin {name}", flush=True)
    try:
      fields = make()
    except Exception as error:
      logging.exception("%s failed", name)
      fields = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    gc.collect()  # jitted calls hold their arguments in cycles
    row = self.store.add({"name": name} | fields)
    print(stated(row), flush=True)
    return row

  def describe(self, problem: Problem, measured: Measured, direction: str = "forward") -> dict:
    """The fields that every attention row has."""
    spec, mask = problem.spec, problem.mask
    factor = {"forward": 1.0, "backward": BACKWARD_OVER_FORWARD}[direction]
    flops = factor * attention_cost(problem.pairs, spec.head_dim).attention_flops
    sizes = {
      "n": spec.n,
      "grid": list(spec.grid),
      "heads": problem.heads,
      "head_dim": spec.head_dim,
      "dtype": spec.dtype,
    }
    table = {
      "mask": problem.what,
      "block_q": mask.block_q,
      "block_kv": mask.block_kv,
      "density": problem.density,
    }
    rate = {"flops": flops, "tflops": flops / measured.seconds / 1e12}
    # What the simulator is calibrated by: lists as they are, padding rows included, which the density does not tell.
    counts = dataclasses.asdict(
      cost.count(mask, spec.head_dim, batch=spec.batch, heads=problem.heads)
    )
    rate |= {"counts": counts} if direction == "forward" else {}
    return (
      sizes
      | table
      | {"direction": direction, "implementation": self.implementation}
      | measured.row()
      | rate
    )

  def against_dense(self, row: dict, spec: AttentionSpec) -> dict:
    """Adds speed-up over cuDNN in this run, and how much of 1 / density it is."""
    dense = self.dense(spec, row["direction"])
    if dense is None:
      return row
    speedup = dense["all_heads_seconds"] / row["seconds"]
    extra = {
      "dense_seconds": dense["all_heads_seconds"],
      "dense_row": dense["name"],
      "dense_note": dense["note"],
    }
    return row | extra | {"speedup": speedup, "retained": speedup * row["density"]}

  # ---- cuDNN -----------------------------------------------------------------------------------------------------------

  def dense_problem(self, spec: AttentionSpec) -> Problem:
    """Dense attention of a shape; one head of it where all would take seconds per call."""
    heads = 1 if spec.n > self.plan.one_head_above else spec.heads
    tiles = gpu_masks.dense_mask(spec.n, spec.n, spec.block, spec.block)
    return Problem(spec, tiles, "dense", heads)

  def dense(
    self, spec: AttentionSpec, direction: str = "forward", measured: Measured | None = None
  ) -> dict | None:
    """cuDNN's row for a shape, measured once per process: a ratio never mixes two runs."""
    key = (spec.n, spec.heads, spec.head_dim, direction)
    if key not in self._dense:
      name = f"cudnn{'_backward' if direction == 'backward' else ''}/{spec.name}"
      problem = self.dense_problem(spec)
      try:
        self._dense[key] = self.store.add(
          {"name": name} | self._dense_fields(problem, direction, measured)
        )
      except Exception as error:
        logging.exception("%s failed", name)
        self.store.add({"name": name, "error": f"{type(error).__name__}: {str(error)[:500]}"})
        self._dense[key] = None
      gc.collect()
    return self._dense[key]

  def _dense_fields(self, problem, direction, measured):
    spec = problem.spec
    *qkv, d_out = _dense_inputs(problem, 4)
    if direction == "backward":
      call, _ = gpu_peers.backward_call(gpu_peers.cudnn, tuple(qkv), (d_out,))
    else:
      call = Call(gpu_peers.cudnn, tuple(qkv))
    measured = measured or measure({"cudnn": call}, self.plan.effort)["cudnn"]
    row = self.describe(problem, measured, direction) | {"implementation": "cudnn"}
    if direction == "forward":
      row |= forward_error(tuple(qkv), problem.mask, (call(), None), self.plan.oracle_rows)
    scaled = problem.heads != spec.heads
    note = f"one head measured, times {spec.heads}" if scaled else "all heads measured"
    return row | {"all_heads_seconds": row["seconds"] * spec.heads / problem.heads, "note": note}

  # ---- kinds of rows ---------------------------------------------------------------------------------------------------

  def call(self, problem: Problem) -> Call:
    """The kernel under test on a problem."""
    ours = functools.partial(attend, implementation=self.implementation)
    return Call(ours, (*problem.inputs(), gpu_masks.on_device(problem.mask)))

  def forward(self, problem: Problem) -> dict:
    """Times and checks the forward pass of a problem."""
    call = self.call(problem)
    measured = measure({"ours": call}, self.plan.effort)["ours"]
    error = forward_error(call.args[:3], problem.mask, call(), self.plan.oracle_rows)
    return self.against_dense(self.describe(problem, measured) | error, problem.spec)

  def dense_mode(self, spec: AttentionSpec) -> dict:
    """Dense mode and cuDNN in turns."""
    problem = gpu_masks.dense(spec)
    ours = self.call(problem)
    peer = Call(gpu_peers.cudnn, _dense_inputs(self.dense_problem(spec), 3))
    t = measure({"ours": ours, "cudnn": peer}, self.plan.effort)
    cudnn = self.dense(spec, "forward", t["cudnn"])
    error = forward_error(ours.args[:3], problem.mask, ours(), self.plan.oracle_rows)
    row = self.describe(problem, t["ours"]) | error | {"dense_seconds": t["cudnn"].seconds}
    return row | {"over_cudnn": row["tflops"] / cudnn["tflops"]}

  def form(self, form: Form) -> dict:
    """Times a forward as it is configured and otherwise, in turns, and checks both.

    Returns:
      fields of both, and `ratio`: the time of the other form over that of the configured one.
    """
    spec = self.plan.spec(form.shape)
    if form.block:
      problem = gpu_masks.rectangular(spec, form.block, form.block, form.density)
    else:
      problem = (
        gpu_masks.random_lists(spec, form.density) if form.density else gpu_masks.dense(spec)
      )
    mask = problem.mask
    key = tuning.Key("h100", spec.head_dim, mask.block_q, mask.block_kv, "forward")
    calls = {}
    for name, changes in (("configured", ""), ("otherwise", form.changes)):
      configs = gpu_config.changed(gpu_config.parse(changes), [key])
      ours = functools.partial(attend, implementation=self.implementation)
      calls[name] = Call(_under(configs, ours), (*problem.inputs(), gpu_masks.on_device(mask)))
    t = measure(calls, self.plan.effort)
    row = {"n": spec.n, "mask": problem.what, "density": problem.density, "changes": form.changes}
    correct = True
    for name, call in calls.items():
      error = forward_error(call.args[:3], mask, call(), self.plan.oracle_rows)
      row[name] = self.describe(problem, t[name]) | error
      correct = correct and error["correct"]
    return row | {"ratio": t["otherwise"].seconds / t["configured"].seconds, "correct": correct}

  def peer(self, spec: AttentionSpec, f: Callable, name: str) -> dict:
    """Another dense kernel."""
    problem = self.dense_problem(spec)
    call = Call(f, _dense_inputs(problem, 3))
    measured = measure({name: call}, self.plan.effort)[name]
    error = forward_error(call.args, problem.mask, (call(), None), self.plan.oracle_rows)
    return self.describe(problem, measured) | error | {"implementation": name}

  def backward(self, problem: Problem) -> dict:
    """Times and checks the backward pass alone, from stored residuals and a stored transposed table."""
    *qkv, d_out = problem.inputs(4)
    mask = gpu_masks.on_device(problem.mask.with_transpose())
    d_lse = jax.random.normal(jax.random.key(9), (qkv[0].shape[0], problem.heads, problem.rows))
    ours = functools.partial(attend, implementation=self.implementation)
    call, found = gpu_peers.backward_call(ours, tuple(qkv), (d_out, d_lse), (mask,))
    measured = measure({"ours": call}, self.plan.effort)["ours"]
    error = backward_error(
      tuple(qkv), problem.mask, found, (d_out, d_lse), call(), self.plan.oracle_rows
    )
    return self.against_dense(self.describe(problem, measured, "backward") | error, problem.spec)

  def launches(self, spec: AttentionSpec, concurrent: bool) -> dict:
    """One launch against three, and against three that may overlap."""
    bands, effort = self.plan.bands, self.plan.effort
    t = gpu_launches.compare(spec, bands, self.implementation, effort)
    walls = {name: measured.wall.median for name, measured in t.items()}
    row = {name: measured.row() for name, measured in t.items()} | {
      "n": spec.n,
      "mask": bands.words(spec),
    }
    best, fused = {"sequential": walls["separate"]}, [walls["fused"]]
    if concurrent:
      gc.collect()
      child = gpu_launches.in_child(
        spec, bands, self.implementation, effort, max(30.0, self.deadline.left)
      )
      row |= {f"{name}_concurrent": fields for name, fields in child.items()} | {
        "xla_flags": gpu_launches.CONCURRENT
      }
      best["concurrent"] = child["separate"]["wall"]["median_s"]
      fused.append(child["fused"]["wall"]["median_s"])
    winner = min(best, key=best.get)
    return row | {
      "ratio": best[winner] / min(fused),
      "best_separate": winner,
      "fused_wall_s": min(fused),
      "separate_wall_s": best,
    }

  def around(self, spec: AttentionSpec) -> dict:
    """What FreqFormer does around its attention call, beyond the norm and rotary that every method has."""
    # needs flax, which a bare GPU machine may have in another version
    from benchmarks import layer

    method, layout = layer_method(spec, self.plan.bands), spec.layout
    joint = jax.numpy.stack(gpu_masks.dense(spec).inputs(), 2)
    arrays, tables = jax.tree.map(jax.numpy.asarray, (layout.arrays(), method.tables(layout)))
    around = Call(
      functools.partial(layer.around_attention, method, self.implementation),
      (joint, arrays, tables),
    )
    handed_over, _ = around()
    attention = Call(functools.partial(attend, implementation=self.implementation), handed_over)
    rotary = Call(functools.partial(layer.norm_and_rotary, self.implementation), (joint, arrays))
    t = measure(
      {"around": around, "attention": attention, "norm_and_rotary": rotary}, self.plan.effort
    )
    seconds = {name: measured.seconds for name, measured in t.items()}
    return {name: measured.row() for name, measured in t.items()} | {
      "n": spec.n,
      "seconds": seconds["around"],
      "over_attention": (seconds["around"] - seconds["norm_and_rotary"]) / seconds["attention"],
      "over_attention_with_rotary": seconds["around"] / seconds["attention"],
      "note": "selection, packing, compression, lift; every method's norm and rotary subtracted; no summary tokens",
    }


def _under(configs: dict, f: Callable) -> Callable:
  """Returns `f` traced under these configurations: a new function, so that no trace of another configuration is reused."""

  def configured(*args):
    with tuning.override(configs):
      return f(*args)

  return configured


def layer_method(spec: AttentionSpec, bands: Composition):
  """FreqFormer's config for the composition: heads dealt by hand, cuts that give its compression."""
  from freqformer.grid.basis import SpectralBasis
  from freqformer.methods.freqformer import FreqFormer

  low = tuple(1 / r for r in bands.ratio)
  return FreqFormer(
    basis=SpectralBasis("block_dct", low, (0.75, 0.75, 0.75)),
    allocation=bands.heads(spec),
    mid_tiles=bands.mid_tiles(spec),
    window=bands.window,
  )


def _dense_inputs(problem: Problem, count: int) -> tuple:
  """q, k, v (and a cotangent) without padding rows: `[b, n, heads, d]`."""
  return tuple(x[:, : problem.spec.n] for x in problem.inputs(count))


def stated(row: dict) -> str:
  """One row with its verdict first, as gpu_check prints them: what a slot looks for."""
  verdict = "FAILED" if "error" in row else "ok   " if row.get("correct", True) else "WRONG"
  return f"{verdict} {line(row)}"


def line(row: dict) -> str:
  """One row for people."""
  if "error" in row:
    return f"{row['name']:<36} FAILED: {row['error'][:120]}"
  parts = [f"{row['name']:<36}"]
  for key, form in (
    ("seconds", lambda x: f"{1e3 * x:9.3f} ms"),
    ("tflops", lambda x: f"{x:6.1f} TFLOP/s"),
    ("tb_per_s", lambda x: f"{x:.2f} TB/s"),
    ("density", lambda x: f"density {x:.4f}"),
    ("speedup", lambda x: f"{x:6.2f}x"),
    ("retained", lambda x: f"retained {x:.3f}"),
    ("over_cudnn", lambda x: f"{x:.3f} of cuDNN"),
    ("ratio", lambda x: f"ratio {x:.3f}"),
    ("over_attention", lambda x: f"{x:.3f} of attention"),
    ("error_out", lambda x: f"error {x:.1e}"),
  ):
    if row.get(key) is not None:
      parts.append(form(row[key]))
  return "  ".join(parts) + ("" if row.get("correct", True) else "  WRONG")
