"""PyTorch's attention on the same GPU: SDPA (flash, cuDNN), and FlexAttention on the same tables.

  python -m benchmarks.gpu.torch_peers    # one JSON row per line; --rehearse: tiny shapes

It needs torch with CUDA; jax only draws the tables, on the CPU. FlexAttention compiles its own
Triton kernels, about 20 s per shape. Times are CUDA events around single calls, in bfloat16 on
normal inputs.
"""

import argparse
import json
import time
from collections.abc import Callable

import jax
import numpy as np
from freqformer.kernels.block_sparse.table import BlockMask

from benchmarks.gpu import masks
from benchmarks.gpu.masks import Problem
from benchmarks.gpu.sizes import FULL, TINY
from benchmarks.timing import Timing
from freqformer.cost import BACKWARD_OVER_FORWARD, attention_cost

_SAMPLES = 20


class Torch:
  """PyTorch and the parts of it that are used; on a CPU everything runs in float32.

  Attributes:
    flex: FlexAttention's module.
    attend: its attention, compiled on a GPU.
  """

  def __init__(self):
    import torch
    from torch.nn.attention import flex_attention as flex

    self.torch = torch
    self.flex = flex
    self.cuda = torch.cuda.is_available()
    compiled = torch.compile(flex.flex_attention, dynamic=False) if self.cuda else None
    self.attend = compiled or flex.flex_attention

  def inputs(self, problem: Problem, count: int = 3, grad: bool = False) -> list:
    """Returns q, k, v (and a cotangent) `[batch, heads, rows, head_dim]`."""
    shape = (problem.spec.batch, problem.heads, problem.rows, problem.spec.head_dim)
    dtype = self.torch.bfloat16 if self.cuda else self.torch.float32
    return [self.torch.randn(shape, dtype=dtype, requires_grad=grad) for _ in range(count)]

  def table(self, mask: BlockMask):
    """Returns FlexAttention's form of our table, all of whose tiles are full."""
    ids = np.asarray(mask.indices())
    wide = ((0, 0),) * 3 + ((0, mask.kv_tiles - ids.shape[-1]),)
    counts, ids = (self.torch.asarray(x) for x in (np.asarray(mask.kv_counts), np.pad(ids, wide)))
    # Tiles that are listed are full ones, so that no mask is computed inside them.
    none = (self.torch.zeros_like(counts), self.torch.zeros_like(ids))
    sizes = (mask.block_q, mask.block_kv)
    return self.flex.BlockMask.from_kv_blocks(*none, counts, ids, BLOCK_SIZE=sizes)

  def seconds(self, run: Callable) -> Timing:
    """Times each call apart."""
    run()
    run()
    if not self.cuda:
      start = time.perf_counter()
      run()
      return Timing((time.perf_counter() - start,))
    times = []
    for _ in range(_SAMPLES):
      start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
      start.record()
      run()
      end.record()
      self.torch.cuda.synchronize()
      times.append(start.elapsed_time(end) / 1e3)
    return Timing(tuple(times))

  def emit(self, name: str, problem: Problem, make: Callable, direction: str = "forward"):
    """Prints the row of a call, which `make()` returns; one that fails is a row that says so."""
    row = {
      "name": name,
      "n": problem.spec.n,
      "heads": problem.heads,
      "head_dim": problem.spec.head_dim,
      "density": problem.density,
      "direction": direction,
      "implementation": "torch " + name.split("_")[1],
      "torch": self.torch.__version__,
      "torch_device": self.torch.cuda.get_device_name() if self.cuda else "cpu",
      "clock": "events" if self.cuda else "wall",
    }
    try:
      times = self.seconds(make())
    except Exception as error:
      row |= {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    else:
      # Useful FLOPs, of scored pairs.
      flops = attention_cost(problem.pairs, problem.spec.head_dim).attention_flops
      flops *= 1 + BACKWARD_OVER_FORWARD if direction == "forward_backward" else 1
      seconds = times.median
      row |= {"seconds": seconds, "device_time": times.row()}
      row |= {"flops": flops, "tflops": flops / seconds / 1e12}
    print(json.dumps(row), flush=True)

  def lists(self, name: str, problem: Problem, backward: bool = False):
    """Times FlexAttention on a table, forward, and if asked for forward and backward.

    A row per direction, named `torch_flex_<name>` and `torch_flex_forward_backward_<name>`.
    """

    def forward():
      q, k, v = self.inputs(problem)
      mask = self.table(problem.mask)
      return lambda: self.attend(q, k, v, block_mask=mask)

    def both():
      q, k, v = self.inputs(problem, grad=True)
      (d_out,) = self.inputs(problem, 1)
      mask = self.table(problem.mask)
      attend = self.attend
      return lambda: self.torch.autograd.grad(attend(q, k, v, block_mask=mask), (q, k, v), d_out)

    self.emit(f"torch_flex_{name}", problem, forward)
    if backward:
      self.emit(f"torch_flex_forward_backward_{name}", problem, both, "forward_backward")

  def dense(self, shape: str, problem: Problem):
    """Times dense attention through torch's two fast backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = self.inputs(problem)

    def call(backend):
      with sdpa_kernel(backend if self.cuda else SDPBackend.MATH):
        self.torch.nn.functional.scaled_dot_product_attention(q, k, v)

    fast = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, backend in fast.items():
      self.emit(f"torch_sdpa_{name}/{shape}", problem, lambda b=backend: lambda: call(b))


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on any device")
  rehearse = parser.parse_args().rehearse
  t = Torch()
  if not (t.cuda or rehearse):
    raise SystemExit(
      "torch sees no GPU: nothing to compare with (--rehearse runs tiny shapes on a CPU)"
    )
  jax.config.update("jax_platforms", "cpu")
  sizes = TINY if rehearse else FULL
  with t.torch.device("cuda" if t.cuda else "cpu"):
    t.lists("window/b_115k", masks.window(sizes.specs["b_115k"], sizes.window_tile))
    for shape, density in (("a_64k", 0.1), ("a_128k", 0.05), ("a_128k", 0.1)):
      problem = masks.random_lists(sizes.specs[shape], density)
      t.lists(f"d{round(density * 100):02d}/{shape}", problem, backward=density == 0.1)
    for shape in ("a_64k", "a_16k"):
      t.dense(shape, masks.dense(sizes.specs[shape]))


if __name__ == "__main__":
  main()
