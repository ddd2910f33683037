"""The device that a call is traced for: an abstract mesh's device where one is set, else the default backend's."""

import dataclasses

import jax

# Compute capability by what the device's name contains, for devices that are only described (NVIDIA's list of CUDA GPUs);
# a GPU that is there says it itself. First match wins.
_CAPABILITIES = (
  ("H100", "9.0"),
  ("H200", "9.0"),
  ("H800", "9.0"),
  ("H20", "9.0"),
  ("GH200", "9.0"),
  ("B200", "10.0"),
  ("RTX 50", "12.0"),
  ("RTX 40", "8.9"),
  ("L40", "8.9"),
  ("L4", "8.9"),
  ("A100", "8.0"),
)


@dataclasses.dataclass(frozen=True)
class Target:
  """What a backend needs to know to accept or refuse.

  Attributes:
    platform: "cpu", "cuda" or "tpu".
    kind: the device's own name.
    capability: CUDA compute capability, "9.0"; None for other platforms and unknown GPUs that are not there.
  """

  platform: str
  kind: str
  capability: str | None = None

  def __str__(self):
    detail = f", compute capability {self.capability}" if self.capability else ""
    return f"{self.platform} ({self.kind}{detail})"


def current_target() -> Target:
  """The target of the code being traced now; one compiles for an absent GPU under an abstract mesh."""
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  if device is None:
    device = jax.local_devices()[0]
  platform = "cuda" if device.platform in ("gpu", "cuda") else device.platform
  return Target(platform, device.device_kind, _capability(device) if platform == "cuda" else None)


def _capability(device) -> str | None:
  said = getattr(device, "compute_capability", None)  # an abstract device has none
  if said is not None:
    return str(said)
  return next(
    (capability for name, capability in _CAPABILITIES if name in device.device_kind), None
  )
