"""Runs the GPU benchmark's plan: the parts in order of value, then the gates, the printed tables and the plot."""

import dataclasses
import os
import pathlib

import numpy as np
from absl import logging

from benchmarks import gates, gpu_linear, gpu_masks, gpu_peers, gpu_search, rows
from benchmarks.gpu_attention import Session, line
from benchmarks.gpu_plan import FULL, REHEARSAL, Plan
from benchmarks.gpu_rows import Deadline, Store, open_device
from kernels import tuning

EXPECTED = rows.RESULTS / "attention_gpu_expected.json"


def _label(density: float) -> str:
  return f"d{round(100 * density):02d}"


# ---- parts, each a few rows; the order is the order of value -------------------------------------------------------------


def ceilings(run: Session):
  """What nothing on this device beats."""
  names = ("ceiling/matmul", "ceiling/copy")
  if all(run.store.get(name) for name in names):
    return
  found = gpu_peers.ceilings(run.plan.matmul, run.plan.copy_bytes, run.plan.effort)
  for row in found:
    run.row(row["name"], lambda row=row: row)


def dense_mode(run: Session):
  """The same kernel without lists, in turns with cuDNN: what "retained" is measured against."""
  for name in run.plan.dense:
    run.row(f"dense/{name}", lambda n=name: run.dense_mode(run.plan.spec(n)), 40)


def lists(run: Session):
  """Random sorted lists of 128x128 tiles."""
  for name, density in run.plan.lists:
    make = lambda n=name, d=density: run.forward(gpu_masks.random_lists(run.plan.spec(n), d))
    run.row(f"lists_{_label(density)}/{name}", make, 25)


def list_variants(run: Session):
  """Lists in random order, and other tile sizes."""
  for name, density in run.plan.unsorted:
    make = lambda n=name, d=density: run.forward(gpu_masks.random_lists(run.plan.spec(n), d, ordered=False))
    run.row(f"lists_{_label(density)}_unsorted/{name}", make, 25)
  spec = run.plan.spec(run.plan.tiles_at)
  for block_q, block_kv in run.plan.tiles:
    make = lambda q=block_q, kv=block_kv: run.forward(gpu_masks.rectangular(spec, q, kv, 0.1))
    run.row(f"lists_d10_{block_q}x{block_kv}/{spec.name}", make)


def lowerings(run: Session):
  """Dense mode with Mosaic lowering by lane and by warpgroup: whichever the configurations chose, and the other."""
  spec = run.plan.spec(run.plan.dense[0])
  key = tuning.Key("h100", spec.head_dim, spec.block, spec.block, "forward")
  for by_lane in (False, True):

    def make(by_lane=by_lane):
      with tuning.override({key: dataclasses.replace(tuning.lookup(key), by_lane=by_lane)}):
        return run.forward(gpu_masks.dense(spec)) | {"by_lane": by_lane}

    run.row(f"dense_by_{'lane' if by_lane else 'warpgroup'}/{spec.name}", make, 25)


def launches(run: Session, which: slice = slice(None)):
  """One launch against three, sequential and concurrent."""
  for name in run.plan.launches[which]:
    concurrent = name in run.plan.concurrent
    run.row(f"fused_over_separate/{name}", lambda n=name, c=concurrent: run.launches(run.plan.spec(n), c), 60)


def first_launches(run: Session):
  """The smallest shape, where one launch gains most."""
  launches(run, slice(0, 1))


def backward(run: Session):
  """Backward passes alone: lists, then dense."""
  for name, density in run.plan.backward:
    make = lambda n=name, d=density: run.backward(gpu_masks.random_lists(run.plan.spec(n), d))
    run.row(f"backward_lists_{_label(density)}/{name}", make, 30)
  for name in run.plan.backward_dense:
    run.row(f"backward_dense/{name}", lambda n=name: run.backward(gpu_masks.dense(run.plan.spec(n))), 30)


def window(run: Session):
  """STA's setting: 18x24x24 tokens around each tile of a 30x48x80 grid, 24 heads."""
  plan = run.plan
  spec = plan.spec(plan.window)
  make = lambda: run.forward(gpu_masks.window(spec, plan.window_tile, plan.window_extent, plan.window_refine))
  run.row(f"window/{spec.name}", make, 40)


def freqformer(run: Session):
  """All bands in one call, mid at 5 % and at a fixed number of keys."""
  bands = run.plan.bands
  for prefix, names, of in (
    ("freqformer", run.plan.fused[:3], bands),
    ("fixed4k", run.plan.fixed, dataclasses.replace(bands, mid_density=0.0)),
    ("freqformer", run.plan.fused[3:], bands),
  ):
    for name in names:
      run.row(f"{prefix}/{name}", lambda n=name, of=of: run.forward(gpu_masks.fused(run.plan.spec(n), of)), 40)


def around(run: Session):
  """What a layer does beside attention."""
  for name in run.plan.around:
    run.row(f"around/{name}", lambda n=name: run.around(run.plan.spec(n)), 30)


def linear(run: Session):
  """Linear attention within frames: how close to a copy."""
  for name in run.plan.around:
    make = lambda n=name: gpu_linear.timed(run.plan.spec(n), run.implementation, run.plan.effort)
    run.row(f"linear/{name}", make, 30)


def search(run: Session):
  """AdaSpa's block masses beside dense attention; XLA's form at the first size only."""
  for i, name in enumerate(run.plan.around):
    make = lambda n=name, i=i: gpu_search.timed(run.plan.spec(n), run.plan.effort, portable=i == 0)
    run.row(f"search/{name}", make, 30)


