"""The device that a call is traced for: an abstract mesh's device where one is set, else the default backend's."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Target:
  """What a backend needs to know to accept or refuse: `platform` ("cpu", "cuda", "tpu") and the device's own name."""

  platform: str
  kind: str

  def __str__(self):
    return f"{self.platform} ({self.kind})"


def current_target() -> Target:
  """The target of the code being traced now; one compiles for an absent GPU under an abstract mesh."""
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  if device is None:
    device = jax.local_devices()[0]
  platform = device.platform
  return Target("cuda" if platform == "gpu" else platform, device.device_kind)
