"""Compiling for a GPU that is not there: registers, spills, shared memory and temporary bytes.

XLA compiles ahead of time for a described device (`targets/*.txtpb`) on any Linux machine when the
CUDA plugin's wheels are installed with jax; no GPU and no driver is needed. Nothing here runs a
kernel: numerics come from interpretation, time from a real device. The process needs
`JAX_PLATFORMS=cpu` where there is no GPU: otherwise the plugin looks for one and fails.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from unittest import mock

import jax
import jax.numpy as jnp
from freqformer.kernels.hopper.machine import SHARED_BYTES
from jax.extend.core import jaxprs_in_params
from jax.extend.mlir import ir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from freqformer import kernels
from tools.triton_kernels import embedded_kernels, is_triton, read_kernel

TARGETS = pathlib.Path(__file__).with_name("targets")
WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
ASSEMBLER = "nvidia-cuda-nvcc"
_ASSEMBLER_PIN = f"'{ASSEMBLER}>=13,<14'"
# There is no device to time candidates on. Without trying, a train step compiles in two thirds of
# the time, to the same bytes.
NO_AUTOTUNING = {"xla_gpu_autotune_level": 0}
_BARRIER_BYTES = 8
_KERNEL = "mhlo.backend_config"  # attribute of a call that holds a kernel
_CALL = "stablehlo.custom_call"
_CONSTANT = "stablehlo.constant"
_LATER = "CustomSPMDPartitioning"  # a call whose kernel XLA lowers when it compiles
_NUMBERED = "mosaic_gpu.dump_basename"  # a kernel's attribute with its number in the process
SHARED_LIMIT = SHARED_BYTES  # of a thread block


@dataclasses.dataclass(frozen=True)
class KernelResources:
  """Resources of one Mosaic GPU or Triton kernel, from the assembler's report and the launch.

  Attributes:
    name: the kernel function's name and its number within the program.
    registers: per thread at launch; warpgroups of a warp-specialised kernel trade theirs at run
      time.
    spill_stores: bytes per thread.
    spill_loads: bytes per thread.
    shared_bytes: dynamic shared memory of the launch plus the static part, per thread block.
    ptx: the assembler's input.
  """

  name: str
  registers: int
  spill_stores: int
  spill_loads: int
  shared_bytes: int
  ptx: str = dataclasses.field(default="", repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Compilation:
  """A program compiled for an absent device; it cannot be run here.

  Attributes:
    compiled: jax's `Compiled`; `as_text()` is the optimised, scheduled HLO of one device.
    kernels: the Mosaic GPU kernels inside, in the order they were lowered, and behind them the
      Triton kernels, but those that XLA lowers itself, as it does for several devices.
    fingerprint: of the program and of what compiled it, as `compile_for` takes it.
  """

  compiled: jax.stages.Compiled
  kernels: tuple[KernelResources, ...]
  fingerprint: str = ""

  @property
  def temp_bytes(self) -> int:
    """Bytes per device of buffers that are neither arguments nor results: the schedule's peak."""
    return self.compiled.memory_analysis().temp_size_in_bytes

  @property
  def argument_bytes(self) -> int:
    """Bytes of the arguments, per device."""
    return self.compiled.memory_analysis().argument_size_in_bytes

  @property
  def output_bytes(self) -> int:
    """Bytes of the results, per device."""
    return self.compiled.memory_analysis().output_size_in_bytes


def mesh(devices: int | Mapping[str, int] = 1, device: str = "h100") -> Mesh:
  """Returns a mesh of absent GPUs.

  Args:
    devices: number of GPUs of one host along each axis; a number alone is that of axis "data".
    device: a name of `targets/*.txtpb`.

  Raises:
    RuntimeError: if the CUDA wheels are missing or of another version than jax, with the pip
      command.
    ValueError: for an unknown device.
  """
  _require_wheels()
  axes = devices if isinstance(devices, Mapping) else {"data": devices}
  return _mesh(tuple(axes.items()), device)


