"""Builds frozen dataclasses from config dicts; every mistake is one sentence that names the key."""

import contextlib
import copy
import dataclasses
import difflib
import importlib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping

import numpy as np


class ConfigError(ValueError):
  """A config that cannot be used; the message names the key, what was given and what is allowed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns "did you mean 'x'?" for a near miss, otherwise the known names."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1)
  return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}."


def split_outside_brackets(text: str) -> list[str]:
  """Splits at commas that no bracket encloses: `"dense, radial(decay=0.5, sink=0)"` has two parts.

  Parts are stripped; empty ones are left out.
  """
  parts = [""]
  for piece in text.split(","):
    depth = sum(map(parts[-1].count, "([")) - sum(map(parts[-1].count, ")]"))
    if depth > 0:
      parts[-1] += f",{piece}"
    else:
      parts.append(piece)
  return [part.strip() for part in parts if part.strip()]


@contextlib.contextmanager
def refusing(where: str) -> Iterator[None]:
  """Turns errors about a user's values into a ConfigError that begins with `where`."""
  try:
    yield
  except ConfigError:
    raise
  except (ValueError, NotImplementedError) as error:
    # `{self.decay=}` is the shortest way to name a value; a user does not know of any self.
    raise ConfigError(f"{where}: {re.sub(r'\bself\.', '', str(error))}") from error


def require(config, fields: str, *, above=None, least=None, below=None, most=None):
  """Refuses fields whose number, or one of whose numbers, is not finite or out of bounds.

  The names of the fields are separated by spaces. `least` and `most` are allowed themselves.

  Raises:
    ValueError: one sentence about the first such field.
  """
  bounds = {"above": above, "at least": least, "below": below, "at most": most}
  rule = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
  for name in fields.split():
    given = getattr(config, name)
    for x in given if isinstance(given, tuple) else (given,):
      inside = (above is None or x > above) and (least is None or x >= least)
      inside = inside and (below is None or x < below) and (most is None or x <= most)
      if not (inside and math.isfinite(x)):
        everywhere = ", in every entry" if isinstance(given, tuple) else ""
        raise ValueError(f"{name}={given!r} must be {rule}{everywhere}.")


def require_one_of(config, name: str, allowed: Iterable):
  """Refuses a field whose value is not among `allowed`.

  Raises:
    ValueError: names the nearest allowed value.
  """
  given = getattr(config, name)
  if given not in allowed:
    raise ValueError(f"{name}={given!r} must be {_one_of(given, map(str, allowed))}")


def numbers(config) -> dict[str, np.ndarray]:
  """Returns the fields that `config.NUMBERS` names, float32, as arguments of a compiled program.

  Configs that differ in these alone then share the program.
  """
  return {name: np.asarray(getattr(config, name), np.float32) for name in config.NUMBERS}


def with_numbers(config, given: Mapping):
  """Returns the config inside a program that has its `numbers` as arguments; nothing is checked."""
  found = copy.copy(config)
  for name, value in given.items():
    object.__setattr__(found, name, value)  # it is frozen, and they have no values yet
  return found


def load_class(name: str, what: str) -> type:
  """Returns the class that "module:Class" names, from anywhere that Python finds modules.

  Args:
    what: it is for, in messages.

  Raises:
    ConfigError: there is no such module or class.
  """
  module, _, cls = name.partition(":")
  try:
    return getattr(importlib.import_module(module), cls)
  except ModuleNotFoundError as error:
    if error.name is None or not f"{module}.".startswith(f"{error.name}."):
      raise
    raise ConfigError(
      f"{what} {name!r}: there is no module {error.name!r}; name one that Python finds, e.g. of a "
      "file in the current folder with PYTHONPATH=. set."
    ) from error
  except AttributeError as error:
    raise ConfigError(f"{what} {name!r}: module {module!r} has no class {cls!r}.") from error


