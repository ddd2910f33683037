"""Searches the kernels' configurations on this device and writes `kernels/tuning.json`.

  python -m benchmarks.gpu.tune --minutes=10        # on the GPU
  python -m benchmarks.gpu.tune --static            # anywhere: which candidates fit; prints and stores a report, writes no table
  python -m benchmarks.gpu.tune --rehearse --out=/tmp/x     # two candidates of a key with a stand-in, tiny, on a CPU

The table is written twice: into the checkout, where later runs read it, and as `kernels_tuning.json` beside the report, because
a rented machine gives back only its output folder.

Per key (head dimension, tile sizes, direction): candidates -> those that compile for the device without spilling and within
shared memory -> those that agree with the XLA backend -> the fastest. The default is always a candidate, and another one is
taken only where it is faster by more than `tune_trials.MARGIN`: below that, noise would write the table.
"""

import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags, logging
from freqformer.kernels.block_sparse import tuning
from freqformer.kernels.block_sparse.tuning import DIRECTIONS, Key, TuningConfig

from benchmarks import rows
from benchmarks.gpu.rows import Deadline, Store, kernels_digest, open_device
from benchmarks.gpu.timing import Effort
from benchmarks.gpu.tune_trials import Budget, Trial, choose, compile_candidate, time_candidates

_MINUTES = flags.DEFINE_float(
  "minutes", 10, "Stop by then; keys not reached keep what they have.", 0, allow_override=True
)
_STATIC = flags.DEFINE_bool(
  "static", False, "Only compile (no GPU needed) and report; no table is written."
)
_OUT = flags.DEFINE_string(
  "out",
  None,
  "Folder for the report's rows; default $OUT, else benchmarks/results.",
  allow_override=True,
)
_KEYS = flags.DEFINE_list(
  "keys", None, "Only these keys, as head_dim:block_q:block_kv:direction; default all."
)

_REHEARSE = flags.DEFINE_bool(
  "rehearse",
  False,
  "Tiny shapes and a stand-in on a CPU; writes the second copy of the table only.",
  allow_override=True,
)

# The second copy of the table.
COPY = "kernels_tuning.json"
# A rehearsal's tokens and effort.
_TINY_GRID = (4, 8, 16)
_ONCE = Effort(samples=1, slow_samples=1, chain_s=0.0, turns=1)

HEAD_DIMS, BLOCKS = (128, 64), (128, 64)


def all_keys(device: str) -> list[Key]:
  """Every key that the kernels look up, the most used first."""
  return [
    Key(device, d, q, kv, way)
    for d, q, kv, way in itertools.product(HEAD_DIMS, BLOCKS, BLOCKS, DIRECTIONS)
  ]


def parse_key(text: str, device: str) -> Key:
  """`128:128:64:dq`.

  Raises:
    ValueError: if it is not of that form.
  """
  try:
    d, q, kv, direction = text.split(":")
    return Key(device, int(d), int(q), int(kv), direction)
  except ValueError as error:
    raise ValueError(
      f"--keys={text!r} must be head_dim:block_q:block_kv:direction, e.g. 128:128:128:forward."
    ) from error


# ---- the search ----------------------------------------------------------------------------------------------------------


def search(
  keys: list[Key],
  store: Store,
  budget: Budget,
  static: bool,
  rehearse: bool = False,
  save: Callable[[dict[Key, TuningConfig]], None] | None = None,
) -> dict[Key, TuningConfig]:
  """Goes through the keys, a row of trials each.

  Args:
    keys: the most used first.
    store: of the rows.
    budget: of the whole search.
    static: compile only.
    rehearse: two candidates of a key, not compiled ahead, run by a stand-in on a tiny shape.
    save: gets everything chosen so far after each key, so that a search that is killed keeps what it had.

  Returns:
    what was chosen, for the keys that were timed.
  """
  chosen = {}
  for key in keys:
    if budget.deadline.left <= 0:
      print(
        "\n".join(f"unreached {row_name(late)}" for late in keys[keys.index(key) :]), flush=True
      )
      break
    print(f"begin {row_name(key)}", flush=True)
    if rehearse:
      trials = [Trial(config) for config in tuning.candidates(key)[:2]]
      trials = time_candidates(key, trials, "reference", budget, _TINY_GRID)
    else:
      trials = _known_trials(key) or _compiled(key, static)
    if not static and not rehearse:
      trials = time_candidates(key, trials, "pallas_mgpu", budget)
    if not static:
      if (best := choose(key, trials)) is not None:
        chosen[key] = best
    row = {
      "name": row_name(key),
      "key": vars(key),
      "static": static,
      "kernels": kernels_digest(),
      "trials": [t.row() for t in trials],
    }
    store.add(row | {"chosen": vars(chosen[key]) if key in chosen else None})
    if save is not None and key in chosen:
      save(chosen)
    verdict = "ok    " if static or key in chosen else "FAILED"
    print(f"{verdict}{row_name(key)}\n{report(key, trials, chosen.get(key))}", flush=True)
  return chosen


