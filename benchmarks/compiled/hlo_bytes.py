"""Bytes that each operation of a scheduled HLO module moves through device memory.

They are read off the module's text. An operation reads its operands and writes its results, whole;
a fusion that only slices or gathers from an operand reads what it takes, and one that updates a
slice in place writes that slice. Loops count as often as they run, if the program says so. Caches
are not modelled: what fits the L2 between two operations is cheaper than counted here.
"""

import dataclasses
import functools
import math
import re

_TYPES = {1: "pred s8 u8", 2: "bf16 f16 s16 u16", 4: "f32 s32 u32", 8: "f64 s64 u64"}
_BYTES = {name: size for size, names in _TYPES.items() for name in names.split()}
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
# Operations that move no bytes of their own, and those that read a part of their operand.
_FREE = set(
  "parameter constant bitcast tuple get-tuple-element after-all partition-id iota while call "
  "conditional".split()
)
_TAKES = {"slice", "dynamic-slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Operation:
  """One launched operation.

  Attributes:
    name: as in the module.
    opcode: as in the module.
    bytes: read and written, times `runs`.
    scopes: the `op_name`s of all that it holds, as jax wrote them.
    kernel: whether it is a custom call, not XLA's own.
    runs: number of times that the loops around it run it.
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
  """Lists all operations of a module in scheduled order, loops' bodies in place of the loops.

  Args:
    text: `compiled.as_text()`.
    unknown_trips: runs of a loop whose count the module does not know.
  """
  computations = _computations(text)
  entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)[1]
  return list(_walk(computations, entry, 1, unknown_trips))


def size(shape: str) -> int:
  """Bytes of a shape or tuple of shapes, as HLO writes it."""
  return sum(_BYTES[kind] * _product(dims) for kind, dims in _SHAPE.findall(shape))


def _elements(shape: str) -> int:
  return sum(_product(dims) for _, dims in _SHAPE.findall(shape))


def _product(dims: str) -> int:
  return math.prod(int(d) for d in dims.split(",") if d)


def _computations(text):
  """Lines of each computation by its name, in order."""
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
      rest = "\n".join(part.rest for part in (*inside, line))
      scopes = tuple(dict.fromkeys(re.findall(r'op_name="([^"]*)"', rest)))
      kernel = line.opcode == "custom-call"
      yield Operation(line.name, line.opcode, times * moved, scopes, kernel, times)


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
  """Bytes that a fusion reads of one parameter: those that slices take, also of what is computed
  from it element by element."""
  shapes = {line.name: line.shape for line in inside}

  @functools.cache
  def share(value) -> float:
    users = [line for line in inside if value in line.operands]
    if not users:
      return 1.0
    total = 0.0
    count = max(1, _elements(shapes[value]))
    for user in users:
      first = user.operands[0] == value
      if user.opcode in _TAKES and first:
        total += _elements(user.shape) / count * share(user.name)
      elif user.opcode == "dynamic-update-slice" and first:
        continue  # updated in place
      else:
        total += share(user.name) if _elements(user.shape) == count else 1.0
    return min(1.0, total)

  return round(whole * share(name))


def _written(line, inside) -> int:
  if line.opcode == "dynamic-update-slice":
    return 0  # it writes in place what it reads of the update, which is counted there
  root = next((part for part in inside if part.root), None)
  if root is not None and root.opcode == "dynamic-update-slice":
    update = next(part for part in inside if part.name == root.operands[1])
    return size(update.shape)
  return size(line.shape)
