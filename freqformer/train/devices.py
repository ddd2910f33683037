"""The devices that a command runs on, in one line for people."""

import os

import jax

from freqformer.config import ConfigError


def used_devices() -> list[jax.Device]:
  """Returns the devices that training and sampling run on: the first one, nothing is sharded.

  Raises:
    ConfigError: JAX finds none of those that `JAX_PLATFORMS` names.
  """
  return all_devices()[:1]


def describe_devices() -> str:
  """Returns which of the devices run: "runs on 1 of 4 NVIDIA H100 80GB HBM3; the others idle".

  Raises:
    ConfigError: JAX finds none of those that `JAX_PLATFORMS` names.
  """
  found = all_devices()
  used = len(used_devices())
  kind = found[0].device_kind
  if used == len(found):
    return f"runs on {kind}" if used == 1 else f"runs on {used} {kind}"
  others = "the other idles" if len(found) - used == 1 else "the others idle"
  return f"runs on {used} of {len(found)} {kind}; {others}"


def all_devices() -> list[jax.Device]:
  """Returns the devices that JAX finds; errors as of `used_devices`."""
  try:
    return jax.devices()
  except (AssertionError, RuntimeError) as error:  # depends on what exactly is missing
    asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    raise ConfigError(
      f"JAX_PLATFORMS={asked} names devices that JAX cannot use here ({reason}): unset it to run "
      "on what there is, or install the device's driver and pip install 'freqformer[gpu]'."
    ) from error
