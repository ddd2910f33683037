"""From a method's name to its config dataclass: the only place that lists methods."""

import ast
import importlib

from freqformer.config import ConfigError, build, did_you_mean

METHODS = {
  "dense": "Dense",
  "freqformer": "FreqFormer",
  "sparseflow": "SparseFlow",
  "sparse_linear": "SparseLinear",
  "sliding_tile": "SlidingTile",
  "radial": "Radial",
  "block_topk": "BlockTopK",
  "spatial_temporal": "SpatialTemporal",
  "adaspa": "AdaSpa",
}


def method_class(name: str):
  """The dataclass of a method.

  Raises:
    ConfigError: for an unknown name.
  """
  if name not in METHODS:
    raise ConfigError(f"attention method {name!r} is unknown; {did_you_mean(name, METHODS)}")
  return getattr(importlib.import_module(f"freqformer.methods.{name}"), METHODS[name])


def parse_method(text: str) -> tuple[str, dict]:
  """A method as a command line names it: `radial`, `block_topk(density=0.2, coarse=none)`, `x(group=dict(field=1))`.

  Returns:
    its name and the fields that are given; a bare word is a string.

  Raises:
    ConfigError: for an unknown name or text that cannot be read.
  """
  try:
    node = ast.parse(text.strip(), mode="eval").body
    name, fields = (node.id, {}) if isinstance(node, ast.Name) else (node.func.id, _fields(node))
  except (SyntaxError, ValueError, AttributeError) as error:
    raise ConfigError(f"method {text!r} must read like radial or block_topk(density=0.2, coarse=none).") from error
  method_class(name)
  return name, fields


def with_fields(method, fields: dict, path: str):
  """The method with some fields replaced, those within groups too; `path` names it in errors.

  Raises:
    ConfigError: for an unknown field or a value that it cannot take.
  """
  given = {k: {**vars(getattr(method, k)), **v} if isinstance(v, dict) and hasattr(method, k) else v for k, v in fields.items()}
  return build(type(method), {**vars(method), **given}, path)


def _fields(call: ast.Call) -> dict:
  """The keyword arguments of a call."""
  if call.args or any(word.arg is None for word in call.keywords):
    raise ValueError("fields are given by name")
  return {word.arg: _value(word.value) for word in call.keywords}


def _value(node):
  """A literal; a bare word is itself, `dict(...)` a group of fields."""
  if isinstance(node, ast.Call) and node.func.id == "dict":
    return _fields(node)
  return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