def _compiled(key: Key, static: bool) -> list[Trial]:
  """Every candidate after the compiler; on a device, running them decides if compiling ahead of time does not work there."""
  configs = tuning.candidates(key)
  try:
    trials = [compile_candidate(key, config) for config in configs]
  except RuntimeError as error:
    if static:
      raise
    logging.warning(
      "no compiling ahead of time here, candidates are judged by running them: %s", error
    )
    return [Trial(config) for config in configs]
  if not static and all(trial.refused.startswith("does not compile") for trial in trials):
    logging.warning(
      "no candidate of %s compiles ahead of time (%s); trying them on the device",
      key,
      trials[0].refused,
    )
    return [Trial(config) for config in configs]
  return trials


def row_name(key: Key) -> str:
  return f"tune: d={key.head_dim} {key.block_q}x{key.block_kv} {key.direction}"


def _known_trials(key: Key) -> list[Trial]:
  """What `--static` found for the same kernels: compiling forty candidates again would cost a minute per key on the GPU."""
  for row in rows.read_rows(rows.RESULTS / "tuning_static.json"):
    if row["name"] == row_name(key) and row["kernels"] == kernels_digest():
      return [
        Trial(TuningConfig(**t["config"]), t["refused"], t["registers"], t["shared_bytes"])
        for t in row["trials"]
      ]
  return []


def report(key: Key, trials: list[Trial], chosen: TuningConfig | None) -> str:
  """One key for people."""
  fit = [t for t in trials if not t.refused]
  lines = [
    f"d={key.head_dim} {key.block_q}x{key.block_kv} {key.direction}: {len(fit)} of {len(trials)} candidates fit"
  ]
  for t in sorted(trials, key=lambda t: (bool(t.refused), t.seconds or 0.0)):
    time = f"{1e3 * t.seconds:.3f} ms" if t.seconds else t.refused or "not timed"
    mark = "*" if t.config == chosen else " "
    fields = " ".join(f"{k}={v}" for k, v in vars(t.config).items())
    lines.append(f"  {mark} {fields:<86} {t.registers or '-':>4} registers  {time}")
  return "\n".join(lines)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  static, rehearse = _STATIC.value, _REHEARSE.value
  if rehearse and (static or not _OUT.value):
    raise app.UsageError(
      "--rehearse times a stand-in: give it a folder of its own with --out, and leave --static away."
    )
  open_device(static or rehearse)
  device = (
    "h100"  # the one that configurations are keyed by; other Hopper cards share its resources
  )
  keys = [parse_key(text, device) for text in _KEYS.value or ()] or all_keys(device)
  keys = keys[:1] if rehearse else keys
  folder = pathlib.Path(_OUT.value or os.environ.get("OUT") or rows.RESULTS)
  command = (
    "python -m benchmarks.gpu.tune"
    + (" --static" if static else "")
    + (" --rehearse" if rehearse else "")
  )
  store = Store.open(folder, "tuning_static" if static else "tuning", command, rehearse)
  deadline = Deadline(60 * _MINUTES.value)
  budget = Budget(deadline, _ONCE, _ONCE) if rehearse else Budget(deadline)
  places = [store.path.with_name(COPY), *([] if rehearse else [tuning.TABLE])]
  save = functools.partial(write_tables, places, store)
  chosen = search(keys, store, budget, static, rehearse, save)
  print(f"report: {store.path}")
  if static:
    print("static: nothing was timed, kernels/tuning.json is unchanged")
  elif chosen:
    print(
      f"wrote {len(chosen)} new configurations to {' and '.join(map(str, places))}; commit them as kernels/tuning.json"
    )
  else:
    sys.exit("nothing was timed: kernels/tuning.json is unchanged")


def write_tables(places: list[pathlib.Path], store: Store, chosen: dict[Key, TuningConfig]):
  """Writes the table with what was found so far.

  Args:
    places: files; a rehearsal has none in the checkout.
    store: its context says where and with what the configurations were timed.
    chosen: what was found.
  """
  facts = {
    k: store.context[k]
    for k in ("command", "device", "jax", "jaxlib", "ptxas", "driver", "commit", "date")
  }
  for place in places:
    tuning.write(
      committed() | chosen, facts | ({"rehearsal": True} if store.rehearsal else {}), place
    )


def committed() -> dict[Key, TuningConfig]:
  """The table as it is: what this run does not reach stays."""
  if not tuning.TABLE.exists():
    return {}
  found = json.loads(tuning.TABLE.read_text())["configs"]
  return {Key(**row["key"]): TuningConfig(**row["config"]) for row in found}


if __name__ == "__main__":
  app.run(main)
