"""Runs a sweep: one workdir per trial; finished trials are skipped, killed ones resumed.

Several sweeps may run on one study at once, one on each GPU say: each takes the next free trial.

  python -m freqformer.sweep --config=configs/ucf101.py --study=runs/study
  python -m freqformer.sweep --config=configs/demo.py --study=runs/study --override=train.steps=9
  python -m freqformer.sweep --config=configs/demo.py --study=runs/study --list
  python -m freqformer.sweep --config=configs/demo.py --study=runs/search --search=20

A config's `sweep()` yields flat overrides (`{"train.lr": 0.1}`). Each trial is one training command
with them, which is logged; its first line says which device it runs on. All trials are checked
before the first one runs. The table at the end is also written as study.json. report.html shows it
with validation loss over steps, FLOPs and seconds (also losses.png), and the trials that no other
one beats in both loss and cost. Trials that differ in nothing but their seed are summed up by mean
and spread; `--seeds=0,1,2` runs every trial with each. The exit code is 1 if a trial failed.

`--search=20` takes the overrides from Optuna instead, which searches a config's `space()` until
there are 20 trials. `--prune` stops trials that at equal training FLOPs are worse than the median
of earlier ones; the same command without it goes on with them. docs/sweeps.md has more.
"""

import pathlib
import sys
from collections.abc import Iterable, Sequence

from absl import flags, logging

from freqformer.command import cli
from freqformer.command.files import load_config
from freqformer.command.prune import MedianRule
from freqformer.command.search import search
from freqformer.command.trials import (
  Trial,
  changed,
  ran,
  refuse_changed,
  result_of,
  row_of,
  run_if_free,
  trial_name,
  write,
)
from freqformer.config import ConfigError
from freqformer.pages.study import table, write_study
from freqformer.train.preemption import StopRequest


def with_seeds(overrides: Iterable[dict], seeds: Sequence[int]) -> list[dict]:
  """Returns the overrides of every trial once with each seed; without seeds as they are.

  Raises:
    ConfigError: a trial has a seed of its own, or a seed is given twice.
  """
  overrides = list(overrides)
  if not seeds:
    return overrides
  if len(set(seeds)) < len(seeds):
    raise ConfigError(f"--seeds={','.join(map(str, seeds))} must name each seed once.")
  own = next((trial for trial in overrides if "seed" in trial), None)
  if own is not None:
    raise ConfigError(
      f"trial {trial_name(own)} sets its own seed; leave --seeds out, or the trial's seed."
    )
  return [trial | {"seed": seed} for trial in overrides for seed in seeds]


def sweep(
  config_path,
  study,
  extra: dict,
  list_only: bool = False,
  seeds: Sequence[int] = (),
  prune: bool = False,
) -> list[dict]:
  """Runs a study, or goes on with it, and returns its rows.

  Args:
    extra: overrides keys of every trial.
    list_only: nothing runs.
    seeds: every trial runs once with each; without any, with the config's own.
    prune: trials that fall behind the others are stopped, see `freqformer.command.prune`.

  Raises:
    ConfigError: a trial's config is wrong, or a trial ran with another config than it would run
      with now.
  """
  study = pathlib.Path(study)
  module = load_config(config_path, ("get_config", "sweep"))
  overrides = with_seeds((extra | own for own in module.sweep()), seeds)
  trials = {trial_name(own): Trial(config_path, study, own) for own in overrides}
  stale = changed(trials.values())
  if not list_only:
    refuse_changed(stale, len(trials), study)
  own = {}
  before = ran(study)
  with StopRequest() as stop:
    for number, (name, trial) in enumerate(trials.items(), 1):
      if not list_only and not stop() and result_of(trial.workdir) is None:
        logging.info("trial %d of %d: %s", number, len(trials), name)
        own[name] = run_if_free(
          trial,
          before.get(name),
          stop,
          lambda row: write(study, [row], trials),
          MedianRule if prune else None,
        )
        if own[name]["status"].startswith("running"):
          logging.info("%s is %s", name, own[name]["status"])
          del own[name]
  # What other sweeps ran meanwhile is as it is now.
  rows = [own.get(name) or row_of(trial) for name, trial in trials.items()]
  if not list_only:
    write(study, rows, trials)
  for row in rows:
    if row["trial"] in stale:
      row["status"] += f" with another config: {stale[row['trial']]}"
  return rows


def _seeds() -> list[int]:
  """Returns the numbers of --seeds=0,1,2."""
  try:
    return [int(seed) for seed in _SEEDS.value]
  except ValueError as error:
    given = ",".join(_SEEDS.value)
    raise ConfigError(f"--seeds={given} must be whole numbers, e.g. --seeds=0,1,2.") from error


def main(_):
  extra = {}
  for item in _OVERRIDE.value:
    key, separator, value = item.partition("=")
    if not separator:
      raise ConfigError(f"--override={item!r} must read key=value, e.g. train.steps=100.")
    extra[key] = value
  if _SEARCH.value is None:
    if _STORAGE.value is not None:
      raise ConfigError(f"--storage={_STORAGE.value} is Optuna's; add --search=20, say.")
    rows = sweep(_CONFIG.value, _STUDY.value, extra, _LIST.value, _seeds(), _PRUNE.value)
  elif _SEEDS.value:
    raise ConfigError(
      f"--seeds={','.join(_SEEDS.value)} does not go with --search; set --override=seed=1, say, or "
      "run the best trials again by a sweep()."
    )
  else:
    rows = search(
      _CONFIG.value, _STUDY.value, extra, _SEARCH.value, _STORAGE.value, _LIST.value, _PRUNE.value
    )
  print(table(rows))
  if pathlib.Path(_STUDY.value).exists():
    logging.info("%s", write_study(_STUDY.value, rows))
  failed = [row for row in rows if row["status"].startswith("exit")]
  if failed and not _LIST.value:
    logging.error("%d of %d trials failed; each has logged why above", len(failed), len(rows))
    sys.exit(1)


if __name__ == "__main__":
  # Not at import: other commands have a --config of their own.
  _CONFIG = cli.define_path(
    "config", None, "Has get_config() and sweep(), or space().", required=True
  )
  _STUDY = cli.define_path("study", None, "Folder of the study.", required=True)
  _OVERRIDE = flags.DEFINE_multi_string("override", [], "key=value for every trial.")
  _SEEDS = flags.DEFINE_list("seeds", [], "Runs every trial once with each: --seeds=0,1,2.")
  _SEARCH = flags.DEFINE_integer(
    "search", None, "Searches space() with Optuna until there are so many trials.", lower_bound=1
  )
  _STORAGE = flags.DEFINE_string(
    "storage", None, "Optuna's storage, a URL; default sqlite:///<study>/optuna.db."
  )
  _PRUNE = flags.DEFINE_bool(
    "prune", False, "Stop a trial that at equal FLOPs is worse than the median of earlier ones."
  )
  _LIST = flags.DEFINE_bool("list", False, "Run nothing; show what has run, also in report.html.")
  cli.run(main)
