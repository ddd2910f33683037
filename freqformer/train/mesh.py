"""The mesh of devices that a run is spread over."""

import dataclasses
import math
import os

import jax
from jax.sharding import AxisType, Mesh

from freqformer.config import ConfigError, require
from freqformer.placement import AXES


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh.

  Attributes:
    data: copies of the model; -1 takes the devices that are left.
    fsdp: devices that share one copy's parameters, average and moments; each has its own samples.
    context: devices that share the tokens of one sample (`freqformer/placement.py`).
  """

  data: int = -1
  fsdp: int = 1
  context: int = 1

  def __post_init__(self):
    require(self, "data", least=-1)
    require(self, "fsdp context", least=1)
    if self.data == 0:
      raise ValueError("data=0 must be a number of copies, or -1 for as many as there is room for.")

  def sizes(self, devices: int) -> tuple[int, int, int]:
    """Returns (data, fsdp, context) on so many devices.

    Raises:
      ConfigError: they are too few, or cannot be divided.
    """
    each = self.fsdp * self.context
    data = devices // each if self.data == -1 else self.data
    if data == 0 or data * each > devices or (self.data == -1 and devices % each):
      fitting = [n for n in range(1, devices + 1) if devices % n == 0]
      raise ConfigError(
        f"config.mesh has data={self.data}, fsdp={self.fsdp} and context={self.context}, and JAX "
        f"finds {devices} device{'s' * (devices > 1)}: set mesh.data=-1, and mesh.fsdp times "
        f"mesh.context to one of {', '.join(map(str, fitting))}."
      )
    return data, self.fsdp, self.context


def make_mesh(config: MeshConfig, batch_size: int, accumulate: int = 1) -> Mesh:
  """Returns the mesh of the first devices, as many as the config asks for.

  Args:
    accumulate: micro-batches of a batch.

  Raises:
    ConfigError: the devices cannot be divided so, or a micro-batch not over the devices.
  """
  found = len(all_devices())
  sizes = config.sizes(found)
  count = math.prod(sizes)
  if count < found and jax.process_count() > 1:
    raise ConfigError(
      f"config.mesh takes {count} of the {found} devices of {jax.process_count()} processes, which "
      "train on all of theirs: set mesh.data=-1, or start fewer processes."
    )
  copies = sizes[0] * sizes[1]
  parts = copies * accumulate
  if batch_size % parts:
    each = f" in {accumulate} micro-batches" if accumulate > 1 else ""
    where = f"{copies} devices" if config.context == 1 else f"{copies} groups of {config.context}"
    raise ConfigError(
      f"config.train.batch_size={batch_size}{each} cannot be split over {where}: set it to "
      f"{parts * max(1, round(batch_size / parts))}, or mesh.data and mesh.fsdp to fewer."
    )
  return _mesh(sizes)


def whole_mesh(context: int = 1) -> Mesh:
  """Returns the mesh of all devices, each with a copy of the model: what samples are drawn on.

  Args:
    context: devices that share the tokens of one sample.

  Raises:
    ConfigError: they do not divide all devices.
  """
  found = len(all_devices())
  if found % context:
    raise ConfigError(
      f"--context={context} must divide the {found} device{'s' * (found > 1)} that JAX finds."
    )
  return _mesh((found // context, 1, context))


def _mesh(sizes: tuple[int, int, int]) -> Mesh:
  devices = all_devices()[: math.prod(sizes)]
  return jax.make_mesh(sizes, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def describe(mesh: Mesh) -> str:
  """Returns a line for people: "runs on 8 of 8 NVIDIA H100 80GB HBM3 (data 4 x fsdp 2)"."""
  found = len(all_devices())
  kind = mesh.devices.flat[0].device_kind
  if found == 1:
    return f"runs on {kind}"
  axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  idle = found - mesh.size
  if jax.process_count() > 1:
    axes += f" in {jax.process_count()} processes"
  rest = f"; {idle} idle{'s' * (idle == 1)}" if idle else ""
  return f"runs on {mesh.size} of {found} {kind} ({axes}){rest}"


def all_devices() -> list[jax.Device]:
  """Returns the devices that JAX finds.

  Raises:
    ConfigError: there are none of those that `JAX_PLATFORMS` names.
  """
  try:
    return jax.devices()
  except (AssertionError, RuntimeError) as error:  # depends on what exactly is missing
    asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    raise ConfigError(
      f"JAX_PLATFORMS={asked} names devices that JAX cannot use here ({reason}): unset it to run "
      "on what there is, or install the device's driver and pip install 'freqformer[gpu]'."
    ) from error
