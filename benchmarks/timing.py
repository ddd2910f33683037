"""Time and memory of calls: medians of interleaved repeats, and the peak of a process of its own."""

import dataclasses
import os
import pathlib
import resource
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
  """Times competitors in turn, A B C A B C, so that a machine that slows down slows them all.

  Args:
    calls: functions without arguments that return JAX arrays; compiled and warmed up here.
    rounds: turns of each.
    slice_s: a fast call is repeated within its turn for about so long; 0: one call per turn.
  """
  repeats = {}
  for name, call in calls.items():
    jax.block_until_ready(call())
    repeats[name] = int(np.clip(slice_s / timed(call), 1, 20)) if slice_s else 1
  times = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      times[name] += [timed(call) for _ in range(repeats[name])]
  return {name: Timing(tuple(t)) for name, t in times.items()}


def timed(call) -> float:
  """Seconds until the result of one call is there."""
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


class Bystanders:
  """How much of the machine other processes take while this one measures."""

  def __init__(self):
    self._start = self._sample()

  @staticmethod
  def _sample():
    """Seconds of CPU time: the whole machine's, busy or idle, its busy part, and this process's with its children's."""
    with open("/proc/stat") as f:
      ticks = [int(x) for x in f.readline().split()[1:9]]
    tick, own = os.sysconf("SC_CLK_TCK"), os.times()
    return np.array([sum(ticks) / tick, (sum(ticks) - ticks[3] - ticks[4]) / tick, sum(own[:4])])

  def share(self) -> float:
    """Since the start, 0..1: work of others over what all cores could have done."""
    total, busy, own = self._sample() - self._start
    return float(max(0.0, busy - own) / max(total, 1e-9))


def peak_rss() -> int:
  """Bytes of resident memory this process has reached.

  Linux keeps `ru_maxrss` across exec, so a child would report its parent's memory; VmHWM starts with the program.
  """
  if os.path.exists("/proc/self/status"):
    with open("/proc/self/status") as f:
      for line in f:
        if line.startswith("VmHWM:"):
          return int(line.split()[1]) * 1024
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_child(
  arguments: list[str], environment: Mapping[str, str] | None = None, timeout_s: float | None = None
) -> str:
  """Runs this Python with `arguments` in the repository's root and returns the last line that it prints.

  Args:
    arguments: of the interpreter.
    environment: variables to add.
    timeout_s: how long it may take; None: for ever.

  Raises:
    RuntimeError: if it fails or takes too long, with what it said.
  """
  root, command = pathlib.Path(__file__).parent.parent, [sys.executable, *arguments]
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
