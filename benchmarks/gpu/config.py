"""Other kernel configurations for one run: `--config="take_turns=False"` changes this field."""

import ast
import dataclasses
import itertools
from collections.abc import Iterable

from absl import logging
from freqformer.kernels.block_sparse import tuning
from freqformer.kernels.block_sparse.tuning import Key, TuningConfig
from freqformer.kernels.block_sparse.tuning_table import DIRECTIONS


def parse(text: str) -> dict[str, bool | int]:
  """Returns the fields of `field=value` pairs, e.g. "stages=2, take_turns=False"; "": none.

  Raises:
    ValueError: for an unknown field, or a value of another type than the field's.
  """
  defaults = {field.name: field.default for field in dataclasses.fields(TuningConfig)}
  found = {}
  for pair in filter(None, (part.strip() for part in text.split(","))):
    name, equals, value = (part.strip() for part in pair.partition("="))
    if not equals or name not in defaults:
      known = ", ".join(defaults)
      raise ValueError(f"--config={text!r}: {pair!r} is no field=value; the fields are {known}.")
    kind = type(defaults[name])
    try:
      found[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      found[name] = None
    if type(found[name]) is not kind:
      example = "True or False" if kind is bool else "a whole number"
      raise ValueError(f"--config={text!r}: {name} must be {example}, got {value!r}.")
  return found


def changed(fields: dict, keys: Iterable[Key]) -> dict[Key, TuningConfig]:
  """Returns the keys' configurations with some fields replaced, for `tuning.override`.

  Raises:
    ValueError: if a changed configuration is invalid or does not fit its key.
  """
  return {key: dataclasses.replace(tuning.lookup(key), **fields).check(key) for key in keys}


def everywhere(fields: dict) -> dict[Key, TuningConfig]:
  """Returns the changed configurations of all keys that they fit; others keep what they have.

  Raises:
    ValueError: if they fit none.
  """
  found = {}
  refused = []
  for size in itertools.product((128, 64, 32), (128, 64), (128, 64), DIRECTIONS):
    try:
      found |= changed(fields, [Key("h100", *size)])
    except ValueError as error:
      refusal = error
      refused.append(size)
  if not found:
    raise refusal
  if refused:
    logging.warning("%s does not fit, the default stays: %s", fields, refused)
  return found
