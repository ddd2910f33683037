"""Searches a config's `space()`: Optuna proposes overrides, each of which is a trial of the study.

A proposal is stored with its machine before its trial begins, and the trial's result when it ends.
Several commands share a storage, on one machine or on several. A trial whose process was killed is
finished before new ones are asked for.
"""

import functools
import math
import pathlib
import socket
from collections.abc import Iterator, Mapping

from absl import logging

from freqformer.command.files import load_config
from freqformer.command.prune import MedianRule
from freqformer.command.trials import (
  PRUNED,
  Trial,
  changed,
  ran,
  refuse_changed,
  resolve,
  row_of,
  run_if_free,
  write,
)
from freqformer.config import ConfigError
from freqformer.pages.files import metric_rows
from freqformer.train.lock import held
from freqformer.train.preemption import StopRequest

_ASKING = "search.lock"  # of the study's folder, held while a proposal is asked for and stored
_PATIENCE_SECONDS = 60  # for another command that asks
_DIGITS = 4  # choice: of proposed floats, which name folders; finer steps change no loss
_REPEATED = 200  # choice: known proposals in a row after which no new one is expected
_READS = (
  "('log', low, high), ('uniform', low, high), ('int', low, high) or ('choice', [values]), "
  "low < high, and above 0 for 'log'"
)


def _optuna():
  """Imports Optuna, which is an extra."""
  try:
    import optuna
  except ModuleNotFoundError as error:
    if error.name != "optuna":
      raise
    raise ConfigError(
      "--search needs Optuna, which is not installed; install it by "
      "pip install 'freqformer[search]'."
    ) from error
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  return optuna


class Space:
  """Values that overrides may take.

  Attributes:
    ends: by key the values that are checked before the first trial: both ends, or every choice.
  """

  def __init__(self, described: Mapping):
    """Reads what `space()` of a config returns; `{"train.lr": ("log", 1e-4, 1e-2), ...}`.

    Raises:
      ConfigError: names the key, what was given and what is allowed.
    """
    if not isinstance(described, Mapping) or not described:
      raise ConfigError(
        f"space() returned {described!r}; let it return a dict from flat keys to {_READS}."
      )
    self._described = dict(described)
    self.ends = {}
    for key, given in described.items():
      ends = _ends(given)
      if ends is None:
        raise ConfigError(f"space() has {key!r}: {given!r}; it must read {_READS}.")
      self.ends[key] = ends

  def __str__(self) -> str:
    return str(self._described)

  def distributions(self) -> dict:
    """Returns Optuna's distribution of every key; choices by their text, which may be anything."""
    kinds = _optuna().distributions
    made = {
      "log": functools.partial(kinds.FloatDistribution, log=True),
      "uniform": kinds.FloatDistribution,
      "int": kinds.IntDistribution,
    }
    found = {}
    for key, (kind, *rest) in self._described.items():
      texts = [str(value) for value in self.ends[key]]
      found[key] = kinds.CategoricalDistribution(texts) if kind == "choice" else made[kind](*rest)
    return found

  def overrides(self, proposed: Mapping) -> dict:
    """Returns the overrides of Optuna's parameters."""
    found = {}
    for key, (kind, *_) in self._described.items():
      value = proposed[key]
      if kind == "choice":
        value = next(own for own in self.ends[key] if str(own) == value)
      elif kind != "int":
        low, high = self.ends[key]
        value = min(max(float(f"{value:.{_DIGITS}g}"), low), high)
      found[key] = value
    return found

  def size(self) -> float:
    """Returns how many trials there can be; infinite with ranges of floats."""
    counts = []
    for key, (kind, *_) in self._described.items():
      ends = self.ends[key]
      if kind == "choice":
        counts.append(len(ends))
      else:
        counts.append(ends[1] - ends[0] + 1 if kind == "int" else math.inf)
    return math.prod(counts)

  def corners(self) -> Iterator[dict]:
    """Yields overrides in which each value of `ends` occurs; one key at a time leaves its first."""
    first = {key: ends[0] for key, ends in self.ends.items()}
    yield first
    for key, ends in self.ends.items():
      for value in ends[1:]:
        yield first | {key: value}


