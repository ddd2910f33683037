"""What the GPU gates should come to, from a model of resources and traffic: no measurement, and marked so.

  python -m benchmarks.gpu.expected     # writes results/attention_gpu_expected.json, prints the gates

A call is a list of thread blocks, one per query tile, that the device starts in order on its SMs, one per SM. A block takes a
fixed time (launch, first loads, epilogue) and then, per key tile, the slowest of: its matmuls at the dense rate, its K and
V tiles through L2 at an SM's share, and the part of them that no neighbour fetched at an SM's share of device memory. The
order is the kernel's: dearest heads first. Which part neighbours share: for windows, the exact union of the lists that run
together; for random sorted lists, the expected union; for unsorted lists, what L2 happens to hold.

The rates are assumed, not fitted: `Device` says from where. cuDNN is assumed at its published rate at every size, so that the
model gives it no tail and no launch, and "of cuDNN" comes out low at 16K. The model knows nothing of instruction issue, bank
conflicts or clocks: STA's published 25.38 ms is 1.17 times what it gives for that call.
"""

import dataclasses
import heapq
import pathlib

import numpy as np
from absl import app, logging

from benchmarks import rows
from benchmarks.arg_specs import AttentionSpec
from benchmarks.gpu import gates
from benchmarks.gpu import masks as gpu_masks
from benchmarks.gpu.masks import Composition
from benchmarks.gpu.plan import FULL, Plan
from freqformer.cost import BACKWARD_OVER_FORWARD, selection_cost
from freqformer.tables.window import sliding_tile

NAME = "attention_gpu_expected"


@dataclasses.dataclass(frozen=True)
class Device:
  """Assumed rates of an H100 SXM.

  Attributes:
    sms: streaming multiprocessors.
    tensor: FLOP/s that attention reaches in dense mode (98 % of cuDNN's 697 is published for JAX's Mosaic GPU attention, which
      spends its softmax inside); cudnn: what cuDNN reaches at d = 128.
    l2: bytes/s. Tiles of 128 rows need 5.4e12 at the dense rate; that they get it is an assumption.
    hbm: bytes/s of a copy; l2_bytes: capacity.
    block_s: launch, first loads and epilogue of a thread block. Ours, unmeasured.
    launch_s: gap between two launches in one program. Ours, unmeasured.
    backward: share of the dense rate that a backward reaches. Assumed; FlashAttention-3 (arXiv 2407.08608) shows about that.
    extra_passes: matmuls of a two-pass backward over those that count (7 / 5).
  """

  sms: int = 132
  tensor: float = 686e12
  cudnn: float = 697e12
  l2: float = 5.5e12
  hbm: float = 3.0e12
  l2_bytes: float = 50e6
  block_s: float = 2.0e-6
  launch_s: float = 3.0e-6
  backward: float = 0.75
  extra_passes: float = 7 / 5


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
  """Heads that share a pattern.

  Attributes:
    heads: how many.
    counts: key tiles of each query tile, `[q_tiles]`.
    missing: share of the loaded tiles that come from device memory.
    fill: share of the buffer's rows that are tokens.
    block_q, block_kv, d: sizes.
  """

  heads: int
  counts: np.ndarray
  missing: float
  fill: float = 1.0
  block_q: int = 128
  block_kv: int = 128
  d: int = 128

  @property
  def pairs(self) -> float:
    """Scored valid pairs of all heads."""
    return float(self.heads * self.counts.sum() * self.block_q * self.block_kv) * self.fill**2

  @property
  def flops(self) -> float:
    return 4 * self.pairs * self.d

  def step_s(self, device: Device, rate: float = 1.0) -> float:
    """One key tile on one SM; `rate` scales the matmuls' speed."""
    flops, loaded = 4 * self.block_q * self.block_kv * self.d, 2 * self.block_kv * self.d * 2
    per_sm = (
      flops / (device.tensor * rate),
      loaded / device.l2,
      loaded * self.missing / device.hbm,
    )
    return max(per_sm) * device.sms

  def blocks(self, device: Device, rate: float = 1.0) -> np.ndarray:
    """Seconds of each thread block, head by head; empty ones start and end."""
    one = device.block_s * np.where(self.counts > 0, 1.0, 0.25) + self.counts * self.step_s(
      device, rate
    )
    return np.tile(one, self.heads)


# ---- traffic -------------------------------------------------------------------------------------------------------------


def missing_random(spec: AttentionSpec, keep: int, device: Device, ordered: bool = True) -> float:
  """Random lists: the share of loads that no neighbour made, or that L2 does not hold by luck."""
  tiles = spec.layout.tiles
  held = min(1.0, device.l2_bytes / (spec.n * spec.head_dim * 4))  # K and V of one head
  if not ordered:
    return 1 - held
  p = keep / tiles
  union = (1 - (1 - p) ** device.sms) / (device.sms * p)
  return union * (1 - held)


