"""Searches the kernels' configurations on this device and writes the table that kernels look up.

  python -m benchmarks.gpu.tune --minutes=10        # on the GPU
  python -m benchmarks.gpu.tune --static            # anywhere: a report of the candidates that fit
  python -m benchmarks.gpu.tune --implementation=triton --static --target=rtx4090     # likewise
  python -m benchmarks.gpu.tune --rehearse --out=/tmp/x     # one key, tiny, a stand-in on a CPU

Per key (head dimension, tile sizes, direction): candidates -> those that compile for the device
without spilling and within shared memory -> those that agree with the XLA backend -> the fastest.
The table is written twice: into the checkout, and next to the report as `kernels_tuning.json`,
because a rented machine gives back only its output folder.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from absl import logging

from benchmarks import rows
from benchmarks.gpu import device
from benchmarks.gpu.code import kernels_digest
from benchmarks.gpu.device import Deadline, open_device, open_store
from benchmarks.gpu.timing import Effort
from benchmarks.gpu.tune_subjects import SUBJECTS, Subject
from benchmarks.gpu.tune_trials import Budget, Trial, choose, compile_candidate, time_candidates
from benchmarks.rows import Store

STATIC_REPORT = "tuning_static"
# A rehearsal's tokens, effort and candidates.
_TINY_GRID = (4, 8, 16)
_ONCE = Effort(samples=1, slow_samples=1, chain_s=0.0, turns=1)
_FEW_CANDIDATES = 2


def search(
  subject: Subject,
  keys: list,
  store: Store,
  budget: Budget,
  static: bool = False,
  places: Sequence[pathlib.Path] = (),
) -> dict:
  """Goes through the keys, the most used first, a row of trials each; returns the choices.

  Args:
    subject: what is searched.
    keys: of it.
    store: of the rows; a rehearsal's tries few candidates with a stand-in.
    budget: of the whole search.
    static: compile only.
    places: get the table after each key, so that a search that is killed keeps what it chose.
  """
  chosen = {}
  for key in keys:
    name = row_name(subject, key)
    if budget.deadline.left <= 0:
      print(f"unreached {name}", flush=True)
      continue
    print(f"begin {name}", flush=True)
    if store.rehearsal:
      trials = [Trial(c) for c in subject.tuning.candidates(key)[:_FEW_CANDIDATES]]
      trials = time_candidates(subject, key, trials, "reference", budget, _TINY_GRID)
    else:
      trials = known_trials(subject, key) or compiled(subject, key, static)
      if not static:
        trials = time_candidates(subject, key, trials, subject.implementation, budget)
    best = None if static else choose(subject, key, trials)
    row = {
      "name": name,
      "key": vars(key),
      "static": static,
      "kernels": kernels_digest(subject.implementation),
      "trials": [dataclasses.asdict(trial) for trial in trials],
      "chosen": vars(best) if best else None,
    }
    store.add(row)
    if best:
      chosen[key] = best
      write_tables(subject, places, store, chosen)
    verdict = "ok    " if static or best else "FAILED"
    fit = sum(not trial.refused for trial in trials)
    print(f"{verdict}{name}  {fit} of {len(trials)} candidates fit; chosen: {best}", flush=True)
  return chosen


def compiled(subject: Subject, key, static: bool) -> list[Trial]:
  """Returns every candidate after the compiler.

  On a device, running them decides if compiling ahead of time does not work there.
  """
  configs = subject.tuning.candidates(key)
  try:
    trials = [compile_candidate(subject, key, config) for config in configs]
    if static or not all(trial.refused.startswith("does not compile") for trial in trials):
      return trials
    trouble = trials[0].refused
  except RuntimeError as error:
    if static:
      raise
    trouble = str(error)
  logging.warning("nothing compiles ahead of time here, candidates are judged by runs: %s", trouble)
  return [Trial(config) for config in configs]


def known_trials(subject: Subject, key) -> list[Trial]:
  """Returns the trials that `--static` found for the same kernels.

  Compiling forty candidates again would cost a minute per key on the GPU.
  """
  report = report_name(subject, key.device, static=True)
  digest = kernels_digest(subject.implementation)
  for row in rows.read_rows(rows.RESULTS / f"{report}.json"):
    if row["name"] == row_name(subject, key) and row["kernels"] == digest:
      return [
        Trial(subject.config(**t["config"]), t["refused"], t["registers"], t["shared_bytes"])
        for t in row["trials"]
      ]
  return []


def row_name(subject: Subject, key) -> str:
  """Returns the name of a key's row."""
  whose = "" if subject.implementation == "hopper" else f"{subject.implementation} {key.device} "
  return f"tune: {whose}d={key.head_dim} {key.block_q}x{key.block_kv} {key.direction}"


def report_name(subject: Subject, device: str, static: bool) -> str:
  """Returns the name of the file of rows."""
  whose = "" if subject.implementation == "hopper" else f"_{subject.implementation}_{device}"
  return (STATIC_REPORT if static else "tuning") + whose


def write_tables(subject: Subject, places: Sequence[pathlib.Path], store: Store, chosen: dict):
  """Writes the table with what was found so far, and where and with what it was timed."""
  known = ("command", "device", "jax", "jaxlib", "ptxas", "driver", "commit", "date")
  facts = {name: store.context[name] for name in known}
  facts |= {"rehearsal": True} if store.rehearsal else {}
  # Keys that a run does not reach stay as they are in the checkout.
  configs = subject.tuning.table() | chosen
  for place in places:
    subject.tuning.write(configs, facts, place)


def command_line() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  parser = device.command_line(__doc__, minutes=10)
  parser.add_argument("--implementation", choices=SUBJECTS, default="hopper", help="of attention")
  parser.add_argument(
    "--target", default="", help="with --static: a GPU of tools/targets, e.g. rtx4090"
  )
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
  subject = SUBJECTS[options.implementation]
  try:
    device = subject.device(options.target or (next(iter(subject.targets.values())) * rehearse))
    keys = [subject.parse_key(text, device) for text in options.keys.split(",") if text]
  except ValueError as error:
    parser.error(str(error))
  keys = keys or subject.all_keys(device)
  command = "python -m benchmarks.gpu.tune" + (" --static" if options.static else "")
  if subject.implementation != "hopper":
    command += f" --implementation={subject.implementation}"
    command += f" --target={options.target}" if options.target else ""
  name = report_name(subject, device, options.static)
  store = open_store(name, command, options.out, rehearse)
  deadline = Deadline(60 * options.minutes)
  budget = Budget(deadline, _ONCE, _ONCE) if rehearse else Budget(deadline)
  table = subject.tuning.TABLE
  places = [store.path.with_name(f"kernels_{table.name}"), *([] if rehearse else [table])]
  chosen = search(subject, keys[:1] if rehearse else keys, store, budget, options.static, places)
  print(f"report: {store.path}")
  if options.static:
    print(f"static: nothing was timed, {table.name} is unchanged")
    return 0
  print(f"{len(chosen)} new configurations; the table: {' and '.join(map(str, places))}")
  return 0 if chosen else 1


if __name__ == "__main__":
  sys.exit(main())
