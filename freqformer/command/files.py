"""Config files: Python modules with `get_config()` and, for sweeps, `sweep()`.

A file says only what differs from the defaults of the dataclasses; all other keys are filled in
when it is read, so that each of them can be set on the command line.
"""

import contextlib
import difflib
import functools
import importlib.util
import pathlib
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping

from absl import flags
from ml_collections import ConfigDict, config_flags

from freqformer.config import ConfigError, did_you_mean, with_defaults
from freqformer.data.sources import config_class
from freqformer.methods.registry import METHODS, method_class
from freqformer.model import architectures
from freqformer.train.experiment import Experiment
from freqformer.train.learning import Learning, is_learning

_ALIKE = 0.8  # choice: of two dotted keys that a slip of the fingers tells apart


def load_config(path, need: tuple[str, ...] = ("get_config",)) -> types.ModuleType:
  """Returns the module of a config file, which must have the functions that `need` names.

  Raises:
    ConfigError: the file or a function is missing, or the file does not run; names the line.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise ConfigError(f"no config file {path}; name one of configs/*.py.")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  neighbours = str(path.resolve().parents[1])  # for `from configs import demo`
  sys.path.append(neighbours)
  try:
    with _reading(path):
      spec.loader.exec_module(module)
  finally:
    sys.path.remove(neighbours)
  for name in need:
    if not hasattr(module, name):
      raise ConfigError(f"{path} has no {name}(); write one, configs/demo.py shows how.")
  return module


def read_config(path, *args) -> ConfigDict:
  """Returns what a file's `get_config(*args)` returns, with every other key at its default.

  Raises:
    ConfigError: as `load_config` does, and if no config is returned.
  """
  module = load_config(path)
  with _reading(pathlib.Path(path)):
    config = module.get_config(*args)
  if not hasattr(config, "items"):
    raise ConfigError(
      f"get_config() of {path} returned {config!r}; let it return an ml_collections.ConfigDict."
    )
  values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
  if is_learning(values):
    return ConfigDict(with_defaults(Learning, values))
  # All keys of all groups; `experiment` checks the values.
  model = values.get("model", {})
  attention = model.get("attention", {}) if isinstance(model, Mapping) else None
  if isinstance(attention, Mapping):
    methods = {name: with_defaults(method_class(name), attention.get(name, {})) for name in METHODS}
    model = {**model, "attention": {**attention, **methods}}
    values = {**values, "model": with_defaults(architectures.config_class(model), model)}
  data = values.get("data", {})
  if isinstance(data, Mapping):
    values = {**values, "data": with_defaults(config_class(data), data)}
  return ConfigDict(with_defaults(Experiment, values))


class _CompleteConfig(flags.ArgumentParser):
  """Parses `--config=FILE` and `--config=FILE:ARGUMENT` to the complete config, locked."""

  def parse(self, path):
    return read_config(*path.split(":", 1)).lock()


def define_config(
  flag_values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None
) -> flags.FlagHolder:
  """Defines the flag `--config` with an override `--config.key=value` for every key.

  The overrides are found in `argv`; None takes the process's own command line.
  """
  text = "Configuration file, e.g. configs/ucf101.py."
  holder = config_flags.DEFINE_config_file(
    "config", None, text, flag_values=flag_values, sys_argv=argv
  )
  flag_values["config"].parser = _CompleteConfig()
  return holder


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
  """Turns whatever goes wrong in a user's file into a ConfigError that names its line."""
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:  # a user's file runs here: it may raise anything
    places = list(traceback.extract_tb(error.__traceback__))
    if isinstance(error, SyntaxError):
      places.append(error)
    own = [place.lineno for place in places if place.filename == str(path.absolute())]
    where = f"{path}, line {own[-1]}" if own else str(path)
    raise ConfigError(f"{where}: {type(error).__name__}: {getattr(error, 'msg', error)}") from error


def dotted(config: Mapping, prefix: str = "") -> list[str]:
  """Returns all keys of a config dict, groups included: ["train", "train.steps", ...]."""
  keys = []
  for key, value in config.items():
    keys.append(prefix + key)
    if hasattr(value, "items"):
      keys.extend(dotted(value, f"{prefix}{key}."))
  return keys


def _near_key(key: str, known: list[str]) -> str:
  """Returns "did you mean 'train.lr'?" for a slip, otherwise the keys of the group.

  Keys of one group are alike by the group's name: their last parts are what is compared. A key may
  also be right but for its group.
  """
  group, _, name = key.rpartition(".")
  elsewhere = [other for other in known if other.rpartition(".")[2] == name]
  beside = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == group}
  near = [beside[found] for found in difflib.get_close_matches(name, beside, n=1)]
  near += difflib.get_close_matches(key, elsewhere, n=1, cutoff=0)
  if not beside:  # the slip is in the group's name
    near += difflib.get_close_matches(key, known, n=1, cutoff=_ALIKE)
  if near:
    return f"did you mean {near[0]!r}?"
  if beside:
    where = f"config.{group}" if group else "config"
    return f"{where} has {', '.join(sorted(beside))}."
  return did_you_mean(group.split(".")[0], [other for other in known if "." not in other])


def check_keys(config: Mapping, keys: Iterable[str]):
  """Refuses a dotted key that the config does not have, or that names a whole group.

  Raises:
    ConfigError: names the nearest key, or the group's members.
  """
  known = dotted(config)
  for key in keys:
    if key not in known:
      raise ConfigError(f"config.{key} does not exist; {_near_key(key, known)}")
    value = functools.reduce(lambda part, name: part[name], key.split("."), config)
    if hasattr(value, "items"):
      members = f"add one of them: .{', .'.join(value)}" if len(value) else "it has no keys"
      raise ConfigError(f"config.{key} is a group of keys; {members}")
