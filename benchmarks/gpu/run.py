"""Runs the GPU benchmark's plan: the parts in order of value, then the gates, the printed tables and the plot."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging
from freqformer.kernels.block_sparse import tuning

from benchmarks import rows
from benchmarks.gpu import config as gpu_config
from benchmarks.gpu import gates
from benchmarks.gpu import linear as gpu_linear
from benchmarks.gpu import masks as gpu_masks
from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu import search as gpu_search
from benchmarks.gpu.attention import Session, line
from benchmarks.gpu.guards import GUARDS
from benchmarks.gpu.plan import FULL, REHEARSAL, Plan
from benchmarks.gpu.rows import Deadline, Store, open_device


def _label(density: float) -> str:
  return f"d{round(100 * density):02d}"


# ---- parts, each a few rows; the order is the order of value -------------------------------------------------------------


def ceilings(run: Session):
  """What nothing on this device beats."""
  names = ("ceiling/matmul", "ceiling/copy")
  if not any(run.wants(name) for name in names) or all(run.store.get(name) for name in names):
    return
  if run.deadline.left < GUARDS["ceilings"]:
    run.skip("ceiling/*")
    return
  found = gpu_peers.ceilings(run.plan.matmul, run.plan.copy_bytes, run.plan.effort)
  for row in found:
    run.row(row["name"], lambda row=row: row)


def dense_mode(run: Session):
  """The same kernel without lists, in turns with cuDNN: what "retained" is measured against."""
  for name in run.plan.dense:
    run.row(f"dense/{name}", lambda n=name: run.dense_mode(run.plan.spec(n)), GUARDS["dense_mode"])


def lists(run: Session):
  """Random sorted lists of 128x128 tiles."""
  for name, density in run.plan.lists:

    def make(n=name, d=density):
      return run.forward(gpu_masks.random_lists(run.plan.spec(n), d))

    run.row(f"lists_{_label(density)}/{name}", make, GUARDS["lists"])


def list_variants(run: Session):
  """Lists in random order, and other tile sizes."""
  for name, density in run.plan.unsorted:

    def make(n=name, d=density):
      return run.forward(gpu_masks.random_lists(run.plan.spec(n), d, ordered=False))

    run.row(f"lists_{_label(density)}_unsorted/{name}", make, GUARDS["list_variants"])
  spec = run.plan.spec(run.plan.tiles_at)
  for block_q, block_kv in run.plan.tiles:

    def make(q=block_q, kv=block_kv):
      return run.forward(gpu_masks.rectangular(spec, q, kv, 0.1))

    run.row(f"lists_d10_{block_q}x{block_kv}/{spec.name}", make, GUARDS["tile_sizes"])


def lowerings(run: Session):
  """Dense mode with Mosaic lowering by lane and by warpgroup: whichever the configurations chose, and the other."""
  spec = run.plan.spec(run.plan.dense[0])
  key = tuning.Key("h100", spec.head_dim, spec.block, spec.block, "forward")
  for by_lane in (False, True):

    def make(by_lane=by_lane):
      with tuning.override({key: dataclasses.replace(tuning.lookup(key), by_lane=by_lane)}):
        return run.forward(gpu_masks.dense(spec)) | {"by_lane": by_lane}

    run.row(f"dense_by_{'lane' if by_lane else 'warpgroup'}/{spec.name}", make, GUARDS["lowerings"])


def forms(run: Session):
  """The forward as it is configured and otherwise, in turns: what a choice is worth."""
  for form in run.plan.forms:

    def make(form=form):
      return run.form(form)

    run.row(f"form_{form.name}/{form.shape}", make, GUARDS["forms"])


def launches(run: Session, which: slice = slice(None)):
  """One launch against three, sequential and concurrent."""
  for name in run.plan.launches[which]:
    concurrent = name in run.plan.concurrent
    run.row(
      f"fused_over_separate/{name}",
      lambda n=name, c=concurrent: run.launches(run.plan.spec(n), c),
      GUARDS["launches"],
    )


def first_launches(run: Session):
  """The smallest shape, where one launch gains most."""
  launches(run, slice(0, 1))


def backward(run: Session):
  """Backward passes alone: lists, then dense."""
  for name, density in run.plan.backward:

    def make(n=name, d=density):
      return run.backward(gpu_masks.random_lists(run.plan.spec(n), d))

    run.row(f"backward_lists_{_label(density)}/{name}", make, GUARDS["backward"])
  for name in run.plan.backward_dense:

    def make(n=name):
      return run.backward(gpu_masks.dense(run.plan.spec(n)))

    run.row(f"backward_dense/{name}", make, GUARDS["backward"])


def window(run: Session):
  """STA's setting: 18x24x24 tokens around each tile of a 30x48x80 grid, 24 heads."""
  plan = run.plan
  spec = plan.spec(plan.window)

  def make():
    return run.forward(
      gpu_masks.window(spec, plan.window_tile, plan.window_extent, plan.window_refine)
    )

  run.row(f"window/{spec.name}", make, GUARDS["window"])