def _ends(given) -> list | None:
  """Returns both ends of a range or all choices; None if a description is wrong."""
  match given:
    case ("choice", [_, *_] as values) if len({str(value) for value in values}) == len(values):
      return list(values)
    case ("log" | "uniform" | "int" as kind, low, high):
      allowed = int if kind == "int" else (int, float)
      if any(isinstance(end, bool) or not isinstance(end, allowed) for end in (low, high)):
        return None
      if not math.isfinite(low) or not math.isfinite(high) or low >= high:
        return None
      return None if kind == "log" and low <= 0 else [low, high]
  return None


class Proposals:
  """Proposals of a study and their results, in Optuna's storage.

  A proposal that has its machine as the attribute `host` is a trial. One that an earlier one equals
  is none: it is given back as failed, which samplers pass over.
  """

  def __init__(self, config, study: pathlib.Path, extra: dict, space: Space, storage: str | None):
    """Opens the storage; no study is made before `begin`.

    Args:
      config: path of the config file.
      study: folder of the study, by whose name the storage knows it.
      extra: overrides of every trial.
      space: what is searched.
      storage: URL as SQLAlchemy has them; None: `<study>/optuna.db`.

    Raises:
      ConfigError: the storage cannot be used, or another space was searched there.
    """
    self._config = config
    self._folder = study
    self._extra = extra
    self._space = space
    self._url = storage or f"sqlite:///{study}/optuna.db"
    self._own_file = None if storage else study / "optuna.db"
    self._states = _optuna().trial.TrialState
    self._study = None
    if self._own_file is None or self._own_file.exists():
      self._study = self._opened(_optuna().load_study)
      self._check_space()

  def _opened(self, function, **given):
    name = self._folder.resolve().name
    try:
      return function(study_name=name, storage=self._url, **given)
    except KeyError:  # the storage has no such study yet
      return None
    except Exception as error:  # of SQLAlchemy, of a database's driver, or of Optuna
      reason = str(error).strip().split("\n")[0]
      raise ConfigError(
        f"--storage={self._url} cannot be used ({reason}); give a URL of SQLAlchemy, e.g. "
        "sqlite:///runs/study.db."
      ) from error

  def _check_space(self):
    """Refuses a study that has searched another space, or with other overrides."""
    before = self._study and self._study.user_attrs.get("space")
    if before and before != self._searched():
      raise ConfigError(
        f"{self._url} has searched {before}, not {self._searched()}; name another --study, or "
        "undo the change."
      )

  def _searched(self) -> str:
    return f"{self._space} with overrides {self._extra}"

  def begin(self):
    """Makes the study if it is not there."""
    self._folder.mkdir(parents=True, exist_ok=True)
    with held(self._folder, _ASKING, _PATIENCE_SECONDS):
      self._study = self._opened(_optuna().create_study, direction="minimize", load_if_exists=True)
      self._check_space()
      self._study.set_user_attr("space", self._searched())

  def _named(self) -> dict:
    """Returns Optuna's trials by the name of ours, in the order in which they were asked for."""
    found = {}
    for own in self._study.get_trials(deepcopy=False) if self._study else ():
      if "host" in own.user_attrs:
        name = self._trial(own).name
        if name not in found or found[name].state == self._states.PRUNED:
          found[name] = own
    return found

  def _trial(self, proposal) -> Trial:
    overrides = self._extra | self._space.overrides(proposal.params)
    return Trial(self._config, self._folder, overrides)

  def trials(self) -> dict[str, Trial]:
    """Returns all trials by name."""
    return {name: self._trial(own) for name, own in self._named().items()}

  def unfinished(self, pruned: bool) -> list[Trial]:
    """Returns the trials that were begun here and that no process runs; `pruned` ones if so."""
    states = [self._states.RUNNING, *[self._states.PRUNED] * pruned]
    found = []
    for own in self._named().values():
      trial = self._trial(own)
      here = own.user_attrs["host"] == socket.gethostname() or trial.workdir.exists()
      if own.state in states and here and not trial.running():
        found.append(trial)
    return found

  def ask(self, count: int) -> Trial | None:
    """Returns a new trial, or None if there are `count` of them or the space is exhausted."""
    with held(self._folder, _ASKING, _PATIENCE_SECONDS):
      known = self._named()
      if len(known) >= min(count, self._space.size()):
        if len(known) < count:
          logging.warning("these %d trials are all that space() has", len(known))
        return None
      for _ in range(_REPEATED):
        proposal = self._study.ask(self._space.distributions())
        trial = self._trial(proposal)
        if trial.name not in known:
          proposal.set_user_attr("host", socket.gethostname())
          return trial
        self._study.tell(proposal, state=self._states.FAIL)
        self._study.sampler = _optuna().samplers.RandomSampler()  # it finds what is left
    logging.warning("%d proposals in a row were known; there may be no others", _REPEATED)
    return None

  def tell(self, row: dict):
    """Stores how a trial ended, unless it is to go on or that is stored."""
    own = self._named()[row["trial"]]
    if own.state not in (self._states.RUNNING, self._states.PRUNED):
      return
    state = None
    if row["status"] == "finished" and row["val_loss"] is not None:
      state = self._states.COMPLETE
    elif row["status"] == "finished" or row["status"].startswith("exit"):
      state = self._states.FAIL
    elif row["status"].startswith(PRUNED):
      state = self._states.PRUNED
    if state in (None, own.state):
      return
    result = {key: value for key, value in row.items() if key != "overrides"}
    value = row["val_loss"] if state == self._states.COMPLETE else None
    if own.state == self._states.PRUNED:  # which Optuna does not change any more
      made = _optuna().trial.create_trial(
        state=state,
        value=value,
        params=own.params,
        distributions=own.distributions,
        user_attrs=own.user_attrs | {"result": result},
      )
      self._study.add_trial(made)
      return
    trial = _optuna().trial.Trial(self._study, own._trial_id)
    trial.set_user_attr("result", result)
    if state == self._states.PRUNED:  # Optuna takes the last loss for its value
      for line in metric_rows(self._folder / row["trial"], "val"):
        trial.report(line["loss"], line["step"])
    self._study.tell(own.number, value, state=state, skip_if_finished=True)

  def rows(self, own: Mapping[str, dict]) -> list[dict]:
    """Returns the rows of all trials; `own` has those of this process.

    A trial of another machine, whose folder is not here, has the row that was stored with it.
    """
    found = []
    for name, proposal in self._named().items():
      row = own.get(name) or row_of(self._trial(proposal))
      if not (self._folder / name).exists():
        host = proposal.user_attrs["host"]
        stored = proposal.user_attrs.get("result", {"status": "begun"})
        row |= stored | {"status": f"{stored['status']} on {host}"}
      found.append(row)
    return found


