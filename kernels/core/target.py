"""The device that a call is traced for: that of the abstract mesh, else the default one."""

import dataclasses

import jax

# Compute capability by name, first match, for GPUs that are only described (NVIDIA's list of GPUs).
_CAPABILITIES = {
  "GH200": "9.0",
  "H100": "9.0",
  "H200": "9.0",
  "H800": "9.0",
  "H20": "9.0",
  "B300": "10.3",
  "B200": "10.0",
  "Ada Generation": "8.9",
  "Quadro": "7.5",
  "RTX PRO": "12.0",
  "RTX 50": "12.0",
  "RTX 40": "8.9",
  "L40": "8.9",
  "L4": "8.9",
  "RTX 30": "8.6",
  "RTX A": "8.6",
  "A100": "8.0",
  "A30": "8.0",
  "A10": "8.6",
  "A40": "8.6",
}


@dataclasses.dataclass(frozen=True)
class Target:
  """A device, as far as an implementation must know it to accept or refuse a call.

  Attributes:
    platform: "cpu", "cuda" or "tpu".
    kind: the device's own name.
    capability: CUDA's, e.g. "9.0"; None elsewhere and for unknown GPUs that are not there.
  """

  platform: str
  kind: str
  capability: str | None = None

  def __str__(self):
    detail = f", compute capability {self.capability}" if self.capability else ""
    return f"{self.platform} ({self.kind}{detail})"


def current_target() -> Target:
  """Returns the target of the code being traced; an abstract mesh stands for an absent GPU."""
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  if device is None:
    device = jax.local_devices()[0]
  if device.platform not in ("gpu", "cuda"):
    return Target(device.platform, device.device_kind)
  return Target("cuda", device.device_kind, _capability(device))


def _capability(device) -> str | None:
  reported = getattr(device, "compute_capability", None)  # an abstract device has none
  if reported is not None:
    return str(reported)
  known = (number for name, number in _CAPABILITIES.items() if name in device.device_kind)
  return next(known, None)
