"""Searches the kernels' configurations on this device and writes the table that kernels look up.

  python -m benchmarks.gpu.tune --minutes=10        # on the GPU
  python -m benchmarks.gpu.tune --static            # anywhere: a report of the candidates that fit
  python -m benchmarks.gpu.tune --rehearse --out=/tmp/x     # one key, tiny, a stand-in on a CPU

Per key (head dimension, tile sizes, direction): candidates -> those that compile for the device
without spilling and within shared memory -> those that agree with the XLA backend -> the fastest.
The table is written twice: into the checkout, and next to the report as `kernels_tuning.json`,
because a rented machine gives back only its output folder.
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Sequence

from absl import logging
from freqformer.kernels.block_sparse import tuning
from freqformer.kernels.block_sparse.tuning import DIRECTIONS, Key, TuningConfig

from benchmarks import rows
from benchmarks.gpu import device
from benchmarks.gpu.code import kernels_digest
from benchmarks.gpu.device import Deadline, open_device, open_store
from benchmarks.gpu.timing import Effort
from benchmarks.gpu.tune_trials import Budget, Trial, choose, compile_candidate, time_candidates
from benchmarks.rows import Store

# The second copy of the table.
COPY = "kernels_tuning.json"
# Configurations are keyed by this device; other Hopper cards share its resources.
DEVICE = "h100"
STATIC_REPORT = "tuning_static"
HEAD_DIMS = (128, 64)
BLOCKS = (128, 64)
# A rehearsal's tokens, effort and candidates.
_TINY_GRID = (4, 8, 16)
_ONCE = Effort(samples=1, slow_samples=1, chain_s=0.0, turns=1)
_FEW_CANDIDATES = 2


def all_keys() -> list[Key]:
  """Returns every key that the kernels look up, the most used first."""
  sizes = itertools.product(HEAD_DIMS, BLOCKS, BLOCKS, DIRECTIONS)
  return [Key(DEVICE, *size) for size in sizes]


def parse_key(text: str) -> Key:
  """Returns the key that e.g. `128:128:64:dq` names; a ValueError says the form."""
  try:
    d, q, kv, direction = text.split(":")
    return Key(DEVICE, int(d), int(q), int(kv), direction)
  except ValueError as error:
    raise ValueError(
      f"--keys={text!r} must be head_dim:block_q:block_kv:direction, e.g. 128:128:128:forward."
    ) from error


def search(
  keys: list[Key],
  store: Store,
  budget: Budget,
  static: bool = False,
  places: Sequence[pathlib.Path] = (),
) -> dict[Key, TuningConfig]:
  """Goes through the keys, the most used first, a row of trials each; returns the choices.

  Args:
    store: of the rows; a rehearsal's tries few candidates with a stand-in.
    budget: of the whole search.
    static: compile only.
    places: get the table after each key, so that a search that is killed keeps what it chose.
  """
  chosen = {}
  for key in keys:
    name = row_name(key)
    if budget.deadline.left <= 0:
      print(f"unreached {name}", flush=True)
      continue
    print(f"begin {name}", flush=True)
    if store.rehearsal:
      trials = [Trial(config) for config in tuning.candidates(key)[:_FEW_CANDIDATES]]
      trials = time_candidates(key, trials, "reference", budget, _TINY_GRID)
    else:
      trials = known_trials(key) or compiled(key, static)
      if not static:
        trials = time_candidates(key, trials, "pallas_mgpu", budget)
    best = None if static else choose(key, trials)
    row = {
      "name": name,
      "key": vars(key),
      "static": static,
      "kernels": kernels_digest(),
      "trials": [dataclasses.asdict(trial) for trial in trials],
      "chosen": vars(best) if best else None,
    }
    store.add(row)
    if best:
      chosen[key] = best
      write_tables(places, store, chosen)
    verdict = "ok    " if static or best else "FAILED"
    fit = sum(not trial.refused for trial in trials)
    print(f"{verdict}{name}  {fit} of {len(trials)} candidates fit; chosen: {best}", flush=True)
  return chosen


def compiled(key: Key, static: bool) -> list[Trial]:
  """Returns every candidate after the compiler.

  On a device, running them decides if compiling ahead of time does not work there.
  """
  configs = tuning.candidates(key)
  try:
    trials = [compile_candidate(key, config) for config in configs]
    if static or not all(trial.refused.startswith("does not compile") for trial in trials):
      return trials
    trouble = trials[0].refused
  except RuntimeError as error:
    if static:
      raise
    trouble = str(error)
  logging.warning("nothing compiles ahead of time here, candidates are judged by runs: %s", trouble)
  return [Trial(config) for config in configs]


def known_trials(key: Key) -> list[Trial]:
  """Returns the trials that `--static` found for the same kernels.

  Compiling forty candidates again would cost a minute per key on the GPU.
  """
  for row in rows.read_rows(rows.RESULTS / f"{STATIC_REPORT}.json"):
    if row["name"] == row_name(key) and row["kernels"] == kernels_digest():
      return [
        Trial(TuningConfig(**t["config"]), t["refused"], t["registers"], t["shared_bytes"])
        for t in row["trials"]
      ]
  return []


def row_name(key: Key) -> str:
  """Returns the name of a key's row."""
  return f"tune: d={key.head_dim} {key.block_q}x{key.block_kv} {key.direction}"


def write_tables(places: Sequence[pathlib.Path], store: Store, chosen: dict[Key, TuningConfig]):
  """Writes the table with what was found so far, and where and with what it was timed."""
  known = ("command", "device", "jax", "jaxlib", "ptxas", "driver", "commit", "date")
  facts = {name: store.context[name] for name in known}
  facts |= {"rehearsal": True} if store.rehearsal else {}
  # Keys that a run does not reach stay as they are in the checkout.
  configs = tuning.table() | chosen
  for place in places:
    tuning.write(configs, facts, place)


def command_line() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  parser = device.command_line(__doc__, minutes=10)
  parser.add_argument("--static", action="store_true", help="only compile, without a GPU")
  parser.add_argument(
    "--keys", default="", help="only these, as head_dim:block_q:block_kv:direction, by commas"
  )
  return parser


def main() -> int:
  parser = command_line()
  options = parser.parse_args()
  rehearse = options.rehearse
  if rehearse and options.static:
    parser.error("--rehearse times a stand-in: leave --static out.")
  open_device(options.static or rehearse)
  keys = [parse_key(text) for text in options.keys.split(",") if text] or all_keys()
  command = "python -m benchmarks.gpu.tune" + (" --static" if options.static else "")
  store = open_store(STATIC_REPORT if options.static else "tuning", command, options.out, rehearse)
  deadline = Deadline(60 * options.minutes)
  budget = Budget(deadline, _ONCE, _ONCE) if rehearse else Budget(deadline)
  places = [store.path.with_name(COPY), *([] if rehearse else [tuning.TABLE])]
  chosen = search(keys[:1] if rehearse else keys, store, budget, options.static, places)
  print(f"report: {store.path}")
  if options.static:
    print(f"static: nothing was timed, {tuning.TABLE.name} is unchanged")
    return 0
  print(f"{len(chosen)} new configurations; the table: {' and '.join(map(str, places))}")
  return 0 if chosen else 1


if __name__ == "__main__":
  sys.exit(main())
