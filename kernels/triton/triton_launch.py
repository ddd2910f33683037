"""Launches of Triton kernels from JAX: every Triton kernel of the project goes through here."""

import contextlib
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
import triton.experimental.gluon  # noqa: F401  (the interpreter would import it as it runs)
import triton.language as tl
from freqformer.kernels.core.target import current_target
from freqformer.kernels.core.varying import vary_over, varying_axes
from freqformer.kernels.triton.interpret import is_interpreted
from jax.custom_batching import sequential_vmap
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

# From Blackwell on Triton writes PTX as its own assembler takes it, version 9.1. That of the oldest
# CUDA 13, which jax allows, takes 9.0.
_BLACKWELL = 100
_PTX_VERSION = 90
# The interpreter patches Triton's library, which all threads share.
_lock = threading.Lock()
_LIBRARY = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
_TYPE_NAMES = {"float32": "fp32", "float16": "fp16", "int32": "i32"}


def launch(
  kernel: JITFunction,
  operands: Sequence,
  out_type: Sequence[jax.ShapeDtypeStruct],
  constants: Mapping,
  *,
  blocks: int,
  warps: int,
  stages: int,
  cost: Mapping,
) -> list[jax.Array]:
  """Runs a kernel on a grid of thread blocks along one axis.

  Args:
    kernel: takes operands, results and constants; sizes and strides are constants, for Triton
      forgets by what an operand can be divided.
    operands: arrays.
    out_type: of the results; the kernel writes every number of them.
    constants: by name.
    blocks: number of thread blocks.
    warps: of a thread block.
    stages: of loads that run ahead in a loop, the one in use included.
    cost: of all blocks, for readers of the program: `flops` and `bytes_accessed`; jax-triton takes
      no other numbers.

  Returns:
    The results. Under `jax.vmap` the launches follow each other.
  """
  operands = [jnp.asarray(x) for x in operands]
  if is_interpreted():
    return _interpret(kernel, operands, out_type, constants, blocks)
  capability = int(current_target().capability.replace(".", ""))
  options = {"enable_fp_fusion": True}  # later versions of Triton leave it out
  if capability >= _BLACKWELL:
    options["ptx_version"] = _PTX_VERSION

  def run(*operands):
    found = jax_triton.triton_call(
      *operands,
      kernel=kernel,
      out_type=tuple(out_type),
      grid=(blocks,),
      num_warps=warps,
      num_stages=stages,
      compute_capability=capability,
      cost_estimate={name: cost[name] for name in ("flops", "bytes_accessed")},
      name=kernel.fn.__name__,
      backend_options=options,
      **constants,
    )
    return vary_over(varying_axes(operands), list(found))

  return sequential_vmap(run)(*operands)


# ---- interpretation ------------------------------------------------------------------------------


def _interpret(kernel, operands, out_type, constants, blocks) -> list[jax.Array]:
  """Runs a kernel on the host; numbers are float32 where they are bfloat16, until the end."""

  def wide(dtype):
    return jnp.dtype(jnp.float32) if dtype == jnp.bfloat16 else dtype  # else products of its bits

  results = [jax.ShapeDtypeStruct(x.shape, wide(x.dtype)) for x in out_type]

  def run(*operands):
    arrays = [np.array(x) for x in operands]
    found = [np.full(x.shape, np.nan, x.dtype) for x in results]
    run_on_host(kernel, arrays, found, constants, blocks)
    return found

  operands = [x.astype(wide(x.dtype)) for x in operands]
  found = jax.pure_callback(run, results, *operands, vmap_method="sequential")
  found = [x.astype(kind.dtype) for x, kind in zip(found, out_type, strict=True)]
  return vary_over(varying_axes(operands), found)


def run_on_host(
  kernel: JITFunction,
  arrays: Sequence[np.ndarray],
  results: Sequence[np.ndarray],
  constants: Mapping,
  blocks: int,
):
  """Interprets a kernel on NumPy arrays; it writes `results` in place."""
  with _lock, _interpretable(kernel) as function:
    function[(blocks,)](*map(_HostArray, (*arrays, *results)), **constants)


class _HostArray:
  """A NumPy array with what the interpreter asks a tensor of PyTorch for."""

  def __init__(self, array: np.ndarray):
    self.array = array

  @property
  def dtype(self) -> str:
    return _TYPE_NAMES[self.array.dtype.name]

  def data_ptr(self) -> int:
    return self.array.ctypes.data

  def untyped_storage(self) -> "_HostArray":
    return self

  def cpu(self) -> "_HostArray":
    return self

  def new_empty(self, *_, **__) -> "_HostArray":
    return _HostArray(self.array)

  def set_(self, storage: "_HostArray", *_):
    self.array = storage.array

  def storage_offset(self) -> int:
    return 0

  def size(self) -> tuple[int, ...]:
    return self.array.shape

  def stride(self) -> tuple[int, ...]:
    return self.array.strides

  def copy_(self, other: "_HostArray"):
    """Does nothing: both are the same memory."""


@contextlib.contextmanager
def _interpretable(kernel: JITFunction) -> Iterator[Callable]:
  """Gives a kernel as the interpreter takes it, with all that it calls, and Triton's library back.

  The interpreter does not take back what it changes in the library for nested calls: a program that
  is compiled later would be built from that.
  """
  before = [dict(vars(space)) for space in _LIBRARY]
  made = {}

  def once(function: JITFunction) -> InterpretedFunction:
    if function not in made:
      made[function] = InterpretedFunction(function.fn)
    return made[function]

  def copied(function: Callable, scope: dict) -> InterpretedFunction:
    own = types.FunctionType(
      function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    own.__annotations__ = function.__annotations__
    own.__kwdefaults__ = function.__kwdefaults__
    return InterpretedFunction(own)

  try:
    for space in (tl, tl.standard):
      for name, value in list(vars(space).items()):
        if isinstance(value, JITFunction):
          setattr(space, name, once(value))
    # A copy of the kernel's module, in which the functions that it calls are interpreted, too.
    scope = dict(kernel.fn.__globals__)
    for name, value in list(scope.items()):
      if isinstance(value, JITFunction):
        scope[name] = copied(value.fn, scope)
    yield copied(kernel.fn, scope)
  finally:
    InterpretedFunction.rewritten_fn.clear()  # they name what is taken back here
    for space, names in zip(_LIBRARY, before, strict=True):
      for name in vars(space).keys() - names.keys():
        delattr(space, name)
      for name, value in names.items():
        if vars(space)[name] is not value:
          setattr(space, name, value)
