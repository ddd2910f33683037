"""What a PyTorch user gets on the same GPU: SDPA (flash, cuDNN) and FlexAttention with block masks of the same density.

  python -m benchmarks.gpu.torch_peers    # one JSON row per line; --rehearse: tiny shapes, any device

Needs torch with CUDA and nothing of ours: FlexAttention compiles its own Triton kernels (about 20 s per shape). Times are CUDA
events around single calls, after two warm-up calls, in bfloat16 on normal inputs; the `clock` of the rows says so.
"""

import argparse
import json
import statistics
import time

# (name, tokens, heads); the same shapes as benchmarks/arg_specs.py, where torch must not be needed.
SHAPES = {
  "a_16k": (16384, 12),
  "a_64k": (65536, 12),
  "a_128k": (131072, 12),
  "b_115k": (115200, 24),
}
TINY = {"a_16k": (256, 2), "a_64k": (1024, 2), "a_128k": (1024, 2), "b_115k": (2304, 2)}
# The 3-D window in tiles of 6x8x8 tokens, each three blocks of 128.
WINDOW_TILES = {False: (5, 6, 10), True: (3, 2, 1)}
HEAD_DIM, BLOCK = 128, 128


class Torch:
  """torch and what is used of it, imported when it is there; on a CPU everything runs in float32."""

  def __init__(self):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    self.torch, self.backends, self.sdpa_kernel, self.block_mask = (
      torch,
      SDPBackend,
      sdpa_kernel,
      BlockMask,
    )
    self.cuda = torch.cuda.is_available()
    self.device = "cuda" if self.cuda else "cpu"
    self.flex = torch.compile(flex_attention, dynamic=False) if self.cuda else flex_attention
    name = torch.cuda.get_device_name() if self.cuda else "cpu"
    self.facts = {
      "torch": torch.__version__,
      "torch_device": name,
      "clock": "events" if self.cuda else "wall",
    }

  def inputs(self, n, heads, grad=False):
    """q, k, v `[1, heads, n, d]`."""
    dtype = self.torch.bfloat16 if self.cuda else self.torch.float32
    shape = (1, heads, n, HEAD_DIM)
    return [
      self.torch.randn(shape, device=self.device, dtype=dtype, requires_grad=grad) for _ in range(3)
    ]

  def seconds(self, run, samples):
    """Each call timed apart."""
    run()
    run()
    if not self.cuda:
      start = time.perf_counter()
      run()
      return [time.perf_counter() - start]
    times = []
    for _ in range(samples):
      start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
      start.record()
      run()
      end.record()
      self.torch.cuda.synchronize()
      times.append(start.elapsed_time(end) / 1e3)
    return times

  def table(self, seen):
    """`seen` bool `[heads or 1, tiles, tiles]` -> FlexAttention's table of whole blocks, none of them partial."""
    counts = seen.sum(-1).to(self.torch.int32)[None]
    order = self.torch.argsort(seen.to(self.torch.int32), dim=-1, descending=True, stable=True).to(
      self.torch.int32
    )[None]
    none = self.torch.zeros_like(counts)
    return self.block_mask.from_kv_blocks(
      none, self.torch.zeros_like(order), counts, order, BLOCK_SIZE=BLOCK
    )


def emit(name, facts, times=None, pairs=0, backward=False, **fields):
  """Prints one row. FLOPs are the useful ones: 4 d per scored pair forward, 2.5 times that backward."""
  direction = "forward_backward" if backward else "forward"
  shape = {
    "head_dim": HEAD_DIM,
    "direction": direction,
    "implementation": "torch " + name.split("/")[0].split("_")[1],
  }
  row = {"name": name, **facts, **shape, **fields}
  if times:
    flops = 4 * pairs * HEAD_DIM * (3.5 if backward else 1)
    quantiles = (
      statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    )
    seconds = statistics.median(times)
    spread = {
      "median_s": seconds,
      "p10_s": quantiles[0],
      "p90_s": quantiles[-1],
      "calls": len(times),
    }
    row |= {"seconds": seconds, "device": spread, "flops": flops, "tflops": flops / seconds / 1e12}
  print(json.dumps(row), flush=True)


def guarded(name, facts, run):
  """A peer that fails is a row that says so; the others still run."""
  try:
    run()
  except Exception as error:
    emit(name, facts, error=f"{type(error).__name__}: {str(error)[:300]}")


