"""Bytes that each operation of a scheduled HLO module moves through device memory, from its text.

An operation reads its operands and writes its results, whole; a fusion that only slices or gathers
from an operand reads what it takes, and one that updates a slice in place writes that slice. Loops
count as often as they run, where the program says so. Caches are not modelled: what fits the L2
between two operations is cheaper than counted here.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_SHAPE = re.compile(r"\b(pred|(?:bf|f|s|u)(?:8|16|32|64))\[([\d,]*)\]")
_LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
# Operations that move nothing themselves.
_FREE = set(
  "parameter constant bitcast tuple get-tuple-element after-all partition-id iota".split()
)
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_TAKES = {"slice", "dynamic-slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Operation:
  """One launched operation.

  Attributes:
    name: as in the module.
    opcode: as in the module.
    bytes: read and written, times the runs of the loops around it.
    scopes: the `op_name`s of all it holds, as jax wrote them.
    kernel: a custom call: not XLA's own.
    runs: how often, by the loops around it.
    result: bytes of its result, times the runs.
  """

  name: str
  opcode: str
  bytes: float
  scopes: tuple[str, ...]
  kernel: bool
  runs: float = 1.0
  result: float = 0.0


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
  """Returns all operations of a module in scheduled order, loops' bodies in place of the loops.

  Args:
    text: `compiled.as_text()`.
    unknown_trips: how often a loop runs whose count the module does not know.
  """
  computations = {}
  current = []
  for line in text.splitlines():
    if header := re.match(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
      current = computations.setdefault(header[1], [])
    elif parts := _LINE.match(line):
      name, shape, opcode, tail = parts.groups()
      operands = tuple(re.findall(r"%([\w.-]+)", tail.split(")", 1)[0]))
      current.append(_Line(name, shape, opcode, operands, tail, line.lstrip().startswith("ROOT")))
  entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)[1]
  return list(_walk(computations, entry, 1, unknown_trips))


def collectives(text: str) -> dict[str, tuple[int, float]]:
  """Returns how often devices exchange arrays in a run of a module, and bytes of the results.

  Args:
    text: `compiled.as_text()`, one device's program.

  Returns:
    `{"all-gather": (runs, bytes), ...}`.
  """
  found = {}
  for op in operations(text):
    kind = op.opcode.removesuffix("-start")
    if kind in _COLLECTIVES:
      runs, moved = found.get(kind, (0, 0))
      found[kind] = (runs + round(op.runs), moved + op.result)
  return found


def size(shape: str) -> int:
  """Returns the bytes of a shape or tuple of shapes, as HLO writes it."""
  return sum(
    math.prod(int(d) for d in dims.split(",") if d)
    * (1 if kind == "pred" else int(kind.lstrip("bfsu")) // 8)
    for kind, dims in _SHAPE.findall(shape)
  )


def _walk(computations, name, times, unknown_trips) -> Iterator[Operation]:
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
      held = "\n".join(part.rest for part in (*inside, line))
      scopes = tuple(dict.fromkeys(re.findall(r'op_name="([^"]*)"', held)))
      kernel = line.opcode == "custom-call"
      result = size(line.shape)
      if line.opcode in ("all-gather-start", "all-to-all-start", "collective-permute-start"):
        result -= _read(line, [], shapes)  # the operands stand beside the results
      yield Operation(line.name, line.opcode, times * moved, scopes, kernel, times, times * result)


def _read(line, inside, shapes) -> int:
  if inside:
    parameters = {int(p.rest.split(")")[0]): p.name for p in inside if p.opcode == "parameter"}
    return sum(
      _taken(inside, parameters[i], size(shapes.get(o, "")))
      for i, o in enumerate(line.operands)
      if i in parameters
    )
  if line.opcode in _TAKES:
    return size(line.shape)
  operands = line.operands[1:] if line.opcode == "dynamic-update-slice" else line.operands
  return sum(size(shapes[o]) for o in dict.fromkeys(operands) if o in shapes)


def _taken(inside, name, whole) -> int:
  """Returns what a fusion reads of a parameter: slices, also behind element-wise operations."""
  shapes = {line.name: line.shape for line in inside}

  def elements(shape):
    return sum(math.prod(int(d) for d in dims.split(",") if d) for _, dims in _SHAPE.findall(shape))

  @functools.cache
  def share(value) -> float:
    users = [line for line in inside if value in line.operands]
    if not users:
      return 1.0
    total = 0.0
    count = max(1, elements(shapes[value]))
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
  for root in inside:
    if root.root and root.opcode == "dynamic-update-slice":
      return size(next(part.shape for part in inside if part.name == root.operands[1]))
  return size(line.shape)
