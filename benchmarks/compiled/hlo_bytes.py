"""Bytes that each operation of a scheduled HLO module moves through device memory, by reading the module's text.

An operation reads its operands and writes its results, whole; a fusion that only slices or gathers from an operand reads what
it takes, and one that updates a slice in place writes that slice. Loops count as often as they run, where the program says
so. Caches are not modelled: what fits the L2 between two operations is cheaper than counted here.
"""

import dataclasses
import functools
import math
import re

_BYTES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "bf16": 2,
  "f16": 2,
  "s16": 2,
  "u16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_FREE = {
  "parameter",
  "constant",
  "bitcast",
  "tuple",
  "get-tuple-element",
  "after-all",
  "partition-id",
  "iota",
  "while",
  "call",
  "conditional",
}
_TAKES = {"slice", "dynamic-slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Operation:
  """One launched operation.

  Attributes:
    name, opcode: as in the module.
    bytes: read and written, times the runs of the loops around it.
    scopes: the `op_name`s of all it holds, as jax wrote them.
    kernel: a custom call: not XLA's own.
    runs: how often, by the loops around it.
  """

  name: str
  opcode: str
  bytes: float
  scopes: tuple[str, ...]
  kernel: bool
  runs: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Line:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  root: bool

  def called(self, key: str) -> str | None:
    found = re.search(rf"\b{key}=%?([\w.-]+)", self.rest)
    return found[1] if found else None


def operations(text: str, unknown_trips: float = 1) -> list[Operation]:
  """All operations of a module in scheduled order, loops' bodies in place of the loops.

  Args:
    text: `compiled.as_text()`.
    unknown_trips: how often a loop runs whose count the module does not know.
  """
  computations = _computations(text)
  entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)[1]
  return list(_walk(computations, entry, 1, unknown_trips))


def size(shape: str) -> int:
  """Bytes of a shape or tuple of shapes, as HLO writes it."""
  return sum(
    _BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
    for kind, dims in _SHAPE.findall(shape)
  )


def _computations(text):
  """Name -> lines in order."""
  found, current = {}, None
  for line in text.splitlines():
    if header := re.match(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
      current = found.setdefault(header[1], [])
    elif current is not None and (parts := _LINE.match(line)):
      name, shape, opcode, tail = parts.groups()
      arguments = tail.split(")", 1)[0]
      operands = tuple(re.findall(r"%([\w.-]+)", arguments))
      current.append(_Line(name, shape, opcode, operands, tail, line.lstrip().startswith("ROOT")))
  return found


def _walk(computations, name, times, unknown_trips):
  lines = computations[name]
  shapes = {line.name: line.shape for line in lines}
  for line in lines:
    if line.opcode == "while":
      trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.rest)
      runs = int(trips[1]) if trips else unknown_trips
      yield from _walk(computations, line.called("body"), times * runs, unknown_trips)
    elif line.opcode in ("call", "conditional"):
      yield from _walk(computations, line.called("to_apply"), times, unknown_trips)
    elif line.opcode not in _FREE and not line.opcode.endswith("-done"):
      inside = computations.get(line.called("calls"), [])
      moved = _read(line, inside, shapes) + _written(line, inside)
      scopes = tuple(
        dict.fromkeys(
          re.findall(r'op_name="([^"]*)"', "\n".join(part.rest for part in (*inside, line)))
        )
      )
      yield Operation(
        line.name, line.opcode, times * moved, scopes, line.opcode == "custom-call", times
      )


def _read(line, inside, shapes) -> int:
  if not inside:
    if line.opcode in _TAKES:
      return size(line.shape)
    operands = line.operands[1:] if line.opcode == "dynamic-update-slice" else line.operands
    return sum(size(shapes[o]) for o in dict.fromkeys(operands) if o in shapes)
  parameters = {int(p.rest.split(")")[0]): p.name for p in inside if p.opcode == "parameter"}
  return sum(
    _taken(inside, parameters[i], size(shapes.get(o, "")))
    for i, o in enumerate(line.operands)
    if i in parameters
  )


def _taken(inside, name, whole) -> int:
  """Bytes that a fusion reads of one parameter: what slices take of it, also behind element-wise operations."""
  shapes = {line.name: line.shape for line in inside}

  def elements(shape):
    return sum(math.prod(int(d) for d in dims.split(",") if d) for _, dims in _SHAPE.findall(shape))

  @functools.cache
  def share(value) -> float:
    users = [line for line in inside if value in line.operands]
    if not users:
      return 1.0
    total, count = 0.0, max(1, elements(shapes[value]))
    for user in users:
      first = user.operands[0] == value
      if user.opcode in _TAKES and first:
        total += elements(user.shape) / count * share(user.name)
      elif user.opcode == "dynamic-update-slice" and first:
        continue  # updated in place
      else:
        total += share(user.name) if elements(user.shape) == count else 1.0
    return min(1.0, total)

  return round(whole * share(name))


def _written(line, inside) -> int:
  if line.opcode == "dynamic-update-slice":
    return 0  # as much as it reads of the update, in place: counted once
  root = next((part for part in inside if part.root), None)
  if root is not None and root.opcode == "dynamic-update-slice":
    update = next(part for part in inside if part.name == root.operands[1])
    return size(update.shape)
  return size(line.shape)
