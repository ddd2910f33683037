"""Steps that are traced: which are refused, and that a trace holds those and no others."""

import jax.numpy as jnp
import pytest

from freqformer.config import ConfigError
from freqformer.train import trace
from freqformer.train.trace import Trace


@pytest.mark.parametrize("text", ["10", "20:10", "a:b", "3:", "-1:4", "1:2:3"])
def test_what_is_no_range_of_steps_is_refused(text):
  with pytest.raises(ConfigError, match=f"^--profile={text} must be two steps.*10:20"):
    Trace(text)


@pytest.mark.parametrize("done, steps, fits", [(0, 40, True), (9, 20, True), (10, 40, False)])
def test_steps_outside_the_run_are_refused(done, steps, fits):
  assert Trace().check(done, steps) is None
  if fits:
    assert Trace("10:20").check(done, steps) is None
    with pytest.raises(ConfigError, match=r"--profile=1:99 lies outside .* steps \d+ to \d+\.$"):
      Trace("1:99").check(done, steps)
  else:
    with pytest.raises(ConfigError, match="which makes steps 11 to 40"):
      Trace("10:20").check(done, steps)


def test_the_steps_are_traced_and_no_others(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(trace.jax.profiler, "start_trace", lambda path: calls.append(str(path)))
  monkeypatch.setattr(trace.jax.profiler, "stop_trace", lambda: calls.append("stop"))
  tracing = Trace("3:4")
  for step in (1, 2, 3, 4, 5):
    tracing.before(step, tmp_path)
    calls.append(step)
    tracing.after(step, jnp.zeros(1))
  assert calls == [1, 2, str(tmp_path / "profile"), 3, 4, "stop", 5]
