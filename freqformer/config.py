"""From a config dict to frozen dataclasses: every key is known, every type is right, or one clear sentence says what is not."""

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping


class ConfigError(ValueError):
  """A config that cannot be used; the message names the key, what was given and what is allowed."""


def did_you_mean(name: str, known) -> str:
  """ "; did you mean 'x'?" for a near miss, else the known names."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1)
  return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}."


@contextlib.contextmanager
def refusing(where: str):
  """Whatever a user's config makes impossible inside is a ConfigError: `where`, a colon and the error's own sentence."""
  try:
    yield
  except ConfigError:
    raise
  except (ValueError, NotImplementedError) as error:
    # `{self.decay=}` is the shortest way to say what was given; users do not know of any self.
    raise ConfigError(f"{where}: {re.sub(r'\bself\.', '', str(error))}") from error


def require(config, fields: str, *, above=None, least=None, below=None, most=None):
  """Refuses the first of some fields whose number, or one of whose numbers, is not finite or outside of the bounds.

  Args:
    config: a dataclass, in its `__post_init__`.
    fields: names with spaces between.
    above, below: bounds that are excluded; least, most: bounds that are allowed.

  Raises:
    ValueError: one sentence about one field.
  """
  bounds = {"above": above, "at least": least, "below": below, "at most": most}
  rule = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
  for name in fields.split():
    given = getattr(config, name)
    for x in given if isinstance(given, tuple) else (given,):
      inside = (above is None or x > above) and (least is None or x >= least)
      inside = inside and (below is None or x < below) and (most is None or x <= most)
      if not (inside and math.isfinite(x)):
        raise ValueError(
          f"{name}={given!r} must be {rule}{', in every entry' if isinstance(given, tuple) else ''}."
        )


def require_one_of(config, name: str, allowed):
  """Refuses a field whose value is none of `allowed`, with the nearest one; raises ValueError."""
  if (given := getattr(config, name)) not in (allowed := tuple(allowed)):
    close = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"{name}={given!r} must be one of {', '.join(map(str, allowed))}{hint}")


def build(cls, values: Mapping, path: str = "", root: str = "config."):
  """Builds the dataclass `cls` from a mapping, recursively; absent keys take their defaults.

  Args:
    path: of the mapping, for messages; root: what stands before it, "" where no config file is meant.

  Raises:
    ConfigError: for an unknown key, a missing key without default, a wrong type, or what `cls` itself refuses.
  """
  where = root + (path or cls.__name__)
  if not isinstance(values, Mapping):
    raise ConfigError(f"{where} must be a group of keys, got {values!r}.")
  fields, hints = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
  for name in values:
    if name not in fields:
      raise ConfigError(f"{where} has no key {name!r}; {did_you_mean(name, fields)}")
  missing = [
    n
    for n, f in fields.items()
    if n not in values
    and f.default is dataclasses.MISSING
    and f.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ConfigError(
      f"{where} lacks {', '.join(missing)}; {'set them in get_config' if root else 'add them'}."
    )
  with refusing(where):
    return cls(
      **{n: _convert(v, hints[n], f"{path}.{n}" if path else n, root) for n, v in values.items()}
    )


def _convert(value, hint, path, root):
  """The value as the hinted type; ints pass as floats, lists as tuples, nothing else is bent, and every float is finite."""
  if isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f"{root}{path} must be a finite number, got {value!r}.")
  origin = typing.get_origin(hint)
  if dataclasses.is_dataclass(hint):
    return value if isinstance(value, hint) else build(hint, value, path, root)
  if origin in (typing.Union, types.UnionType):
    for option in typing.get_args(hint):
      try:
        return _convert(value, option, path, root)
      except ConfigError:
        continue
    raise ConfigError(f"{root}{path} must be {_name(hint)}, got {value!r}.")
  if origin is tuple:
    return _tuple(value, typing.get_args(hint), hint, path, root)
  if origin is typing.Literal:
    if value not in (allowed := typing.get_args(hint)):
      hint = (
        f"; did you mean {close[0]!r}?"
        if (close := difflib.get_close_matches(str(value), allowed, n=1))
        else "."
      )
      raise ConfigError(
        f"{root}{path} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}"
      )
    return value
  if hint is typing.Any or (hint is types.NoneType and value is None):
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  plain = hint if isinstance(hint, type) else origin
  if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
    return value
  raise ConfigError(f"{root}{path} must be {_name(hint)}, got {value!r}.")


def _tuple(value, args, hint, path, root):
  if not isinstance(value, list | tuple):
    raise ConfigError(f"{root}{path} must be {_name(hint)}, got {value!r}.")
  if not args:
    return tuple(value)
  if len(args) == 2 and args[1] is Ellipsis:
    args = (args[0],) * len(value)
  if len(args) != len(value):
    raise ConfigError(f"{root}{path} must have {len(args)} entries, got {tuple(value)!r}.")
  return tuple(
    _convert(v, a, f"{path}[{i}]", root) for i, (v, a) in enumerate(zip(value, args, strict=True))
  )


def _name(hint) -> str:
  return (
    hint.__name__
    if isinstance(hint, type)
    else str(hint).replace("typing.", "").replace("NoneType", "None")
  )