def search(
  config_path,
  study,
  extra: dict,
  count: int,
  storage: str | None = None,
  list_only: bool = False,
  prune: bool = False,
) -> list[dict]:
  """Searches until a study has `count` trials, and returns their rows.

  A trial that failed counts; it is told to Optuna and not run again.

  Args:
    extra: overrides keys of every trial.
    count: of trials, those of earlier calls and of other commands included.
    storage: of Optuna; None: a SQLite file in the study's folder.
    list_only: nothing runs.
    prune: trials that fall behind the others are stopped, see `freqformer.command.prune`.

  Raises:
    ConfigError: the space is wrong, or a trial ran with another config than it would run with now.
  """
  study = pathlib.Path(study)
  space = Space(load_config(config_path, ("get_config", "space")).space())
  fixed = sorted(extra.keys() & space.ends.keys())
  if fixed:
    raise ConfigError(
      f"--override={fixed[0]}={extra[fixed[0]]} is in space(), too; leave one of them out."
    )
  proposals = Proposals(config_path, study, extra, space, storage)
  if list_only:
    return proposals.rows({})
  for corner in space.corners():
    resolve(config_path, extra | corner)
  known = proposals.trials()
  refuse_changed(changed(known.values()), len(known), study)
  proposals.begin()
  own = {}
  before = ran(study)
  with StopRequest() as stop:
    while not stop():
      left = [trial for trial in proposals.unfinished(not prune) if trial.name not in own]
      trial = left[0] if left else proposals.ask(count)
      if trial is None:
        break
      logging.info("trial %d of %d: %s", len(proposals.trials()), count, trial.name)
      row = run_if_free(
        trial,
        before.get(trial.name),
        stop,
        lambda row: write(study, [row], proposals.trials()),
        MedianRule if prune else None,
      )
      own[trial.name] = row
      proposals.tell(row)
  ended = {name: row for name, row in own.items() if not row["status"].startswith("running")}
  rows = proposals.rows(ended)
  write(study, rows, proposals.trials())
  return rows
