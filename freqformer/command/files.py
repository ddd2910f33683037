"""Config files: Python modules with `get_config()` and, for sweeps, `sweep()`."""

import contextlib
import dataclasses
import functools
import importlib.util
import pathlib
import traceback
import typing

from freqformer.config import ConfigError, did_you_mean
from freqformer.methods.registry import METHODS, method_class

_METHODS_AT = "model.attention."


def load_config(path, need=("get_config",)):
  """The module of a config file.

  Raises:
    ConfigError: if the file or one of the functions in `need` is missing, or the file does not run; names the line.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(f"no config file {path}; name one of configs/*.py.")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  with _reading(path):
    spec.loader.exec_module(module)
  for name in need:
    if not hasattr(module, name):
      raise ConfigError(f"{path} has no {name}(); write one, configs/demo.py shows how.")
  return module


def read_config(path, *args):
  """What a file's `get_config(*args)` returns; raises ConfigError where `load_config` does, and if it returns no config."""
  module = load_config(path)
  with _reading(pathlib.Path(path)):
    config = module.get_config(*args)
  if not hasattr(config, "items"):
    raise ConfigError(
      f"get_config() of {path} returned {config!r}; let it return an ml_collections.ConfigDict."
    )
  return config


@contextlib.contextmanager
def _reading(path):
  """Whatever goes wrong in a user's file is said with its line in that file."""
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:  # Any: it is the user's code that runs.
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
      places.append((error.filename, error.lineno))
    lines = [
      line for file, line in places if file and pathlib.Path(file).resolve() == path.resolve()
    ]
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    raise ConfigError(f"{where}: {type(error).__name__}: {getattr(error, 'msg', error)}") from error


def dotted(config, prefix: str = "") -> list[str]:
  """All keys of a config dict, groups included: ["train", "train.steps", ...]."""
  keys = []
  for key, value in config.items():
    keys.append(prefix + key)
    if hasattr(value, "items"):
      keys.extend(dotted(value, f"{prefix}{key}."))
  return keys


def check_keys(config, keys):
  """Raises ConfigError for a dotted key that the config does not have, or that names a whole group."""
  known = dotted(config)
  for key in keys:
    if key not in known:
      raise ConfigError(
        f"config.{key} does not exist; {_method_hint(key) or did_you_mean(key, known)}"
      )
    if hasattr(
      group := functools.reduce(lambda part, name: part[name], key.split("."), config), "items"
    ):
      members = (
        f"add one of them: .{', .'.join(group)}" if len(group) else "the file has none of them"
      )
      raise ConfigError(f"config.{key} is a group of keys; {members}")


def _method_hint(key: str) -> str | None:
  """How a command line sets a field of a method that has no group, or not this field, in the config file."""
  name, _, rest = key.removeprefix(_METHODS_AT).partition(".")
  if not key.startswith(_METHODS_AT) or name not in METHODS:
    return None
  if not rest:
    return f'run it by --config.{_METHODS_AT}method={name}, with fields as "{name}(field=...)".'
  (*groups, field), owner = rest.split("."), method_class(name)
  for group in groups:
    owner = typing.get_type_hints(owner).get(group) if dataclasses.is_dataclass(owner) else None
  fields = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
  if field not in fields:
    return f"method {name} has no field {rest!r}; {did_you_mean(field, fields)}" if fields else None
  text = f"{field}=..."
  for group in reversed(groups):
    text = f"{group}=dict({text})"
  return f'set it by --config.{_METHODS_AT}method="{name}({text})", or add it to the file.'