def freqformer(run: Session):
  """All bands in one call, mid at 5 % and at a fixed number of keys."""
  bands = run.plan.bands
  for prefix, names, of in (
    ("freqformer", run.plan.fused[:3], bands),
    ("fixed4k", run.plan.fixed, dataclasses.replace(bands, mid_density=0.0)),
    ("freqformer", run.plan.fused[3:], bands),
  ):
    for name in names:

      def make(n=name, of=of):
        return run.forward(gpu_masks.fused(run.plan.spec(n), of))

      run.row(f"{prefix}/{name}", make, GUARDS["freqformer"])


def around(run: Session):
  """What a layer does beside attention."""
  for name in run.plan.around:
    run.row(f"around/{name}", lambda n=name: run.around(run.plan.spec(n)), GUARDS["around"])


def linear(run: Session):
  """Linear attention within frames: how close to a copy."""
  for name in run.plan.around:

    def make(n=name):
      return gpu_linear.timed(run.plan.spec(n), run.implementation, run.plan.effort)

    run.row(f"linear/{name}", make, GUARDS["linear"])


def search(run: Session):
  """AdaSpa's block masses beside dense attention; XLA's form at the first size only."""
  for i, name in enumerate(run.plan.around):

    def make(n=name, i=i):
      return gpu_search.timed(run.plan.spec(n), run.plan.effort, portable=i == 0)

    run.row(f"search/{name}", make, GUARDS["search"])


def rest(run: Session):
  """FreqFormer's backward, a fixed budget of random keys, other head counts, ragged grids, densities that complete the plot."""
  for name in run.plan.fused_backward:

    def make(n=name):
      return run.backward(gpu_masks.fused(run.plan.spec(n), run.plan.bands))

    run.row(f"backward_freqformer/{name}", make, GUARDS["rest"])
  keys = int(np.prod(run.plan.bands.window)) * run.plan.spec(run.plan.fixed[0]).block
  for name in run.plan.fixed[:1]:

    def make(n=name):
      return run.forward(gpu_masks.random_lists(run.plan.spec(n), keys=keys))

    run.row(f"lists_4k/{name}", make, GUARDS["rest"])
  for name, density in run.plan.rest:

    def make(n=name, d=density):
      return run.forward(gpu_masks.random_lists(run.plan.spec(n), d))

    run.row(f"lists_{_label(density)}/{name}", make, GUARDS["rest"])


def tokamax(run: Session):
  """tokamax's dense kernel, where it is installed."""
  if (f := gpu_peers.tokamax()) is None:
    logging.info("tokamax is not installed: no rows")
    return
  for name in run.plan.dense:
    run.row(
      f"tokamax/{name}",
      lambda n=name: run.peer(run.plan.spec(n), f, "tokamax mosaic"),
      GUARDS["tokamax"],
    )


def torch(run: Session):
  """PyTorch's kernels, in a process of their own; asked again only if a row is missing."""
  if run.store.get("torch_sdpa_cudnn/a_16k"):  # the last that the child measures
    return
  if run.deadline.left < GUARDS["torch"]:
    run.skip("torch_*")
    return
  try:
    found = gpu_peers.torch_rows(["--rehearse"] if run.store.rehearsal else [], run.deadline.left)
  except RuntimeError as error:
    logging.warning("%s", error)
    run.skip("torch_*")
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
# Asked for by name only: comparisons that answer one question and need not be repeated.
OTHER_PARTS = (forms,)


