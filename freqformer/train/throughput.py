"""Utilisation of the devices by a training run, counted in work that is really done."""

import dataclasses

from freqformer.cost import step_cost, utilisation
from freqformer.model.config import ModelConfig
from freqformer.simulation.descriptions import gpu_named, load_gpu
from freqformer.train.step import TrainConfig


@dataclasses.dataclass(frozen=True)
class Throughput:
  """Rates of a training step.

  Attributes:
    flops: of one step, all samples, as `freqformer.cost.step_cost` counts: scored pairs only, every
      branch that a soft router runs, forward and backward.
    dense_flops: of training all of the model with dense attention in all layers.
    peak: FLOP/s by data sheet of the devices that run, or None if they are not described.
  """

  flops: float
  dense_flops: float
  peak: float | None

  @classmethod
  def of(
    cls,
    model: ModelConfig,
    latent_shape,
    batch: int,
    devices,
    train: TrainConfig | None = None,
    dense: int = 0,
  ) -> "Throughput":
    """Returns the throughput of a model on the devices that run it; idle ones do not count.

    Args:
      model: what is trained.
      latent_shape: `(t, y, x, c)`.
      batch: samples of a step.
      devices: that run it.
      train: what of it is trained, and by which teacher; None: all, without one.
      dense: number of the first layers that attend densely.
    """
    device = devices[0]
    peak = None if device.platform == "cpu" else peak_of(device.device_kind)
    options = {} if train is None else train.counted
    flops = batch * step_cost(model, latent_shape, dense=dense, **options).total
    dense_flops = batch * step_cost(model.with_method("dense"), latent_shape).total
    return cls(flops, dense_flops, None if peak is None else peak * len(devices))

  def rates(self, steps_per_s: float) -> dict[str, float]:
    """Returns `steps_per_s`, `tflops_per_s` and, where the peak is known, `mfu` of sparse FLOPs.

    Beside the work that is done, `dense_equivalent_...` is what a model with dense attention would
    have to do to be as fast. It compares methods; it uses no device, and may be above its peak.
    """
    found = {"steps_per_s": steps_per_s}
    for name, flops in (("", self.flops), ("dense_equivalent_", self.dense_flops)):
      found[f"{name}tflops_per_s"] = flops * steps_per_s / 1e12
      if self.peak is not None:
        found[f"{name}mfu"] = utilisation(flops, 1 / steps_per_s, self.peak)
    return found


def steps_within(seconds: float, step_seconds: float, most: int, unit: int) -> int:
  """Returns how many training steps, `most` at most, fit into so many seconds.

  It is a multiple of `unit`, or `most`, and a unit where not even that fits.
  """
  room = int(seconds / step_seconds) // unit * unit
  return min(most, max(room, unit))


def peak_of(device_kind: str) -> float | None:
  """Returns dense bf16 FLOP/s of a device by its own name; None if it is not described."""
  name = gpu_named(device_kind)
  return None if name is None else load_gpu(name).tensor_flops
