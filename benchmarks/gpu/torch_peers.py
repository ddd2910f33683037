"""PyTorch's attention on the same GPU: SDPA (flash, cuDNN), and FlexAttention at the same density.

  python -m benchmarks.gpu.torch_peers    # one JSON row per line; --rehearse: tiny shapes

It needs torch with CUDA, and nothing of ours. FlexAttention compiles its own Triton kernels, about
20 s per shape. Times are CUDA events around single calls, in bfloat16 on normal inputs.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

# (tokens, heads) by name: the shapes of benchmarks/arg_specs.py, where torch must not be needed.
SHAPES = {
  "a_16k": (16384, 12),
  "a_64k": (65536, 12),
  "a_128k": (131072, 12),
  "b_115k": (115200, 24),
}
TINY = {"a_16k": (256, 2), "a_64k": (1024, 2), "a_128k": (1024, 2), "b_115k": (2304, 2)}
HEAD_DIM = 128
BLOCK = 128
# The 3-D window's grid of 6x8x8-token tiles, each three blocks of 128; and of a rehearsal.
WINDOW_TILES = (5, 6, 10)
TINY_WINDOW_TILES = (3, 2, 1)
BLOCKS_PER_TILE = 3
# Lists are timed forward and backward from this density on.
BACKWARD_DENSITY = 0.1
# FLOPs per scored pair and channel, and of forward + backward over forward.
_FLOPS_PER_PAIR = 4
_WITH_BACKWARD = 3.5
# Of each call.
_SAMPLES = 20


class Torch:
  """PyTorch and the parts of it that are used; on a CPU everything runs in float32.

  Attributes:
    flex: FlexAttention, compiled on a GPU.
    facts: fields of every row.
  """

  def __init__(self):
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    self.torch = torch
    self.cuda = torch.cuda.is_available()
    self.device = "cuda" if self.cuda else "cpu"
    self.flex = torch.compile(flex_attention, dynamic=False) if self.cuda else flex_attention
    self.facts = {
      "torch": torch.__version__,
      "torch_device": torch.cuda.get_device_name() if self.cuda else "cpu",
      "clock": "events" if self.cuda else "wall",
    }

  def inputs(self, n: int, heads: int, grad: bool = False) -> list:
    """Returns q, k, v `[1, heads, n, d]`."""
    how = {
      "device": self.device,
      "dtype": self.torch.bfloat16 if self.cuda else self.torch.float32,
      "requires_grad": grad,
    }
    return [self.torch.randn((1, heads, n, HEAD_DIM), **how) for _ in range(3)]

  def seconds(self, run: Callable) -> list[float]:
    """Times each call apart."""
    run()
    run()
    if not self.cuda:
      start = time.perf_counter()
      run()
      return [time.perf_counter() - start]
    times = []
    for _ in range(_SAMPLES):
      start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
      start.record()
      run()
      end.record()
      self.torch.cuda.synchronize()
      times.append(start.elapsed_time(end) / 1e3)
    return times

  def table(self, seen):
    """Returns FlexAttention's table of the blocks that bool `seen [heads, tiles, tiles]` marks."""
    from torch.nn.attention.flex_attention import BlockMask

    listed = seen.to(self.torch.int32)
    counts = listed.sum(-1).to(self.torch.int32)[None]
    order = self.torch.argsort(listed, dim=-1, descending=True, stable=True)
    order = order.to(self.torch.int32)[None]
    none = (self.torch.zeros_like(counts), self.torch.zeros_like(order))
    return BlockMask.from_kv_blocks(*none, counts, order, BLOCK_SIZE=BLOCK)


def emit(name: str, facts: dict, times: list[float] | None = None, pairs: int = 0, **fields):
  """Prints one row.

  Args:
    name: of the row.
    facts: fields of every row.
    times: seconds of each call; None where it failed.
    pairs: scored pairs of all heads; FLOPs are the useful ones.
    fields: others of the row; `direction` is "forward" unless it is among them.
  """
  row = {
    "name": name,
    "head_dim": HEAD_DIM,
    "direction": "forward",
    "implementation": "torch " + name.split("/")[0].split("_")[1],
    **facts,
    **fields,
  }
  if times:
    flops = _FLOPS_PER_PAIR * pairs * HEAD_DIM
    flops *= _WITH_BACKWARD if row["direction"] == "forward_backward" else 1
    low, seconds, high = (float(x) for x in np.percentile(times, (10, 50, 90)))
    spread = {"median_s": seconds, "p10_s": low, "p90_s": high, "calls": len(times)}
    rate = {"flops": flops, "tflops": flops / seconds / 1e12}
    row |= {"seconds": seconds, "device": spread} | rate
  print(json.dumps(row), flush=True)


