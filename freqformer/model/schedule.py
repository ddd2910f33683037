"""The schedule that all methods share: the dense evaluations and layers of a sampling run."""

import dataclasses

from freqformer.config import ConfigError, build, require
from freqformer.methods.base import Method
from freqformer.methods.registry import parse_fields


@dataclasses.dataclass(frozen=True)
class DenseSchedule:
  """The evaluations and layers of a sampling run that attend densely; training ignores them.

  Attributes:
    dense_first: share of a run's evaluations at its start, at high noise. A share above 0 is one
      evaluation at least.
    dense_last: share at its end.
    dense_at: further evaluations, each by its number from 0 or by its place as a share of the run.
    dense_layers: numbers of layers that are dense in every evaluation; -1 is the last layer.
  """

  dense_first: float = 0.0
  dense_last: float = 0.0
  dense_at: tuple[int | float, ...] = ()
  dense_layers: tuple[int, ...] = ()

  def __post_init__(self):
    require(self, "dense_first dense_last", least=0, most=1)
    if self.dense_first + self.dense_last > 1:
      raise ValueError(
        f"dense_first={self.dense_first:g} and dense_last={self.dense_last:g} are together more "
        "than the whole run; lower one of them."
      )
    if any(v < 0 or isinstance(v, float) and v >= 1 for v in self.dense_at):
      raise ValueError(
        f"dense_at={self.dense_at} must hold evaluations (integers >= 0) or shares of the run in "
        "[0, 1)."
      )

  def evaluations(self, count: int) -> frozenset[int]:
    """Returns the numbers of the dense evaluations in a run of `count`.

    Raises:
      ConfigError: the run has no such evaluation.
    """

    def length(share):
      return min(count, max(1, int(share * count + 0.5))) if share else 0

    # Shares fall on evaluations as those of AdaSpa's searches do.
    places = [int(v * count + 1e-6) if isinstance(v, float) else v for v in self.dense_at]
    if places and max(places) >= count:
      raise ConfigError(
        f"attention.schedule.dense_at={self.dense_at} names evaluation {max(places)}, but the run "
        f"has {count} (0..{count - 1}); lower it or give shares such as 0.6."
      )
    ends = (*range(length(self.dense_first)), *range(count - length(self.dense_last), count))
    return frozenset((*places, *ends))

  def layers(self, depth: int) -> frozenset[int]:
    """Returns the numbers of the dense layers.

    Raises:
      ConfigError: the model has no such layer.
    """
    for layer in self.dense_layers:
      if not -depth <= layer < depth:
        raise ConfigError(
          f"attention.schedule.dense_layers={self.dense_layers}: there is no layer {layer} in a "
          f"model of {depth} layers (0..{depth - 1}, or from -1 backwards)."
        )
    return frozenset(layer % depth for layer in self.dense_layers)


def parse_schedule(text: str) -> DenseSchedule:
  """Reads `dense_first=0.1, dense_at=(5, 0.5)`; raises ConfigError for anything else."""
  fields = parse_fields(text, "attention.schedule", "dense_first=0.1, dense_at=(5, 0.5)")
  return build(DenseSchedule, fields, "model.attention.schedule")


def check_dense(method: Method, phase: str, number: int, count: int):
  """Raises ConfigError if evaluation `number` of `count`, of this phase, cannot be dense."""
  reason = method.refuses_dense(phase)
  if reason is not None:
    raise ConfigError(
      f"attention.schedule makes evaluation {number} of {count} dense, which "
      f"{type(method).__name__} cannot be: {reason}; change the schedule or the method."
    )


@dataclasses.dataclass(frozen=True)
class Part:
  """Neighbouring layers of one run that have the same phases.

  Attributes:
    run: number of the run of layers.
    first: its first layer, counted within the run.
    stop: one behind its last layer.
    dense: it is dense in every evaluation.
  """

  run: int
  first: int
  stop: int
  dense: bool = False

  @property
  def count(self) -> int:
    """Number of layers."""
    return self.stop - self.first
