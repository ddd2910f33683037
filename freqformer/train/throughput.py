"""How much of a device a training run uses, counted in work that is really done."""

import dataclasses

import jax

from freqformer.cost import model_cost, training_flops, utilisation
from freqformer.simulation.descriptions import gpu_named, load_gpu


@dataclasses.dataclass(frozen=True)
class Throughput:
  """Rates of a training step.

  Attributes:
    flops: of one step, all samples: scored pairs only, every branch that a soft router runs, forward and backward.
    peak: FLOP/s of all devices by their data sheet, or None where the device is not described.
  """

  flops: float
  peak: float | None

  @classmethod
  def of(cls, model, latent_shape, batch: int) -> "Throughput":
    """Of a `ModelConfig` on this process's devices."""
    device = jax.devices()[0]
    peak = None if device.platform == "cpu" else peak_of(device.device_kind)
    flops = batch * training_flops(model_cost(model, latent_shape, training=True))
    return cls(flops, None if peak is None else peak * jax.device_count())

  def rates(self, steps_per_s: float) -> dict[str, float]:
    """`steps_per_s`, `tflops_per_s`, and `mfu` (sparse-aware: never dense FLOPs over sparse time) where the peak is known."""
    found = {"steps_per_s": steps_per_s, "tflops_per_s": self.flops * steps_per_s / 1e12}
    return (
      found
      if self.peak is None
      else found | {"mfu": utilisation(self.flops, 1 / steps_per_s, self.peak)}
    )


def peak_of(device_kind: str) -> float | None:
  """Dense bf16 FLOP/s of a device by the name that it gives itself; None if no description has that name."""
  name = gpu_named(device_kind)
  return None if name is None else load_gpu(name).tensor_flops
