"""Device time and wall time of GPU calls.

Wall time is measured over a chain of calls inside one jit: each call's first argument depends on
the call before, so that nothing can be hoisted, overlapped or dropped, and dispatch is paid once
per chain. Device time is the time that CUPTI reports for the kernels of one call. Where there is no
CUPTI (a CPU, a rehearsal, a failure) the wall clock stands alone and the row says so.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from benchmarks.timing import Timing, in_turns, timed

# The profiler keeps every result of a batch of calls: at most so many bytes at once.
_BYTES_IN_FLIGHT = 8 << 30
# Longest chain of calls in one jit.
_LONGEST_CHAIN = 200
# A call that takes longer gets few device samples: its spread is in its wall times already.
_LONG_CALL_SECONDS = 0.2
# Kernels that a row names, the longest first, and characters of each name.
_NAMED_KERNELS = 6
_NAME_CHARACTERS = 80


@dataclasses.dataclass(frozen=True)
class Effort:
  """Number of samples and length of chains.

  Attributes:
    samples: of a call, at least 20 where figures are published.
    slow_samples: of a call that takes longer than `slow_s`.
    slow_s: seconds from which on a call counts as slow.
    chain_s: least seconds of a chain, so that dispatch (about 0.1 ms) drowns.
    turns: samples of competitors alternate in so many turns, so that a drifting clock slows all.
  """

  samples: int = 20
  slow_samples: int = 5
  slow_s: float = 1.0
  chain_s: float = 0.03
  turns: int = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
  """A call `f(first, *rest)`; a chain threads the first, a floating-point array, through calls."""

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
    kernels: mean milliseconds by kernel name, the longest first.
    note: why there is no device time, or why there are few samples.
  """

  wall: Timing
  device: Timing | None = None
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)
  note: str = ""

  @property
  def seconds(self) -> float:
    """The median that rows report: the device's where there is one."""
    return (self.device or self.wall).median

  def row(self) -> dict:
    """Returns the fields of a results row."""
    clock = "device" if self.device else "wall"
    found = {"seconds": self.seconds, "clock": clock, "wall": self.wall.row()}
    if self.device:
      found |= {"device_time": self.device.row(), "kernels": self.kernels}
    return found | ({"timing_note": self.note} if self.note else {})


def measure(calls: Mapping[str, Call], effort: Effort) -> dict[str, Measured]:
  """Times competitors in turns, and on a GPU their kernels."""
  chains = {name: _Chain(call, effort) for name, call in calls.items()}
  walls = in_turns({name: chain.sample for name, chain in chains.items()}, effort.turns)
  found = {}
  for name, chain in chains.items():
    measured = Measured(walls[name], note="wall clock only")
    if jax.default_backend() == "gpu":
      few = effort.slow_samples if walls[name].median > _LONG_CALL_SECONDS else effort.samples
      measured = device_times(calls[name], walls[name], min(few, chain.samples))
    note = "; ".join(filter(None, (chain.note, measured.note)))
    found[name] = dataclasses.replace(measured, note=note)
  return found


class _Chain:
  """One competitor's chain, its length chosen by a first call."""

  def __init__(self, call: Call, effort: Effort):
    self._rest = call.args[1:]
    self._turns = effort.turns
    jax.block_until_ready(call())
    once = timed(call)
    slow = once > effort.slow_s
    self.samples = effort.slow_samples if slow else effort.samples
    self.note = ""
    if slow:
      self.note = f"{self.samples} samples: a call takes more than {effort.slow_s:g} s"
    self._length = int(np.clip(effort.chain_s / once, 1, _LONGEST_CHAIN)) if effort.chain_s else 1
    self._run = jax.jit(functools.partial(chained, call.f, self._length), donate_argnums=0)
    # Buffers of its own: every chain gives its input and results away and gets them back.
    shapes = jax.eval_shape(call.f, *call.args)
    results = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    self._state = (jnp.array(call.args[0], copy=True), results)
    jax.block_until_ready(self._step())

  def sample(self, turn: int) -> list[float]:
    """Returns this turn's share of the samples, seconds per call."""
    first = self.samples * turn // self._turns
    last = self.samples * (turn + 1) // self._turns
    return [timed(self._step) / self._length for _ in range(first, last)]

  def _step(self):
    self._state = self._run(self._state, *self._rest)
    return self._state


def chained(f: Callable, length: int, state: tuple, *rest) -> tuple:
  """Runs `length` calls `f(first, *rest)`, each on the one before; `state` is (first, results)."""

  def step(_, state):
    x, _ = state
    results = f(x, *rest)
    # One element of the next input is computed from every result: a true dependence that costs a
    # few microseconds. The results are carried, so that all of them are written.
    return x.at[(0,) * x.ndim].set(_touch(results).astype(x.dtype)), results

  return jax.lax.fori_loop(0, length, step, state)


def _touch(outputs) -> jax.Array:
  """Returns one finite number that depends on every output."""
  total = sum(x[(0,) * x.ndim].astype(jnp.float32) for x in jax.tree.leaves(outputs))
  return jnp.where(jnp.isfinite(total), total, 0.0)


def device_times(call: Call, wall: Timing, samples: int) -> Measured:
  """Adds CUPTI's kernel times to the wall times of a call.

  Anything that goes wrong in the profiler costs the device time, never the row.
  """
  results = jax.tree.leaves(jax.eval_shape(call.f, *call.args))
  size = sum(x.size * x.dtype.itemsize for x in results)
  at_once = max(1, _BYTES_IN_FLIGHT // max(1, size))
  try:
    from jax.experimental.mosaic.gpu import profiler

    runs = []
    while len(runs) < samples:
      iterations = min(at_once, samples - len(runs))
      _, found = profiler.measure(call.probe, aggregate=False, iterations=iterations)(*call.args)
      if not found:
        return Measured(wall, note="CUPTI saw no kernels")
      runs += [found] if iterations == 1 else found
  except Exception as error:
    logging.warning("no device time: %s", error)
    note = f"no device time: {type(error).__name__}: {str(error)[:200]}"
    return Measured(wall, note=note)
  sums = tuple(sum(ms for _, ms in run) / 1e3 for run in runs)
  by_name: dict[str, float] = {}
  for name, ms in (kernel for run in runs for kernel in run):
    by_name[name] = by_name.get(name, 0.0) + ms / len(runs)
  longest = sorted(by_name.items(), key=lambda item: -item[1])[:_NAMED_KERNELS]
  return Measured(wall, Timing(sums), {name[:_NAME_CHARACTERS]: ms for name, ms in longest})