def guarded(name: str, facts: dict, run: Callable):
  """Runs a rival; one that fails is a row that says so, and the others still run."""
  try:
    run()
  except Exception as error:
    emit(name, facts, error=f"{type(error).__name__}: {str(error)[:300]}")


def sdpa(t: Torch, spec: str, shape: tuple[int, int]):
  """Times dense attention through torch's two fast backends."""
  from torch.nn.attention import SDPBackend, sdpa_kernel

  n, heads = shape
  q, k, v = t.inputs(n, heads)
  fast = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
  for label, backend in fast.items():
    name = f"torch_sdpa_{label}/{spec}"
    chosen = backend if t.cuda else SDPBackend.MATH

    def run(chosen=chosen):
      with sdpa_kernel(chosen):
        t.torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def measured(name=name, run=run):
      emit(name, t.facts, t.seconds(run), n * n * heads, n=n, heads=heads, density=1.0)

    guarded(name, t.facts, measured)


def flex_lists(t: Torch, spec: str, shape: tuple[int, int], density: float):
  """Times random lists of whole 128-token blocks, forward, then forward + backward."""
  n, heads = shape
  tiles = n // BLOCK
  keep = max(1, round(tiles * density))
  rank = t.torch.rand(heads, tiles, tiles, device=t.device).argsort(-1).argsort(-1)
  mask = t.table(rank < keep)
  label = f"d{round(density * 100):02d}/{spec}"
  fields = {"n": n, "heads": heads, "density": keep / tiles}
  pairs = tiles * keep * BLOCK * BLOCK * heads

  def forward():
    q, k, v = t.inputs(n, heads)
    times = t.seconds(lambda: t.flex(q, k, v, block_mask=mask))
    emit(f"torch_flex_{label}", t.facts, times, pairs, **fields)

  def both():
    q, k, v = t.inputs(n, heads, grad=True)
    d_out = t.torch.randn_like(q)

    def run():
      return t.torch.autograd.grad(t.flex(q, k, v, block_mask=mask), (q, k, v), d_out)

    name = f"torch_flex_forward_backward_{label}"
    emit(name, t.facts, t.seconds(run), pairs, direction="forward_backward", **fields)

  guarded(f"torch_flex_{label}", t.facts, forward)
  if density >= BACKWARD_DENSITY:
    guarded(f"torch_flex_forward_backward_{label}", t.facts, both)


def flex_window(t: Torch, spec: str, shape: tuple[int, int], tile_grid: tuple[int, int, int]):
  """Times the clamped 18x24x24 window: tiles of 384 tokens, 3x3x3 of them listed."""
  n, heads = shape
  axes = t.torch.meshgrid(*(t.torch.arange(g) for g in tile_grid), indexing="ij")
  where = t.torch.stack(axes, -1).reshape(-1, 3)
  clamped = [where[:, a].clamp(min(1, g - 1), max(g - 2, 0)) for a, g in enumerate(tile_grid)]
  centre = t.torch.stack(clamped, -1)
  seen = ((centre[:, None] - where[None]).abs() <= 1).all(-1)
  for axis in (0, 1):
    seen = seen.repeat_interleave(BLOCKS_PER_TILE, axis)
  seen = seen.to(t.device)
  mask = t.table(seen[None].expand(heads, -1, -1))
  q, k, v = t.inputs(n, heads)
  times = t.seconds(lambda: t.flex(q, k, v, block_mask=mask))
  pairs = int(seen.sum()) * BLOCK * BLOCK * heads
  fields = {"n": n, "heads": heads, "density": float(seen.float().mean())}
  emit(f"torch_flex_window/{spec}", t.facts, times, pairs, **fields)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on any device")
  options = parser.parse_args()
  shapes = TINY if options.rehearse else SHAPES
  tile_grid = TINY_WINDOW_TILES if options.rehearse else WINDOW_TILES
  t = Torch()
  if not (t.cuda or options.rehearse):
    raise SystemExit(
      "torch sees no GPU: nothing to compare with (--rehearse runs tiny shapes on a CPU)"
    )
  with t.torch.device(t.device):
    window = ("b_115k", shapes["b_115k"], tile_grid)
    guarded("torch_flex_window/b_115k", t.facts, lambda: flex_window(t, *window))
    for spec, density in (("a_64k", 0.1), ("a_128k", 0.05), ("a_128k", 0.1)):
      flex_lists(t, spec, shapes[spec], density)
    for spec in ("a_64k", "a_16k"):
      sdpa(t, spec, shapes[spec])


if __name__ == "__main__":
  main()