def missing_listed(ids: np.ndarray, device: Device) -> float:
  """Static lists `[q_tiles, keep]`: distinct tiles over loads, over groups of neighbours that run together."""
  groups = [ids[i : i + device.sms] for i in range(0, len(ids), device.sms)]
  return sum(len(np.unique(g)) for g in groups) / ids.size


# ---- calls ---------------------------------------------------------------------------------------------------------------


def makespan(blocks: np.ndarray, sms: int) -> float:
  """Seconds until all blocks are done, each starting in order on the first SM that is free."""
  if len(blocks) <= sms:
    return float(blocks.max(initial=0.0))
  free = [0.0] * sms
  for seconds in blocks:
    heapq.heapreplace(free, free[0] + float(seconds))
  return max(free)


def call_s(works: list[Work], device: Device, rate: float = 1.0) -> float:
  """One launch: dearest heads first, as the kernel orders them."""
  ordered = sorted(works, key=lambda w: -w.counts.sum())
  return device.launch_s + makespan(
    np.concatenate([w.blocks(device, rate) for w in ordered]), device.sms
  )


def dense_s(spec: AttentionSpec, device: Device) -> float:
  """cuDNN's dense attention."""
  return 4 * float(spec.n) ** 2 * spec.head_dim * spec.heads / device.cudnn


def dense_work(spec: AttentionSpec, device: Device) -> Work:
  tiles = spec.layout.tiles
  return Work(spec.heads, np.full(tiles, tiles), 1 / min(device.sms, tiles), **_shape(spec))


def list_work(spec: AttentionSpec, density: float, device: Device, ordered: bool = True) -> Work:
  keep = max(1, round(spec.layout.tiles * density))
  missing = missing_random(spec, keep, device, ordered)
  return Work(spec.heads, np.full(spec.layout.tiles, keep), missing, **_shape(spec))


def _shape(spec: AttentionSpec) -> dict:
  """Sizes of a shape's tiles."""
  return {
    "block_q": spec.block,
    "block_kv": spec.block,
    "d": spec.head_dim,
    "fill": spec.layout.fill,
  }