def rest(run: Session):
  """FreqFormer's backward, a fixed budget of random keys, other head counts, ragged grids, densities that complete the plot."""
  for name in run.plan.fused_backward:
    run.row(f"backward_freqformer/{name}", lambda n=name: run.backward(gpu_masks.fused(run.plan.spec(n), run.plan.bands)), 40)
  keys = int(np.prod(run.plan.bands.window)) * run.plan.spec(run.plan.fixed[0]).block
  for name in run.plan.fixed[:1]:
    make = lambda n=name: run.forward(gpu_masks.random_lists(run.plan.spec(n), keys=keys))
    run.row(f"lists_4k/{name}", make, 40)
  for name, density in run.plan.rest:
    make = lambda n=name, d=density: run.forward(gpu_masks.random_lists(run.plan.spec(n), d))
    run.row(f"lists_{_label(density)}/{name}", make, 25)


def tokamax(run: Session):
  """tokamax's dense kernel, where it is installed."""
  if (f := gpu_peers.tokamax()) is None:
    logging.info("tokamax is not installed: no rows")
    return
  for name in run.plan.dense:
    run.row(f"tokamax/{name}", lambda n=name: run.peer(run.plan.spec(n), f, "tokamax mosaic"), 40)


def torch(run: Session):
  """PyTorch's kernels, in a process of their own; asked again only if a row is missing."""
  if run.store.get("torch_sdpa_cudnn/a_16k"):  # the last that the child measures
    return
  if run.deadline.left < 60:
    run.skipped.append("torch_*")
    return
  try:
    found = gpu_peers.torch_rows(["--rehearse"] if run.store.rehearsal else [], run.deadline.left)
  except RuntimeError as error:
    logging.warning("%s", error)
    run.skipped.append("torch_*")
    return
  for row in found:
    logging.info("%s", line(run.store.add(row)))


PARTS = (
  ceilings,
  dense_mode,
  lowerings,
  lists,
  list_variants,
  first_launches,
  backward,
  window,
  freqformer,
  around,
  linear,
  search,
  launches,
  torch,
  tokamax,
  rest,
)


# ---- the run -------------------------------------------------------------------------------------------------------------


def run_parts(run: Session, parts=PARTS) -> None:
  """Every part in order; a part that breaks is logged and the next one begins."""
  for part in parts:
    logging.info("---- %s (%.0f s left)", part.__name__, run.deadline.left)
    try:
      part(run)
    except Exception:
      logging.exception("part %s failed", part.__name__)
    for row in gates.gate_rows(run.store.all(), rows.read_rows(EXPECTED)):
      # Tiny shapes pass or miss nothing.
      run.store.add(row | ({"passed": None, "record_met": None} if run.store.rehearsal else {}))


def report(run: Session) -> str:
  """The rows and gates for people."""
  found = run.store.all()
  measured = [line(row) for row in found if not row["name"].startswith("gate: ")]
  title = f"{run.store.context['device']}, code {run.store.context['code']}" + (
    "  REHEARSAL: no measurement" if run.store.rehearsal else ""
  )
  table = gates.table([row for row in found if row["name"].startswith("gate: ")])
  skipped = f"no time for: {', '.join(run.skipped)}" if run.skipped else "nothing skipped"
  return "\n".join([title, *measured, "", table, "", skipped])


def device_slug(kind: str) -> str:
  """`NVIDIA H100 80GB HBM3` -> `h100`: results of different devices lie in different files."""
  words = [w for w in kind.lower().split() if any(c.isdigit() for c in w) and w[0].isalpha()]
  return words[0] if words else kind.lower().replace(" ", "_")


def troubles(run: Session) -> list[str]:
  """Names of our own rows that failed or are wrong; a peer that fails is no trouble of ours."""
  peers = ("cudnn", "torch", "tokamax")
  bad = lambda row: "error" in row or row.get("correct") is False
  return [row["name"] for row in run.store.all() if bad(row) and not row["name"].startswith(peers)]


def main(minutes: float, out: str | None, implementation: str | None, rehearse: bool, plan: Plan | None = None) -> Session:
  """The command line's entry.

  Args:
    minutes: stop by then, with what there is.
    out: folder for results; default `$OUT`, else benchmarks/results. A rehearsal refuses the latter.
    implementation: backend under test; default the GPU kernel, for a rehearsal "xla".
    rehearse: tiny shapes on any device; rows are marked and say nothing about speed.
    plan: default the full one at the sizes asked for.

  Raises:
    ValueError: if a rehearsal would write among the measured rows.
    RuntimeError: if there is no GPU to measure on.
  """
  kind = open_device(rehearse)
  folder = pathlib.Path(out or os.environ.get("OUT") or rows.RESULTS)
  if rehearse and folder.resolve() == rows.RESULTS.resolve():
    raise ValueError("a rehearsal measures nothing: name a folder of its own with --out, not benchmarks/results.")
  command = f"python -m benchmarks.attention --device=gpu --minutes={minutes:g}" + (" --rehearse" if rehearse else "")
  name = "attention_gpu_rehearsal" if rehearse else f"attention_gpu_{device_slug(kind)}"
  store = Store.open(folder, name, command, rehearse)
  implementation = implementation or ("xla" if rehearse else "pallas_mgpu")
  run = Session(plan or (REHEARSAL if rehearse else FULL), store, Deadline(60 * minutes), implementation)
  run_parts(run)
  print(report(run))
  try:
    from benchmarks.gpu_plot import draw

    print(f"plot: {draw(run.store.all(), store.path.with_suffix('.png'))}")
  except Exception as error:  # a machine without matplotlib keeps its rows
    logging.warning("no plot: %s", error)
  print(f"rows: {store.path}")
  return run
