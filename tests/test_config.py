"""Config dicts become dataclasses, or one sentence says why not."""

import dataclasses

import pytest

from freqformer.config import ConfigError, build


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 0.5
  size: tuple[int, int] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
  steps: int
  name: str = "a"
  inner: Inner = Inner()
  choice: str | tuple[int, ...] = "x"

  def __post_init__(self):
    if self.steps < 0:
      raise ValueError(f"{self.steps=} must be >= 0.")


def test_builds():
  values = dict(steps=3, inner=dict(rate=1, size=[3, 4]), choice=[1, 2])
  assert build(Outer, values) == Outer(3, "a", Inner(1.0, (3, 4)), (1, 2))


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(stesp=3), "config.Outer has no key 'stesp'; did you mean 'steps'"),
    (dict(), "lacks steps"),
    (dict(steps="3"), "config.steps must be int, got '3'"),
    (dict(steps=True), "config.steps must be int, got True"),
    (dict(steps=1, inner=dict(rat=1)), "config.inner has no key 'rat'; did you mean 'rate'"),
    (dict(steps=1, inner=dict(size=(1, 2, 3))), "config.inner.size must have 2 entries"),
    (dict(steps=1, inner=3), "config.inner must be a group of keys"),
    (dict(steps=1, choice=1.5), "config.choice must be str | tuple"),
    (dict(steps=-1), "steps=-1 must be >= 0"),
  ],
)
def test_refusals(values, message):
  with pytest.raises(ConfigError) as error:
    build(Outer, values)
  assert message in str(error.value)