def parts_named(names: Sequence[str]) -> tuple[Callable, ...]:
  """Returns parts by name, in the order asked for; no names: all of `PARTS`.

  Raises:
    ValueError: for a name that no part has.
  """
  known = {part.__name__: part for part in (*PARTS, *OTHER_PARTS)}
  if unknown := [name for name in names if name not in known]:
    raise ValueError(f"--parts has no {', '.join(unknown)}; parts are {', '.join(known)}.")
  return tuple(known[name] for name in names) or PARTS


# ---- the run -------------------------------------------------------------------------------------------------------------


def run_parts(run: Session, parts=PARTS) -> None:
  """Every part in order; a part that breaks is logged and the next one begins."""
  for part in parts:
    logging.info("---- %s (%.0f s left)", part.__name__, run.deadline.left)
    try:
      part(run)
    except Exception:
      logging.exception("part %s failed", part.__name__)
    for row in gates.gate_rows(run.store.all()):
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

  def bad(row):
    return "error" in row or row.get("correct") is False

  return [row["name"] for row in run.store.all() if bad(row) and not row["name"].startswith(peers)]


def main(
  minutes: float,
  out: str | None,
  implementation: str | None,
  rehearse: bool,
  plan: Plan | None = None,
  parts: Sequence[str] = (),
  only: str = "",
  config: str = "",
) -> Session:
  """Runs the benchmark as the command line asks for.

  Args:
    minutes: stop by then, with what there is.
    out: folder for results; default `$OUT`, else benchmarks/results. A rehearsal refuses the latter.
    implementation: backend under test; default the GPU kernel, for a rehearsal "xla".
    rehearse: tiny shapes on any device; rows are marked and say nothing about speed.
    plan: default the full one at the sizes asked for.
    parts: names of `PARTS` or `OTHER_PARTS`; none: all of `PARTS`. The plot is drawn of a whole run only.
    only: a regular expression that finds the rows to measure by name.
    config: fields of the kernels' configuration to change wherever that fits (gpu_config.py). Its rows say so, and count as
      rows of other code: a run without it measures them anew.

  Raises:
    ValueError: if a rehearsal would write among the measured rows, for an unknown part, or for an invalid `config`.
    RuntimeError: if there is no GPU to measure on.
  """
  chosen = parts_named(parts)
  configs = gpu_config.everywhere(gpu_config.parse(config)) if config else {}
  kind = open_device(rehearse)
  folder = pathlib.Path(out or os.environ.get("OUT") or rows.RESULTS)
  if rehearse and folder.resolve() == rows.RESULTS.resolve():
    raise ValueError(
      "a rehearsal measures nothing: name a folder of its own with --out, not benchmarks/results."
    )
  options = {"parts": ",".join(parts), "only": only, "config": config}
  command = f"python -m benchmarks.attention --device=gpu --minutes={minutes:g}" + (
    " --rehearse" if rehearse else ""
  )
  command += "".join(f" --{option}='{value}'" for option, value in options.items() if value)
  name = "attention_gpu_rehearsal" if rehearse else f"attention_gpu_{device_slug(kind)}"
  store = Store.open(folder, name, command, rehearse)
  if config:
    store.context |= {"config": config, "code": f"{store.context['code']} {config}"}
  implementation = implementation or ("xla" if rehearse else "pallas_mgpu")
  run = Session(
    plan or (REHEARSAL if rehearse else FULL), store, Deadline(60 * minutes), implementation, only
  )
  with tuning.override(configs):
    run_parts(run, chosen)
  print(report(run))
  if not parts and not only:
    _draw(run)
  print(f"rows: {store.path}")
  return run


def _draw(run: Session):
  """Draws the plot beside the rows; a machine without matplotlib keeps its rows."""
  try:
    from benchmarks.gpu.plot import draw

    print(f"plot: {draw(run.store.all(), run.store.path.with_suffix('.png'))}")
  except Exception as error:  # whatever a plotting library raises, the rows are there and count
    logging.warning("no plot: %s", error)
