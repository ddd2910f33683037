"""The empty rehearsal that some tests of `benchmarks/gpu` fill."""

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Deadline, open_store
from benchmarks.gpu.sizes import TINY


def tiny_bench(folder, implementation: str = "xla", minutes: float = 60.0) -> Bench:
  """Returns a benchmark of tiny shapes on the CPU, whose rows go into a folder."""
  store = open_store("attention_gpu_reference_{device}", "command", folder, rehearse=True)
  return Bench(TINY, store, Deadline(60 * minutes), implementation)
