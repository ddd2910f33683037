"""The Triton kernels inside a program that was lowered, and what the assembler makes of them.

jax-triton puts a kernel's PTX into its custom call as a compressed protocol buffer
(`jaxlib/gpu/triton.proto`); its fields are read here by number. No GPU and no Triton is needed.
"""

import dataclasses
import re
import subprocess
import tempfile
import zlib
from collections.abc import Iterator

from jax.extend.mlir import ir

_CALL = "triton_kernel_call"
_CONFIG = "mhlo.backend_config"
_TARGET = "call_target_name"
_WITH_FEATURES = 90  # from this capability on, PTX uses those of one architecture ("sm_90a")
# Lines of PTX that only say where a kernel's source lies.
_PLACES = re.compile(r"^\s*\.(loc|file|section)\b.*$", re.MULTILINE)
_BYTES, _VARINT = 2, 0  # kinds of fields
_FIXED = {1: 8, 5: 4}


@dataclasses.dataclass(frozen=True)
class EmbeddedKernel:
  """One kernel of a program.

  Attributes:
    name: of the function.
    warps: of a thread block.
    shared_bytes: dynamic shared memory of a thread block.
    ptx: the assembler's input.
    capability: it was compiled for, e.g. 80.
  """

  name: str
  warps: int
  shared_bytes: int
  ptx: str
  capability: int

  @property
  def architecture(self) -> str:
    """As ptxas names it: "sm_80"."""
    return f"sm_{self.capability}" + ("a" if self.capability >= _WITH_FEATURES else "")

  @property
  def code(self) -> str:
    """The PTX without the lines of source that it comes from."""
    return _PLACES.sub("", self.ptx)

  def report(self, assembler: str) -> str:
    """Returns what ptxas, at the path `assembler`, says of registers and spills.

    Raises:
      ValueError: it refuses the kernel.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
      file.write(self.ptx)
      file.flush()
      command = [assembler, "-v", f"--gpu-name={self.architecture}", file.name, "-o", "/dev/null"]
      run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
      raise ValueError(f"{self.name} for {self.architecture}: {run.stderr[-300:]}")
    return run.stderr


def embedded_kernels(lowered) -> list[EmbeddedKernel]:
  """Returns the kernels of a `jax.stages.Lowered` in their order."""
  found = []

  def visit(op):
    if is_triton(op):
      found.append(read_kernel(op))
    return ir.WalkResult.ADVANCE

  lowered.compiler_ir().operation.walk(visit)
  return found


def is_triton(op) -> bool:
  """Tells whether an operation of a program is the call of a Triton kernel."""
  return _TARGET in op.attributes and _CALL in str(op.attributes[_TARGET])


def read_kernel(op) -> EmbeddedKernel:
  """Returns the kernel that an operation calls."""
  call = _fields(zlib.decompress(op.attributes[_CONFIG]["opaque"].value_bytes))
  kernel = _fields(_fields(call[1])[1])
  return EmbeddedKernel(
    kernel[1].decode(), kernel[2], kernel.get(3, 0), kernel[4].decode(), kernel[6]
  )


def _fields(data: bytes) -> dict[int, int | bytes]:
  """Returns the fields of a message by number; of a repeated one the last."""
  return dict(_each_field(data))


def _each_field(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  i = 0
  while i < len(data):
    key, i = _varint(data, i)
    kind = key & 7
    if kind == _VARINT:
      value, i = _varint(data, i)
    else:
      size, i = _varint(data, i) if kind == _BYTES else (_FIXED[kind], i)
      value = data[i : i + size]
      i += size
    yield key >> 3, value


def _varint(data: bytes, i: int) -> tuple[int, int]:
  """Returns the number that begins at byte `i`, and the place behind it."""
  value = shift = 0
  while True:
    byte = data[i]
    value |= (byte & 127) << shift
    i += 1
    shift += 7
    if byte < 128:
      return value, i
