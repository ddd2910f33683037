"""From a config dict to frozen dataclasses: every key is known, every type is right, or one clear sentence says what is not."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping


class ConfigError(ValueError):
  """A config that cannot be used; the message names the key, what was given and what is allowed."""


def did_you_mean(name: str, known) -> str:
  """ "; did you mean 'x'?" for a near miss, else the known names."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1)
  return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}."


def build(cls, values: Mapping, path: str = ""):
  """Builds the dataclass `cls` from a mapping, recursively; absent keys take their defaults.

  Raises:
    ConfigError: for an unknown key, a missing key without default, a wrong type, or what `cls` itself refuses.
  """
  where = path or cls.__name__
  if not isinstance(values, Mapping):
    raise ConfigError(f"config.{where} must be a group of keys, got {values!r}.")
  fields, hints = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
  for name in values:
    if name not in fields:
      raise ConfigError(f"config.{where} has no key {name!r}; {did_you_mean(name, fields)}")
  missing = [
    n
    for n, f in fields.items()
    if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ConfigError(f"config.{where} lacks {', '.join(missing)}; set them in get_config.")
  try:
    return cls(**{n: _convert(v, hints[n], f"{path}.{n}" if path else n) for n, v in values.items()})
  except ConfigError:
    raise
  except ValueError as error:
    raise ConfigError(f"config.{where}: {error}") from error


def _convert(value, hint, path):
  """The value as the hinted type; ints pass as floats, lists as tuples, nothing else is bent."""
  origin = typing.get_origin(hint)
  if dataclasses.is_dataclass(hint):
    return value if isinstance(value, hint) else build(hint, value, path)
  if origin in (typing.Union, types.UnionType):
    for option in typing.get_args(hint):
      try:
        return _convert(value, option, path)
      except ConfigError:
        continue
    raise ConfigError(f"config.{path} must be {_name(hint)}, got {value!r}.")
  if origin is tuple:
    return _tuple(value, typing.get_args(hint), hint, path)
  if origin is typing.Literal:
    if value not in (allowed := typing.get_args(hint)):
      hint = f"; did you mean {close[0]!r}?" if (close := difflib.get_close_matches(str(value), allowed, n=1)) else "."
      raise ConfigError(f"config.{path} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")
    return value
  if hint is typing.Any or (hint is types.NoneType and value is None):
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  plain = hint if isinstance(hint, type) else origin
  if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
    return value
  raise ConfigError(f"config.{path} must be {_name(hint)}, got {value!r}.")


def _tuple(value, args, hint, path):
  if not isinstance(value, list | tuple):
    raise ConfigError(f"config.{path} must be {_name(hint)}, got {value!r}.")
  if not args:
    return tuple(value)
  if len(args) == 2 and args[1] is Ellipsis:
    args = (args[0],) * len(value)
  if len(args) != len(value):
    raise ConfigError(f"config.{path} must have {len(args)} entries, got {tuple(value)!r}.")
  return tuple(_convert(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))


def _name(hint) -> str:
  return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("NoneType", "None")
