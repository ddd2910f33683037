"""Config files: Python modules with `get_config()` and, for sweeps, `sweep()`."""

import importlib.util
import pathlib

from freqformer.config import ConfigError, did_you_mean


def load_config(path, need=("get_config",)):
  """The module of a config file.

  Raises:
    ConfigError: if the file or one of the functions in `need` is missing.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(f"no config file {path}; name one of configs/*.py.")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for name in need:
    if not hasattr(module, name):
      raise ConfigError(f"{path} has no {name}(); write one, configs/demo.py shows how.")
  return module


def dotted(config, prefix: str = "") -> list[str]:
  """All keys of a config dict, groups included: ["train", "train.steps", ...]."""
  keys = []
  for key, value in config.items():
    keys.append(prefix + key)
    if hasattr(value, "items"):
      keys.extend(dotted(value, f"{prefix}{key}."))
  return keys


def check_keys(config, keys):
  """Raises ConfigError for a dotted key that the config does not have."""
  known = dotted(config)
  for key in keys:
    if key not in known:
      raise ConfigError(f"config.{key} does not exist; {did_you_mean(key, known)}")
