"""Time and memory of calls: medians of interleaved repeats, and the peak of a child process."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
  """Wall times of one call, in seconds; each call is waited for."""

  times: tuple[float, ...]

  @property
  def median(self) -> float:
    return float(np.median(self.times))

  @property
  def p10(self) -> float:
    return float(np.percentile(self.times, 10))

  @property
  def p90(self) -> float:
    return float(np.percentile(self.times, 90))

  def row(self) -> dict[str, float | int]:
    """The fields of a results row."""
    return {"median_s": self.median, "p10_s": self.p10, "p90_s": self.p90, "calls": len(self.times)}


def interleave(
  calls: Mapping[str, Callable], rounds: int, slice_s: float = 0.5
) -> dict[str, Timing]:
  """Times competitors in turns.

  The first call of a turn is not counted: it pays for caches and memory as the competitor before it
  left them.

  Args:
    calls: functions without arguments that return JAX arrays; compiled and warmed up here.
    rounds: turns of each.
    slice_s: a fast call is repeated within its turn for about so many seconds; 0: one call per
      turn.
  """

  def sampler(call):
    jax.block_until_ready(call())
    repeats = int(np.clip(slice_s / timed(call), 1, 20)) if slice_s else 1
    return lambda turn: [timed(call) for _ in range(1 + repeats)][1:]

  return in_turns({name: sampler(call) for name, call in calls.items()}, rounds)


def in_turns(samplers: Mapping[str, Callable[[int], list[float]]], turns: int) -> dict[str, Timing]:
  """Asks competitors for samples in turn, A B C A B C.

  A machine that slows down then slows them all.

  Args:
    samplers: by name, `turn -> seconds of its calls`.
    turns: of each.
  """
  times = {name: [] for name in samplers}
  for turn in range(turns):
    for name, sampler in samplers.items():
      times[name] += sampler(turn)
  return {name: Timing(tuple(found)) for name, found in times.items()}


def timed(call: Callable) -> float:
  """Returns seconds until the result of one call is there."""
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def beside_others(measure: Callable[[], list[dict]]) -> list[dict]:
  """Returns measured rows with `others_cpu`, the share of the machine that others took meanwhile.

  It is the work of other processes over what all cores could have done, 0 to 1.
  """
  start = _cpu_times()
  found = measure()
  total, busy, own = _cpu_times() - start
  share = float(max(0.0, busy - own) / max(total, 1e-9))
  return [row | {"others_cpu": share} for row in found]


def _cpu_times() -> np.ndarray:
  """Returns CPU seconds: of the whole machine, of its busy part, of this process and children."""
  with open("/proc/stat") as f:
    ticks = [int(x) for x in f.readline().split()[1:9]]
  per_second = os.sysconf("SC_CLK_TCK")
  busy = sum(ticks) - ticks[3] - ticks[4]
  return np.array([sum(ticks) / per_second, busy / per_second, sum(os.times()[:4])])


def peak_rss() -> int:
  """Returns the bytes of resident memory that this process has reached, on Linux.

  `ru_maxrss` would be kept across exec, so that a child reported its parent's memory; VmHWM starts
  with the program.
  """
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def in_child(
  arguments: list[str], environment: Mapping[str, str] | None = None, timeout_s: float | None = None
) -> str:
  """Runs this Python in the repository's root and returns the last line that it prints.

  Args:
    arguments: of the interpreter.
    environment: variables to add.
    timeout_s: seconds that it may take; None: for ever.

  Raises:
    RuntimeError: if it fails or takes too long; the message ends with what it printed.
  """
  root = pathlib.Path(__file__).parent.parent
  command = [sys.executable, *arguments]
  env = {**os.environ, **(environment or {})}
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, check=False, cwd=root, env=env, timeout=timeout_s
    )
  except subprocess.TimeoutExpired as error:
    raise RuntimeError(
      f"python {' '.join(arguments)} took longer than {timeout_s:.0f} s"
    ) from error
  if done.returncode:
    raise RuntimeError(
      f"python {' '.join(arguments)} failed with {done.returncode}: {done.stderr[-2000:]}"
    )
  return done.stdout.strip().splitlines()[-1]