@functools.cache
def _mesh(axes: tuple[tuple[str, int], ...], device: str) -> Mesh:
  from jax.experimental import topologies  # needs the plugin: imported after it was found

  path = TARGETS / f"{device}.txtpb"
  if not path.exists():
    known = sorted(target.stem for target in TARGETS.glob("*.txtpb"))
    raise ValueError(f"{device=} has no target description; choose one of {known}.")
  names, sizes = zip(*axes, strict=True)
  topology = topologies.get_topology_desc(
    platform="cuda", target_config=path.read_text(), topology=f"1x1x{math.prod(sizes)}"
  )
  return topologies.make_mesh(topo=topology, mesh_shape=sizes, axis_names=names)


def _require_wheels() -> None:
  version = jax.__version__
  pins = " ".join(f"{wheel}=={version}" for wheel in WHEELS)
  for wheel in WHEELS:
    try:
      found = importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
      found = None
    if found != version:
      raise RuntimeError(
        f"compiling for an absent GPU needs {wheel} of jax's version {version}, "
        f"found {found or 'none'}; run: python -m pip install {pins} {_ASSEMBLER_PIN}"
      )


@functools.cache
def assembler_version() -> str:
  """Returns the version of ptxas, CUDA's assembler, that XLA runs: "13.0.88"."""
  command = [assembler(), "--version"]
  said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  return re.search(r"V(\d+\.\d+\.\d+)", said)[1]


def assembler() -> str:
  """Returns the path of the ptxas that XLA runs.

  XLA takes the first on the path, then that of /usr/local/cuda, then that of the wheel.
  """
  found = shutil.which("ptxas") or shutil.which("/usr/local/cuda/bin/ptxas")
  if found is None:
    found = importlib.metadata.distribution(ASSEMBLER).locate_file("nvidia/cu13/bin/ptxas")
  return str(found)


def compile_for(
  fn,
  *args,
  devices: int | Mapping[str, int] = 1,
  device: str = "h100",
  shardings=None,
  options: dict | None = None,
  unless: str | None = None,
) -> Compilation | None:
  """Compiles `fn(*args)` for GPUs that are not there.

  Args:
    fn: a function of arrays, or a jitted one (then its own options hold, and static arguments must
      be bound).
    args: pytrees of arrays or `ShapeDtypeStruct`s; only shapes and dtypes are read.
    devices: of `mesh`.
    device: a name of `targets/*.txtpb`.
    shardings: None (all replicated), or one entry per argument: a `PartitionSpec`, or a pytree
      prefix of them.
    options: XLA's, e.g. `NO_AUTOTUNING`.
    unless: a fingerprint; a program that has it is lowered and not compiled, as what comes out is
      known: the same compilers make the same of the same program.

  Returns:
    The compilation with its kernels' resources; None for a program with the fingerprint `unless`.
    Every other call compiles anew, so that a cache cannot hide a report.

  Raises:
    RuntimeError: if the wheels or the CUDA assembler are missing, with the pip command.
    ValueError: if there are not as many shardings as arguments.
  """
  gpus = mesh(devices, device)
  with _dumps() as folder, _settings(), jax.sharding.use_abstract_mesh(gpus.abstract_mesh):
    traced = _trace(gpus, fn, args, shardings)
    lowered = traced.lower()
    fingerprint = _fingerprint(traced.jaxpr, lowered, device, options)
    if fingerprint == unless:
      return None
    try:
      compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if "suitable version of ptxas" in str(error):
        raise RuntimeError(
          "compiling for an absent GPU needs CUDA's assembler ptxas, which was not found; run: "
          f"python -m pip install {_ASSEMBLER_PIN}"
        ) from error
      raise
    return Compilation(compiled, _read_dumps(folder) + triton_resources(lowered), fingerprint)


def lower_for(
  fn, *args, devices: int | Mapping[str, int] = 1, device: str = "h100", shardings=None
) -> jax.stages.Lowered:
  """Returns `fn(*args)` lowered for GPUs that are not there; arguments are those of `compile_for`.

  Raises:
    ValueError: if there are not as many shardings as arguments.
  """
  gpus = mesh(devices, device)
  with jax.sharding.use_abstract_mesh(gpus.abstract_mesh):
    return _trace(gpus, fn, args, shardings).lower()


