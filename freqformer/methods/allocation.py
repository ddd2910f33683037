"""Allocations of heads to branches: the one place that says which ones are valid."""

import numpy as np

from freqformer.config import ConfigError


def head_shares(allocation, branches: tuple[str, ...]) -> np.ndarray:
  """Returns the share of heads per branch, float64 `[branches]`, summing to 1, of any weights.

  Raises:
    ConfigError: unless there is one finite weight >= 0 per branch and not all are 0.
  """
  try:
    weights = np.asarray(allocation, np.float64)
  except (TypeError, ValueError):
    weights = np.empty(0)
  one_each = weights.shape == (len(branches),)
  if not one_each or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
    raise ConfigError(
      f"{allocation=} must be {len(branches)} head counts ({', '.join(branches)}), none negative "
      "and not all 0."
    )
  return weights / weights.sum()


def deal_heads(costs: np.ndarray, devices: int) -> list[list[int]]:
  """Returns the ascending heads of each device: dealt dearest first to the least loaded with room.

  Args:
    costs: `[h]`, of each head.
    devices: each has room for `ceil(h / devices)` heads.
  """
  room = -(-len(costs) // devices)
  found = [[] for _ in range(devices)]
  loads = np.zeros(devices)
  for head in np.argsort(-np.asarray(costs), kind="stable"):
    free = [device for device in range(devices) if len(found[device]) < room]
    least = min(free, key=loads.__getitem__)
    found[least].append(int(head))
    loads[least] += costs[head]
  return [sorted(heads) for heads in found]


def check_counts(allocation, branches: tuple[str, ...]) -> None:
  """Raises ConfigError unless there is one whole number >= 0 of heads per branch, not all 0."""
  head_shares(allocation, branches)
  if any(count != int(count) for count in allocation):
    raise ConfigError(f"{allocation=} must be whole numbers of heads ({', '.join(branches)}).")


def check_heads(allocation, heads: int) -> None:
  """Raises ConfigError unless fixed head counts hand out every head of a layer, each once."""
  if sum(allocation) != heads:
    raise ConfigError(
      f"{allocation=} hands out {sum(allocation)} heads, the layer has {heads}; "
      'make them equal or use "routed".'
    )
