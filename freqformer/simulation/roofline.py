"""Seconds of one kernel on one device.

Attention. A work item is a query tile on an SM. All SMs together take

  compute   computed FLOPs / attention_flops + softmax_exposed * exponentials / (SMs * their rate)
  l2        bytes of all lists / l2
  hbm       expected bytes of device memory / hbm

and the slowest of the three counts: they overlap. On top come `item_s` for every wave of items, the
tail, and `launch_s`. Tail: equal lists end in whole waves (`ceil(items / SMs)`); unequal ones,
dearest first, idle half a mean item on average.

Matrix products take the slower of FLOPs / matmul_flops and bytes / hbm; all else takes bytes / hbm.

Not modelled: instruction issue, bank conflicts, clocks that fall under load, host time, overlap
between kernels.
"""

import dataclasses
import math

from freqformer.kernels.block_sparse.cost import CallCost
from freqformer.simulation.descriptions import Gpu

# choice: a head's k and v stay in L2 if they fill no more than this share of it; q, out and the
# lists pass through too.
CACHE_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Seconds of one attention call, by the causes that the module names."""

  compute: float
  l2: float
  hbm: float
  tail: float
  items: float
  launch: float

  @property
  def total(self) -> float:
    return max(self.compute, self.l2, self.hbm) + self.tail + self.items + self.launch

  @property
  def bound(self) -> str:
    """The name of what limits it: "compute", "l2" or "hbm"."""
    return max(("compute", "l2", "hbm"), key=lambda name: getattr(self, name))


def expected_bytes(call: CallCost, gpu: Gpu, heads: float) -> float:
  """Returns the device memory traffic of a call on this device."""
  return call.expected_bytes(gpu.itemsize, CACHE_SHARE * gpu.l2_bytes, heads)


def attention_seconds(call: CallCost, gpu: Gpu, heads: float) -> Seconds:
  """Returns the seconds of one call over `heads` heads (times samples)."""
  rates = gpu.rates
  exponentials = call.computed_pairs / (gpu.sms * gpu.exp_per_sm_s)
  compute = call.computed_flops / rates.attention_flops + rates.softmax_exposed * exponentials
  l2 = call.l2_bytes(gpu.itemsize) / rates.l2
  hbm = expected_bytes(call, gpu, heads) / rates.hbm
  waves = call.items / gpu.sms
  body = max(compute, l2, hbm)
  if call.items and math.isclose(call.loads, call.items * call.longest, rel_tol=1e-9):
    tail = body * (math.ceil(waves - 1e-9) / waves - 1)
  else:
    tail = 0.5 * body / max(waves, 1.0)
  return Seconds(compute, l2, hbm, tail, math.ceil(waves) * rates.item_s, rates.launch_s)


def matmul_seconds(flops: float, moved: float, gpu: Gpu) -> float:
  """Returns the seconds of one matrix product of `flops` that moves `moved` bytes."""
  return max(flops / gpu.rates.matmul_flops, moved / gpu.rates.hbm) + gpu.rates.launch_s


def memory_seconds(moved: float, gpu: Gpu, launches: float = 1.0) -> float:
  """Returns the seconds of kernels that only move bytes."""
  return moved / gpu.rates.hbm + launches * gpu.rates.launch_s
