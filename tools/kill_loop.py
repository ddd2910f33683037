"""Kills a training run at random moments until it ends, and compares it with one left alone.

  python -m tools.kill_loop --minutes=10
  python -m benchmarks.cpu.kill_loop --rounds=20   # the same, and writes a row of results

Trains a tiny model on random fields, which is deterministic on a CPU. Each round is a new run whose
processes get SIGTERM or SIGKILL, until one of them reaches the end. Its last checkpoint must equal
that of the run left alone in every bit, and so must all losses of metrics.jsonl. A difference, or a
process that ends by anything but its signal, makes the exit code 1.
"""

import argparse
import collections
import dataclasses
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import orbax.checkpoint as ocp

from freqformer.train.checkpoint import Checkpoints
from freqformer.train.metrics import read

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {
  "data.grid": "2,8,8",
  "data.val_clips": "8",
  "model.width": "24",
  "model.depth": "1",
  "model.attention.method": "dense",
  "model.attention.tile": "2,4,4",
  "model.attention.block": "32",
  "train.steps": "200",
  "train.val_every": "20",
  "train.val_batches": "0",
  "train.log_every": "1",
  "train.checkpoint_every": "4",
  "train.samples": "1",
}
_ENDS = 120  # seconds within which SIGTERM must end a process
_REACH = 0.7  # choice: kills come within this share of what the whole run takes
_UNFINISHED = "was not finished"  # of the log line about a save that was killed
_SIGNALS = (signal.SIGTERM, signal.SIGKILL)


@dataclasses.dataclass
class Tally:
  """Counts of what was done: processes killed, by signal, and saves that a kill cut short."""

  kills: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  unfinished: int = 0


def start(workdir: pathlib.Path, changes: dict[str, str]) -> subprocess.Popen:
  """Starts the run, or its next process; what it says goes into <workdir>.log."""
  keys = [f"--config.{key}={value}" for key, value in (CONFIG | changes).items()]
  line = [sys.executable, "-m", "freqformer.command.train", f"--config={ROOT}/configs/fields.py"]
  with workdir.with_suffix(".log").open("a") as log:
    return subprocess.Popen([*line, f"--workdir={workdir}", *keys], cwd=ROOT, stderr=log)


def result(workdir: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[tuple, float]]:
  """Returns the arrays of the last checkpoint, and the losses by kind and step."""
  checkpoints = Checkpoints(workdir, create=False)
  arrays = ocp.StandardCheckpointer().restore(
    checkpoints.path / str(checkpoints.latest()) / "arrays"
  )
  rows = read(workdir / "metrics.jsonl")
  return arrays, {(row["kind"], row["step"]): row["loss"] for row in rows if "loss" in row}


def differences(wanted, found) -> list[str]:
  """Returns the names of arrays and losses of two results that are not the same in every bit."""
  names = []
  for a, b in zip(wanted, found, strict=True):
    names += [str(name) for name in a.keys() ^ b.keys()]
    names += [str(name) for name in a.keys() & b.keys() if not _same(a[name], b[name])]
  return names


def _same(a, b) -> bool:
  a = np.asarray(a)
  b = np.asarray(b)
  return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def disturbed(
  workdir: pathlib.Path, rng: random.Random, longest: float, changes: dict[str, str], tally: Tally
) -> str | None:
  """Runs to the end, killed at random moments within `longest` seconds; returns what went wrong."""
  while True:
    process = start(workdir, changes)
    try:
      code = process.wait(rng.uniform(0, longest))
      number = None
    except subprocess.TimeoutExpired:
      number = rng.choice(_SIGNALS)
      process.send_signal(number)
      tally.kills[number.name] += 1
      code = process.wait(_ENDS)
    if code not in (0, number and -number):
      return f"a process ended with exit code {code}"
    if number is None:
      tally.unfinished += workdir.with_suffix(".log").read_text().count(_UNFINISHED)
      return None


def kill_loop(
  folder: pathlib.Path, is_enough: Callable[[int, float], bool], seed: int, changes: dict[str, str]
) -> dict | None:
  """Runs rounds until there are enough of them, one at least.

  Args:
    folder: of all runs.
    is_enough: tells by the rounds that are done, and the seconds since the beginning.
    seed: of signals and moments.
    changes: of `CONFIG`.

  Returns:
    what was done, the fields of a row; None if something is wrong, which is printed.
  """
  begun = time.monotonic()
  for name in ("compiled", "alone"):  # the first one may compile, which would make kills rare
    clock = time.monotonic()
    if start(folder / name, changes).wait():
      print(f"the run that nothing disturbs failed: see {folder / name}.log")
      return None
    longest = _REACH * (time.monotonic() - clock)
  wanted = result(folder / "alone")
  if names := differences(wanted, result(folder / "compiled")):
    print(f"two runs that nothing disturbs differ: {', '.join(names[:5])}; see {folder}")
    return None
  rng = random.Random(seed)
  tally = Tally()
  rounds = 0
  while rounds == 0 or not is_enough(rounds, time.monotonic() - begun):
    rounds += 1
    workdir = folder / f"round-{rounds}"
    wrong = disturbed(workdir, rng, longest, changes, tally)
    if wrong is None and (names := differences(wanted, result(workdir))):
      wrong = f"{len(names)} arrays or losses differ: {', '.join(names[:5])}"
    if wrong is not None:
      print(f"round {rounds}: {wrong}; see {workdir}.log")
      return None
    kills = ", ".join(f"{count} {name}" for name, count in sorted(tally.kills.items()))
    text = f"round {rounds}: equal; so far {kills or 'no kill'}, {tally.unfinished} in a save"
    print(text, flush=True)
  arrays, losses = map(len, wanted)
  print(f"{arrays} arrays and {losses} losses of {rounds} runs are equal in every bit.")
  return {
    "rounds": rounds,
    "kills": dict(tally.kills),
    "kills_in_a_save": tally.unfinished,
    "equal_arrays": arrays,
    "equal_losses": losses,
    "seconds": round(time.monotonic() - begun),
    "seed": seed,
  }


def main() -> dict:
  """Runs the command; returns the fields of a row, or leaves where something is wrong."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  length = parser.add_mutually_exclusive_group()
  length.add_argument("--minutes", type=float, default=2.0, help="Begin no round after them.")
  length.add_argument("--rounds", type=int, help="Make so many.")
  parser.add_argument("--seed", type=int, default=0, help="Of signals and moments.")
  given = parser.parse_args()

  def is_enough(rounds: int, seconds: float) -> bool:
    return seconds >= 60 * given.minutes if given.rounds is None else rounds >= given.rounds

  # Kept where something is wrong, to be looked at.
  folder = pathlib.Path(tempfile.mkdtemp(prefix="kill_loop_"))
  found = kill_loop(folder, is_enough, given.seed, {})
  if found is None:
    sys.exit(1)
  shutil.rmtree(folder)
  return found


if __name__ == "__main__":
  main()