def band_works(spec: AttentionSpec, of: Composition, device: Device) -> list[Work]:
  """FreqFormer's bands as separate patterns: low, mid, high."""
  low, mid, high = of.heads(spec)
  coarse = -(-of.n_coarse(spec) // spec.block)
  keep, filled = of.mid_tiles(spec), of.n_coarse(spec) / (coarse * spec.block)
  window = sliding_tile(spec.layout, of.window).kv_indices[0, 0]
  return [
    Work(
      low, np.full(coarse, coarse), 1 / min(device.sms, coarse), **_shape(spec) | {"fill": filled}
    ),
    Work(mid, np.full(spec.layout.tiles, keep), missing_random(spec, keep, device), **_shape(spec)),
    Work(
      high, np.full(len(window), window.shape[1]), missing_listed(window, device), **_shape(spec)
    ),
  ]


def fused_works(spec: AttentionSpec, of: Composition, device: Device) -> list[Work]:
  """The same in one packed buffer: every head also has the other rows, empty."""
  coarse = -(-of.n_coarse(spec) // spec.block)
  full, found = spec.layout.tiles, []
  for i, work in enumerate(band_works(spec, of, device)):
    rest = np.zeros(full if i == 0 else coarse, np.int64)
    counts = np.concatenate([work.counts, rest] if i == 0 else [rest, work.counts])
    found.append(dataclasses.replace(work, counts=counts))
  return found


# ---- rows ----------------------------------------------------------------------------------------------------------------


def _row(name, spec, seconds, flops, device, **fields) -> dict:
  """A row of the model, named like the row that will be measured."""
  density = flops / (4 * spec.head_dim * spec.heads * float(spec.n) ** 2)
  row = {
    "name": name,
    "expected": True,
    "n": spec.n,
    "heads": spec.heads,
    "density": density,
    "seconds": seconds,
    "flops": flops,
  }
  row |= {"tflops": flops / seconds / 1e12, "dense_seconds": dense_s(spec, device)}
  return (
    row
    | {
      "speedup": row["dense_seconds"] / seconds,
      "retained": row["dense_seconds"] / seconds * density,
    }
    | fields
  )


def expected_rows(plan: Plan = FULL, device: Device = Device()) -> list[dict]:  # noqa: B008
  """Every row that a gate reads, and some that explain them."""
  found = []
  for name in plan.dense:
    spec = plan.spec(name)
    work = dense_work(spec, device)
    row = _row(f"dense/{name}", spec, call_s([work], device), work.flops, device)
    found.append(row | {"over_cudnn": row["tflops"] * 1e12 / device.cudnn})
  for ordered, names in ((True, plan.lists), (False, plan.unsorted)):
    for name, density in names:
      spec, work = plan.spec(name), list_work(plan.spec(name), density, device, ordered)
      label = f"lists_d{round(100 * density):02d}{'' if ordered else '_unsorted'}/{name}"
      found.append(
        _row(label, spec, call_s([work], device), work.flops, device, from_memory=work.missing)
      )
  spec = plan.spec(plan.window)
  ids = gpu_masks.window(
    spec, plan.window_tile, plan.window_extent, plan.window_refine
  ).mask.kv_indices[0, 0]
  work = Work(spec.heads, np.full(len(ids), ids.shape[1]), missing_listed(ids, device))
  found.append(
    _row(
      f"window/{spec.name}",
      spec,
      call_s([work], device),
      work.flops,
      device,
      from_memory=work.missing,
    )
  )
  for name, density in plan.backward:
    spec, work = plan.spec(name), list_work(plan.spec(name), density, device)
    # Both passes walk every pair: 7 matmuls where 5 count, at the backward's share of the dense rate.
    seconds = (
      call_s([work], device, device.backward / (BACKWARD_OVER_FORWARD * device.extra_passes))
      + device.launch_s
    )
    label = f"backward_lists_d{round(100 * density):02d}/{name}"
    row = _row(label, spec, seconds, BACKWARD_OVER_FORWARD * work.flops, device)
    found.append(
      {k: v for k, v in row.items() if k not in ("dense_seconds", "speedup", "retained", "density")}
    )
  return found + _band_rows(plan, device) + [_around_row(plan, device)]


def _band_rows(plan, device):
  """FreqFormer in one launch, and one launch against three."""
  found = []
  for prefix, names, of in (
    ("freqformer", plan.fused, plan.bands),
    ("fixed4k", plan.fixed, dataclasses.replace(plan.bands, mid_density=0.0)),
  ):
    for name in names:
      spec = plan.spec(name)
      works = fused_works(spec, of, device)
      flops = sum(w.flops for w in works)
      found.append(_row(f"{prefix}/{name}", spec, call_s(works, device), flops, device))
  for name in plan.launches:
    spec = plan.spec(name)
    one = call_s(fused_works(spec, plan.bands, device), device)
    three = sum(call_s([w], device) for w in band_works(spec, plan.bands, device))
    found.append(
      {"name": f"fused_over_separate/{name}", "expected": True, "n": spec.n, "ratio": three / one}
    )
  return found


def _around_row(plan, device):
  """Selection and transforms beyond every method's norm and rotary, bound by device memory.

  Passes over one `[n, h, d]` array in bf16, with the kernels around attention (`benchmarks/compiled/memory_bound.py` counts them in the
  compiled layer): coarse rows of q, k and v out, and in the lift tokens in and out, coarse rows in. The selection moves its
  pooled scores (`freqformer.cost.selection_cost`).
  """
  name = plan.around[0]
  spec = plan.spec(name)
  passes = 2 + 4 * plan.bands.n_coarse(spec) / spec.n
  select = selection_cost(spec.n, spec.layout.tiles, spec.heads, spec.head_dim, read=0)
  moved = passes * spec.n * spec.heads * spec.head_dim * 2 + select.linear_bytes
  attention, seconds = call_s(fused_works(spec, plan.bands, device), device), moved / device.hbm
  fields = {"over_attention": seconds / attention, "passes": passes, "attention_seconds": attention}
  return {"name": f"around/{name}", "expected": True, "n": spec.n, "seconds": seconds} | fields


def write(folder: pathlib.Path = rows.RESULTS) -> list[dict]:
  """Writes the model's rows to a file of their own and returns them."""
  device = Device()
  found = expected_rows(device=device)
  path = folder / f"{NAME}.json"
  path.unlink(missing_ok=True)
  facts = {
    "command": "python -m benchmarks.gpu.expected",
    "model_of": "H100 SXM",
    "assumed": dataclasses.asdict(device),
  }
  rows.merge_rows(path, [row | facts for row in found])
  return found


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  found = write()
  for row in found:
    value = f"{1e3 * row['seconds']:9.3f} ms" if "seconds" in row else f"{row['ratio']:9.3f} x "
    more = "  ".join(
      f"{k} {row[k]:.3g}" for k in ("speedup", "retained", "tflops", "over_attention") if k in row
    )
    print(f"{row['name']:<36} {value}  {more}")
  print("\n" + gates.table(gates.gate_rows([], found)))


if __name__ == "__main__":
  app.run(main)