def _trace(gpus: Mesh, fn, args: tuple, shardings) -> jax.stages.Traced:
  """Traces `fn(*args)` for GPUs whose abstract mesh is the current one."""
  shardings = (PartitionSpec(),) * len(args) if shardings is None else tuple(shardings)
  if len(shardings) != len(args):
    raise ValueError(
      f"shardings must have one entry per argument: got {len(shardings)} for {len(args)}."
    )
  specs = [_specs(gpus, *pair) for pair in zip(shardings, args, strict=True)]
  # A new function object each time: jax reuses lowered modules of a known one, and those name an
  # earlier folder of reports.
  return jax.jit(lambda *a: fn(*a)).trace(*specs)


def _fingerprint(traced, lowered, device: str, options: dict | None) -> str:
  """Returns a hash of what a compilation depends on, hex.

  These are the program with its kernels, without the lines of code that they come from; the
  versions of jax, its plugins and the assembler; the GPU; and XLA's options, but those of the
  environment. Tables of floating-point numbers count by their shapes: in their last bits they are
  of the machine whose NumPy computed them, and no resource depends on them.

  Of several devices XLA lowers some kernels itself, for the part of a device. What these are is
  known before: as they are traced for whole arrays, and by the code that lowers them.
  """
  wheels = [importlib.metadata.version(name) for name in ("jax", "jaxlib", *WHEELS)]
  target = (TARGETS / f"{device}.txtpb").read_text()
  found = hashlib.sha256(repr((wheels, assembler_version(), target, options)).encode())
  later = list(_lowered_later(traced.jaxpr))
  for text in later:
    found.update(text.encode())
  if later:
    found.update(_code_of_kernels())
  context = lowered.compiler_ir().context
  unknown = context.allow_unregistered_dialects
  context.allow_unregistered_dialects = True  # kernels are of Mosaic's own
  try:
    with context, ir.Location.unknown(context):
      program = lowered.compiler_ir().operation.clone()

      def take_out(op):
        if (
          "call_target_name" in op.attributes and op.attributes["call_target_name"].value == _LATER
        ):
          op.attributes["backend_config"] = ir.StringAttr.get("")  # a number in the process
        if op.name == _CONSTANT and _is_table(op.attributes["value"]):
          kind = op.attributes["value"].type
          zero = ir.FloatAttr.get(kind.element_type, 0.0)
          op.attributes["value"] = ir.DenseElementsAttr.get_splat(kind, zero)
        config = op.attributes[_KERNEL] if _KERNEL in op.attributes else None
        if isinstance(config, ir.DictAttr) and "module" in config:
          kernel = ir.Module.parse(config["module"].value_bytes, context).operation
          del kernel.attributes[_NUMBERED]
          found.update(kernel.get_asm(enable_debug_info=False).encode())
          # The hash is of the kernel with its lines of code.
          others = {part.name: str(part.attr) for part in config}
          del others["module"], others["kernel_hash"]
          found.update(repr(others).encode())
          del op.attributes[_KERNEL]
        elif is_triton(op):
          kernel = read_kernel(op)
          found.update(repr(dataclasses.replace(kernel, ptx=kernel.code)).encode())
          del op.attributes[_KERNEL]
        return ir.WalkResult.ADVANCE

      program.walk(take_out)
      found.update(program.get_asm(enable_debug_info=False).encode())
  finally:
    context.allow_unregistered_dialects = unknown
  return found.hexdigest()


