"""Device time and wall time of GPU calls.

Wall time is measured over a chain of calls inside one jit: each call's q depends on the call before, so nothing can be
hoisted, overlapped or dropped, and dispatch is paid once per chain. Device time is what CUPTI reports for the kernels of one
call. Where there is no CUPTI (a CPU, a rehearsal, a failure) the wall clock stands alone and the row says so.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from benchmarks.timing import Timing, timed

# The profiler keeps every result of a batch of calls: at most so many bytes at once.
_IN_FLIGHT = 8 << 30


@dataclasses.dataclass(frozen=True)
class Effort:
  """How long to measure.

  Attributes:
    samples: of a call, at least 20 where figures are published.
    slow_samples: of a call that takes longer than `slow_s`.
    slow_s: where a call counts as slow, seconds.
    chain_s: a chain of calls takes at least so long, so that dispatch (about 0.1 ms) drowns.
    turns: samples of competitors alternate in so many turns, so that a clock that drifts slows them all.
  """

  samples: int = 20
  slow_samples: int = 5
  slow_s: float = 1.0
  chain_s: float = 0.03
  turns: int = 4

  def __post_init__(self):
    if min(self.samples, self.slow_samples, self.turns) < 1 or min(self.slow_s, self.chain_s) < 0:
      raise ValueError(f"counts must be >= 1 and seconds >= 0, got {self}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
  """`f(first, *rest)`; `first` is a floating-point array that a chain threads from call to call."""

  f: Callable
  args: tuple

  @functools.cached_property
  def probe(self) -> Callable:
    """The call alone, jitted, with all its results."""
    return jax.jit(self.f)

  def __call__(self):
    return self.probe(*self.args)


@dataclasses.dataclass(frozen=True)
class Measured:
  """Times of one call.

  Attributes:
    wall: per call, from chains.
    device: sum over the call's kernels; None where it could not be measured.
    kernels: median milliseconds by kernel name, the longest first.
    note: why there is no device time, or why there are few samples.
  """

  wall: Timing
  device: Timing | None = None
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)
  note: str = ""

  @property
  def seconds(self) -> float:
    """The figure that rows report: the device's where there is one."""
    return (self.device or self.wall).median

  def row(self) -> dict:
    """The fields of a results row."""
    clock = "device" if self.device else "wall"
    found = {"seconds": self.seconds, "clock": clock, "wall": self.wall.row()}
    found |= {"device_time": self.device.row(), "kernels": self.kernels} if self.device else {}
    return found | ({"timing_note": self.note} if self.note else {})


def measure(
  calls: Mapping[str, Call], effort: Effort = Effort(), kernels: bool | None = None
) -> dict[str, Measured]:
  """Times competitors in turns.

  Args:
    calls: by name.
    effort: how long.
    kernels: ask CUPTI for kernel times; None: where the default device is a GPU.
  """
  kernels = jax.default_backend() == "gpu" if kernels is None else kernels
  chains = {name: _Chain(call, effort) for name, call in calls.items()}
  for turn in range(effort.turns):
    for chain in chains.values():
      chain.sample(turn, effort.turns)
  found = {}
  for name, chain in chains.items():
    device, by_name, note = None, {}, chain.note
    if kernels:
      # A slow call's spread is in its wall times already.
      samples = effort.samples if chain.wall.median < 0.2 else effort.slow_samples
      device, by_name, trouble = device_times(calls[name], min(samples, chain.samples))
      note = "; ".join(filter(None, (note, trouble)))
    else:
      note = "; ".join(filter(None, (note, "wall clock only")))
    found[name] = Measured(chain.wall, device, by_name, note)
  return found


class _Chain:
  """One competitor's chain, its length chosen by a first call."""

  def __init__(self, call: Call, effort: Effort):
    self._rest = call.args[1:]
    jax.block_until_ready(call())
    once = timed(call)
    self.samples = effort.samples if once <= effort.slow_s else effort.slow_samples
    self.note = (
      ""
      if once <= effort.slow_s
      else f"{self.samples} samples: a call takes more than {effort.slow_s:g} s"
    )
    self._length = int(np.clip(effort.chain_s / once, 1, 200)) if effort.chain_s else 1
    self._run = jax.jit(functools.partial(_chained, call.f, self._length), donate_argnums=0)
    # Buffers of its own: every chain gives its input and results away and gets them back.
    results = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(call.f, *call.args)
    )
    self._state = (jnp.array(call.args[0], copy=True), results)
    jax.block_until_ready(self._step())
    self._times = []

  def sample(self, turn: int, turns: int):
    """This turn's share of the samples."""
    for _ in range(self.samples * turn // turns, self.samples * (turn + 1) // turns):
      self._times.append(timed(self._step) / self._length)

  def _step(self):
    self._state = self._run(self._state, *self._rest)
    return self._state

  @property
  def wall(self) -> Timing:
    return Timing(tuple(self._times))


def _chained(f, length, state, *rest):
  def step(_, state):
    x, _ = state
    results = f(x, *rest)
    # One element of the next input is computed from every result: a true dependence that costs a few microseconds.
    # The results are carried, so that all of them are written.
    return x.at[(0,) * x.ndim].set(_touch(results).astype(x.dtype)), results

  return jax.lax.fori_loop(0, length, step, state)


def _touch(outputs) -> jax.Array:
  """One finite number that depends on every output."""
  numbers = [jnp.ravel(x)[0] if x.ndim == 0 else x[(0,) * x.ndim] for x in jax.tree.leaves(outputs)]
  total = sum(x.astype(jnp.float32) for x in numbers)
  return jnp.where(jnp.isfinite(total), total, 0.0)


def device_times(call: Call, samples: int) -> tuple[Timing | None, dict[str, float], str]:
  """CUPTI's kernel times of a call: seconds per call, milliseconds by kernel, and why there are none.

  Anything that goes wrong in the profiler costs the device time, never the row.
  """
  results = jax.eval_shape(call.f, *call.args)
  at_once = max(
    1, _IN_FLIGHT // max(1, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(results)))
  )
  try:
    from jax.experimental.mosaic.gpu import profiler

    runs = []
    while len(runs) < samples:
      iterations = min(at_once, samples - len(runs))
      _, found = profiler.measure(call.probe, aggregate=False, iterations=iterations)(*call.args)
      if not found:
        return None, {}, "CUPTI saw no kernels"
      runs += [found] if iterations == 1 else found
    sums = tuple(sum(ms for _, ms in run) / 1e3 for run in runs)
    by_name = {}
    for run in runs:
      for name, ms in run:
        by_name.setdefault(name, []).append(ms)
    total = {name: float(sum(ms) / len(runs)) for name, ms in by_name.items()}
    longest = dict(sorted(total.items(), key=lambda kv: -kv[1])[:6])
    return Timing(sums), {name[:80]: ms for name, ms in longest.items()}, ""
  except Exception as error:
    logging.warning("no device time: %s", error)
    return None, {}, f"no device time: {type(error).__name__}: {str(error)[:200]}"