def sdpa(t, spec, shape, samples):
  """Dense attention through torch's two fast backends."""
  (n, heads), functional = shape, t.torch.nn.functional
  q, k, v = t.inputs(n, heads)
  for label, backend in (
    ("flash", t.backends.FLASH_ATTENTION),
    ("cudnn", t.backends.CUDNN_ATTENTION),
  ):

    def run(backend=backend):
      with t.sdpa_kernel(backend if t.cuda else t.backends.MATH):
        functional.scaled_dot_product_attention(q, k, v)

    name = f"torch_sdpa_{label}/{spec}"
    fields = {"n": n, "heads": heads, "density": 1.0}

    def measured(name=name, run=run, fields=fields):
      return emit(name, t.facts, t.seconds(run, samples), n * n * heads, **fields)

    guarded(name, t.facts, measured)


def flex_lists(t, spec, shape, density, samples):
  """Random lists of whole 128-token blocks, forward, then forward + backward."""
  n, heads = shape
  tiles = n // BLOCK
  keep = max(1, round(tiles * density))
  rank = t.torch.rand(heads, tiles, tiles, device=t.device).argsort(-1).argsort(-1)
  mask, label = t.table(rank < keep), f"d{round(density * 100):02d}"
  fields = {"n": n, "heads": heads, "density": keep / tiles}
  pairs = tiles * keep * BLOCK * BLOCK * heads

  def forward():
    q, k, v = t.inputs(n, heads)
    emit(
      f"torch_flex_{label}/{spec}",
      t.facts,
      t.seconds(lambda: t.flex(q, k, v, block_mask=mask), samples),
      pairs,
      **fields,
    )

  def both():
    q, k, v = t.inputs(n, heads, grad=True)
    d_out = t.torch.randn_like(q)

    def run():
      return t.torch.autograd.grad(t.flex(q, k, v, block_mask=mask), (q, k, v), d_out)

    name = f"torch_flex_forward_backward_{label}/{spec}"
    emit(name, t.facts, t.seconds(run, samples), pairs, backward=True, **fields)

  guarded(f"torch_flex_{label}/{spec}", t.facts, forward)
  if density >= 0.1:
    guarded(f"torch_flex_forward_backward_{label}/{spec}", t.facts, both)


def flex_window(t, spec, shape, tile_grid, samples):
  """The clamped 18x24x24 window: tiles of 384 tokens, 3x3x3 of them listed, refined to 128."""
  torch, (n, heads) = t.torch, shape
  where = torch.stack(
    torch.meshgrid(*(torch.arange(g) for g in tile_grid), indexing="ij"), -1
  ).reshape(-1, 3)
  centre = torch.stack(
    [where[:, a].clamp(min(1, g - 1), max(g - 2, 0)) for a, g in enumerate(tile_grid)], -1
  )
  seen = ((centre[:, None] - where[None]).abs() <= 1).all(-1)
  seen = seen.repeat_interleave(3, 0).repeat_interleave(3, 1).to(t.device)
  if seen.shape[0] * BLOCK != n:
    raise ValueError(f"{tile_grid=} holds {seen.shape[0] * BLOCK} tokens, {spec} has {n}.")
  mask, (q, k, v) = t.table(seen[None].expand(heads, -1, -1)), t.inputs(n, heads)
  pairs = int(seen.sum()) * BLOCK * BLOCK * heads
  times = t.seconds(lambda: t.flex(q, k, v, block_mask=mask), samples)
  emit(
    f"torch_flex_window/{spec}",
    t.facts,
    times,
    pairs,
    n=n,
    heads=heads,
    density=float(seen.float().mean()),
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on any device")
  parser.add_argument("--samples", type=int, default=20)
  options = parser.parse_args()
  shapes, t = TINY if options.rehearse else SHAPES, Torch()
  if not (t.cuda or options.rehearse):
    raise SystemExit(
      "torch sees no GPU: nothing to compare with (--rehearse runs tiny shapes on a CPU)"
    )
  with t.torch.device(t.device):

    def window():
      return flex_window(
        t, "b_115k", shapes["b_115k"], WINDOW_TILES[options.rehearse], options.samples
      )

    guarded("torch_flex_window/b_115k", t.facts, window)
    for spec, density in (("a_64k", 0.1), ("a_128k", 0.05), ("a_128k", 0.1)):
      flex_lists(t, spec, shapes[spec], density, options.samples)
    for spec in ("a_64k", "a_16k"):
      sdpa(t, spec, shapes[spec], options.samples)


if __name__ == "__main__":
  main()
