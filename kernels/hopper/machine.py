"""Facts about an H100 that the kernels share. Nothing here imports Pallas: a refusal is cheap."""

from freqformer.kernels.core.target import Target
from freqformer.kernels.hopper.interpret import is_interpreted

CAPABILITY = "9.0"  # compute capability of the Hopper generation
MULTIPROCESSORS = 132  # of an H100 SXM (NVIDIA's H100 whitepaper)
# Shared memory that a thread block may ask for: bytes (CUDA C programming guide, table of limits).
SHARED_BYTES = 227 * 1024
ROWS = 64  # rows of the product that one warpgroup makes at once (wgmma)


def wrong_device(target: Target) -> str | None:
  """Returns why Hopper kernels cannot run on a target; None where they can or are interpreted."""
  if is_interpreted() or target.capability == CAPABILITY:
    return None
  return (
    f"it needs an NVIDIA GPU of compute capability {CAPABILITY} (Hopper), the target is {target}"
  )