def build(cls: type, values: Mapping, path: str = "", root: str = "config."):
  """Builds the dataclass `cls` from a mapping, recursively; absent keys take their defaults.

  A group that is given in part takes its other keys from the default of the field that it fills.

  Args:
    cls: the dataclass.
    values: its keys.
    path: the mapping's own key, for messages.
    root: text before the path, "" where no config file is meant.

  Raises:
    ConfigError: an unknown key, a key without default that is missing, a wrong type, or a value
      that `cls` itself refuses.
  """
  where = root + (path or cls.__name__)
  if not isinstance(values, Mapping):
    raise ConfigError(f"{where} must be a group of keys, got {values!r}.")
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      raise ConfigError(f"{where} has no key {name!r}; {did_you_mean(name, fields)}")
  missing = [n for n, f in fields.items() if n not in values and _default(f) is dataclasses.MISSING]
  if missing:
    remedy = "set them in get_config" if root else "add them"
    raise ConfigError(f"{where} lacks {', '.join(missing)}; {remedy}.")
  hints = typing.get_type_hints(cls)
  with refusing(where):
    given = {}
    for name, value in values.items():
      own = _default(fields[name])
      if isinstance(value, Mapping) and dataclasses.is_dataclass(own):
        value = {**vars(own), **value}
      given[name] = _convert(value, hints[name], f"{path}.{name}" if path else name, root)
    return cls(**given)


def with_defaults(cls: type, values, default=None):
  """Returns `values` with each absent key of a dataclass at its default, or as `default` has it.

  Groups become dicts. Nothing is checked: unknown and missing keys stay as they are, and so does
  what is not a mapping.
  """
  if not isinstance(values, Mapping):
    return values
  full = dict(values)
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    own = _default(field) if default is None else getattr(default, field.name)
    hint = hints[field.name]
    if dataclasses.is_dataclass(hint):
      group = full.get(field.name, {})
      full[field.name] = with_defaults(hint, group, None if own is dataclasses.MISSING else own)
    elif field.name not in full and own is not dataclasses.MISSING:
      full[field.name] = _convert(own, hint, field.name, "")
  return full


def _default(field: dataclasses.Field):
  """Returns the default of a field, MISSING if it has none."""
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


def _convert(value, hint, path: str, root: str):
  """Returns the value as the hinted type.

  Whole numbers pass as floats, floats that are whole as integers, and lists as tuples. Every float
  must be finite.
  """
  where = root + path
  if isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f"{where} must be a finite number, got {value!r}.")
  origin = typing.get_origin(hint)
  if dataclasses.is_dataclass(hint):
    return value if isinstance(value, hint) else build(hint, value, path, root)
  if origin in (typing.Union, types.UnionType):
    for option in typing.get_args(hint):
      with contextlib.suppress(ConfigError):
        return _convert(value, option, path, root)
    raise ConfigError(f"{where} must be {_name(hint)}, got {value!r}.")
  if origin is tuple and isinstance(value, list | tuple):
    entries = typing.get_args(hint) or (typing.Any, Ellipsis)
    if entries[1:] == (Ellipsis,):
      entries = entries[:1] * len(value)
    if len(entries) != len(value):
      raise ConfigError(f"{where} must have {len(entries)} entries, got {tuple(value)!r}.")
    pairs = enumerate(zip(value, entries, strict=True))
    return tuple(_convert(entry, own, f"{path}[{i}]", root) for i, (entry, own) in pairs)
  if origin is typing.Literal:
    allowed = typing.get_args(hint)
    if value not in allowed:
      raise ConfigError(f"{where}={value!r} must be {_one_of(value, map(str, allowed))}")
    return value
  if hint is typing.Any or (hint is types.NoneType and value is None):
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if hint is int and isinstance(value, float) and value.is_integer():
    return int(value)
  plain = hint if isinstance(hint, type) else origin
  if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
    return value
  raise ConfigError(f"{where} must be {_name(hint)}, got {value!r}.")


def _one_of(given, allowed: Iterable[str]) -> str:
  """Returns the end of a sentence about allowed values: all, and the nearest one if any is near."""
  allowed = list(allowed)
  close = difflib.get_close_matches(str(given), allowed, n=1)
  hint = f"; did you mean {close[0]!r}?" if close else "."
  return f"one of {', '.join(allowed)}{hint}"


def _name(hint) -> str:
  if isinstance(hint, type):
    return hint.__name__
  return str(hint).replace("typing.", "").replace("NoneType", "None")