def _lowered_later(jaxpr):
  """Yields the texts of what XLA lowers itself, in order, without addresses in the process."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "custom_partitioning":
      text = f"{equation.params['call']} {equation.params['sharding_rule']}"
      yield re.sub(r"\b0x[0-9a-f]+", "", text)
    else:
      for inner in jaxprs_in_params(equation.params):
        yield from _lowered_later(inner)


@functools.cache
def _code_of_kernels() -> bytes:
  """Returns a hash of the package of kernels."""
  found = hashlib.sha256()
  folder = pathlib.Path(kernels.__file__).parent
  for path in sorted(folder.rglob("*.py")):
    found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
  return found.digest()


def _is_table(value) -> bool:
  """Returns whether a constant holds floating-point numbers that are not all the same."""
  return isinstance(value, ir.DenseFPElementsAttr) and not value.is_splat


def _specs(gpus: Mesh, sharding, arg):
  """Returns the shapes and shardings of `arg`; `sharding` may be a prefix of its tree."""

  def is_spec(x):
    return x is None or isinstance(x, PartitionSpec)

  def placed(spec, part):
    place = NamedSharding(gpus, spec or PartitionSpec())
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=place), part
    )

  return jax.tree.map(placed, sharding, arg, is_leaf=is_spec)


@contextlib.contextmanager
def _dumps():
  """Makes Mosaic GPU write its reports into a folder that lives as long as the block.

  The variables are read when a kernel is lowered and travel inside its module, so they work after
  jax was imported, and in several processes at once. With a folder given, Mosaic also disassembles,
  and complains where there is no nvdisasm: a stand-in that does nothing keeps it quiet, since
  nobody reads that listing.
  """
  with tempfile.TemporaryDirectory(prefix="mosaic-") as name:
    folder = pathlib.Path(name)
    (folder / "cuda" / "bin").mkdir(parents=True)
    quiet = folder / "cuda" / "bin" / "nvdisasm"
    quiet.write_text("#!/bin/sh\n")
    quiet.chmod(0o755)
    (folder / "reports").mkdir()
    # This import sets MOSAIC_GPU_CUDA_ROOT: it must come before the change.
    import jax.experimental.mosaic.gpu  # noqa: F401

    variables = {
      "MOSAIC_GPU_DUMP_TO": str(folder / "reports"),
      "MOSAIC_GPU_CUDA_ROOT": str(folder / "cuda"),
    }
    with mock.patch.dict(os.environ, variables):
      yield folder / "reports"


@contextlib.contextmanager
def _settings():
  """Compiles as a GPU's own process would, and stores nothing.

  The module names a folder of its own, so that no later compile could find it again in a cache.
  """
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  little = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
  jax.config.update("jax_disable_most_optimizations", False)
  try:
    yield
  finally:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    jax.config.update("jax_disable_most_optimizations", little)


def _read_dumps(folder: pathlib.Path) -> tuple[KernelResources, ...]:
  """Returns the reported kernels in the order they were lowered, numbered from 0."""

  def number(path):
    return int(re.search(r"(\d+)$", path.stem)[1])  # counts all kernels of the process

  paths = sorted(folder.glob("*.ptxas"), key=number)
  return tuple(
    _resources(path, f"{path.stem.rpartition('_')[0]}_{i}") for i, path in enumerate(paths)
  )


def _resources(path: pathlib.Path, name: str) -> KernelResources:
  dynamic = _dynamic_shared(path.with_name(f"{path.stem}.resources.txt"))
  return _reported(name, path.read_text(), dynamic, path.with_suffix(".ptx").read_text())


def triton_resources(lowered: jax.stages.Lowered) -> tuple[KernelResources, ...]:
  """Returns the Triton kernels of a lowered program in their order, numbered from 0.

  Raises:
    ValueError: the assembler refuses one.
  """
  return tuple(
    _reported(f"{each.name}_{i}", each.report(assembler()), each.shared_bytes, each.ptx)
    for i, each in enumerate(embedded_kernels(lowered))
  )


def _reported(name: str, report: str, dynamic: int, ptx: str) -> KernelResources:
  """Returns what the assembler's report says, and the shared memory that the launch asks for."""

  def number(pattern):
    match = re.search(pattern, report)
    return int(match[1]) if match else 0

  registers = number(r"Used (\d+) registers")
  if not registers:
    raise RuntimeError(f"the assembler's report of {name} has no registers: {report[:200]!r}.")
  return KernelResources(
    name=name,
    registers=registers,
    spill_stores=number(r"(\d+) bytes spill stores"),
    spill_loads=number(r"(\d+) bytes spill loads"),
    shared_bytes=number(r"(\d+) bytes smem") + dynamic,
    ptx=ptx,
  )


def _dynamic_shared(path: pathlib.Path) -> int:
  """Returns the shared memory that the launch asks for: scratch arrays and barriers.

  The assembler sees the static part only.
  """
  text = path.read_text()
  scratch = re.search(r"smem_scratch_bytes=(\d+)", text)
  if not scratch:
    raise RuntimeError(f"cannot read the dynamic shared memory of {path.stem}: {text[:200]!r}.")
  barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", text)
  return int(scratch[1]) + _BARRIER_BYTES * sum(int(size) * int(count) for size, count in barriers)
