"""The table of methods, the only place that lists them: from a name to its config dataclass."""

import ast
import dataclasses
import importlib
import re

from freqformer.config import ConfigError, build, did_you_mean, load_class

METHODS = {
  "dense": "Dense",
  "freqformer": "FreqFormer",
  "octaves": "Octaves",
  "sparseflow": "SparseFlow",
  "sparse_linear": "SparseLinear",
  "sliding_tile": "SlidingTile",
  "radial": "Radial",
  "block_topk": "BlockTopK",
  "spatial_temporal": "SpatialTemporal",
  "adaspa": "AdaSpa",
}

_WORDS = {"true": True, "false": False}


def list_methods() -> list[str]:
  """Returns the names of all methods, as `attention.method` of a config takes them."""
  return list(METHODS)


def method_class(name: str):
  """Returns the dataclass of a method.

  Args:
    name: of `METHODS`, or "module:Class" of one's own.

  Raises:
    ConfigError: for an unknown name, or a line of `METHODS` without its file or class.
  """
  if ":" in name:
    from freqformer.methods.base import Method  # imports JAX, which a list of names need not

    found = load_class(name, "attention method")
    if not (dataclasses.is_dataclass(found) and issubclass(found, Method)):
      raise ConfigError(f"attention method {name!r} must be a dataclass that inherits Method.")
    return found
  if name not in METHODS:
    raise ConfigError(f"attention method {name!r} is unknown; {did_you_mean(name, METHODS)}")
  place = f"freqformer.methods.{name}"
  try:
    module = importlib.import_module(place)
  except ModuleNotFoundError as error:
    if error.name != place:
      raise
    raise ConfigError(
      f"registry.py lists the method {name!r}, but there is no freqformer/methods/{name}.py."
    ) from error
  if not hasattr(module, METHODS[name]):
    classes = [
      key
      for key, value in vars(module).items()
      if isinstance(value, type) and value.__module__ == module.__name__
    ]
    raise ConfigError(
      f"registry.py lists {METHODS[name]!r} for the method {name!r}, but "
      f"freqformer/methods/{name}.py has no such class; {did_you_mean(METHODS[name], classes)}"
    )
  return getattr(module, METHODS[name])


def parse_method(text: str) -> tuple[str, dict]:
  """Reads name and fields: `radial`, `block_topk(density=0.2, coarse=none)`, `x(group=dict(y=1))`.

  `module:Class(field=2)` is a method of one's own.

  A bare word is a string, true and false are bools.

  Raises:
    ConfigError: for an unknown name or text that cannot be read.
  """
  module, call = re.fullmatch(r"([\w.]+:)?(.*)", text.strip(), re.DOTALL).groups()
  try:
    node = ast.parse(call, mode="eval").body
    name, fields = (node.id, {}) if isinstance(node, ast.Name) else (node.func.id, _fields(node))
  except (SyntaxError, ValueError, AttributeError) as error:
    raise ConfigError(
      f"method {text!r} must read like radial, block_topk(density=0.2, coarse=none) or "
      "module:Class(field=2)."
    ) from error
  name = (module or "") + name
  method_class(name)
  return name, fields


def parse_fields(text: str, what: str, example: str) -> dict:
  """Reads fields alone, as they stand in a method's brackets; an empty text has none.

  Args:
    what: they are of, in messages, where `example` shows some.

  Raises:
    ConfigError: for text that cannot be read.
  """
  try:
    return _fields(ast.parse(f"dict({text})", mode="eval").body)
  except (SyntaxError, ValueError, AttributeError) as error:
    raise ConfigError(f"{what} {text!r} must read like {example}.") from error


def with_fields(method, fields: dict, path: str, root: str = "config."):
  """Replaces some fields of a method dataclass, those within groups too.

  Args:
    fields: new values by name, nested for groups.
    path, root: in errors, `path` after `root` names the method.

  Raises:
    ConfigError: for an unknown field or a value that it cannot take.
  """
  given = {
    k: {**vars(getattr(method, k)), **v} if isinstance(v, dict) and hasattr(method, k) else v
    for k, v in fields.items()
  }
  return build(type(method), {**vars(method), **given}, path, root)


def _fields(call: ast.Call) -> dict:
  """Returns the keyword arguments of a call."""
  if call.args or any(word.arg is None for word in call.keywords):
    raise ValueError("fields are given by name")
  return {word.arg: _value(word.value) for word in call.keywords}


def _value(node):
  """Reads a literal, a bare word (true and false are bools), or `dict(...)`, a group of fields."""
  if isinstance(node, ast.Call) and node.func.id == "dict":
    return _fields(node)
  return _WORDS.get(node.id, node.id) if isinstance(node, ast.Name) else ast.literal_eval(node)
