"""Compiling for a GPU that is not there: registers, spills, shared memory and temporary bytes, on any Linux machine.

XLA compiles ahead of time for a described device (`targets/*.txtpb`) when the CUDA plugin's wheels lie beside jax; no GPU
and no driver is asked for. Nothing here runs a kernel: numerics come from interpretation, time from a real device.
The process needs `JAX_PLATFORMS=cpu` where there is no GPU: otherwise the plugin looks for one and fails.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import tempfile

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TARGETS = pathlib.Path(__file__).with_name("targets")
WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
# Thread blocks of compute capability 9.0 may ask for this much shared memory (CUDA C programming guide, table of limits).
SHARED_LIMIT = 227 * 1024
# There is no device to time candidates on; without trying, a train step compiles in two thirds of the time, to the same bytes.
NO_AUTOTUNING = {"xla_gpu_autotune_level": 0}


@dataclasses.dataclass(frozen=True)
class KernelResources:
  """What one Mosaic GPU kernel takes, from the assembler's report and the launch.

  Attributes:
    name: the kernel function's name and its number within the program.
    registers: per thread at launch; warpgroups of a warp-specialised kernel trade theirs at run time.
    spill_stores, spill_loads: bytes per thread.
    shared_bytes: dynamic shared memory of the launch plus the static part, per thread block.
    ptx: what the assembler was given.
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
    kernels: the Mosaic GPU kernels inside, in the order they were lowered.
  """

  compiled: jax.stages.Compiled
  kernels: tuple[KernelResources, ...]

  @property
  def temp_bytes(self) -> int:
    """Bytes of buffers that are neither arguments nor results, per device: peak of the schedule, not a sum."""
    return self.compiled.memory_analysis().temp_size_in_bytes

  @property
  def argument_bytes(self) -> int:
    """Bytes of the arguments, per device."""
    return self.compiled.memory_analysis().argument_size_in_bytes

  @property
  def output_bytes(self) -> int:
    """Bytes of the results, per device."""
    return self.compiled.memory_analysis().output_size_in_bytes


def mesh(devices: int = 1, device: str = "h100") -> Mesh:
  """A mesh of `devices` absent GPUs on one axis "data".

  Args:
    devices: how many GPUs of one host.
    device: a name of `targets/*.txtpb`.

  Raises:
    RuntimeError: if the CUDA wheels are missing or of another version than jax, with the pip command.
    ValueError: for an unknown device.
  """
  _require_wheels()
  return _mesh(devices, device)


@functools.cache
def _mesh(devices, device):
  from jax.experimental import topologies  # needs the plugin: imported after it was found

  path = TARGETS / f"{device}.txtpb"
  if not path.exists():
    raise ValueError(
      f"{device=} has no target description; choose one of {sorted(p.stem for p in TARGETS.glob('*.txtpb'))}."
    )
  topology = topologies.get_topology_desc(
    platform="cuda", target_config=path.read_text(), topology=f"1x1x{devices}"
  )
  return topologies.make_mesh(topo=topology, mesh_shape=(devices,), axis_names=("data",))


def _require_wheels() -> None:
  version = jax.__version__
  install = f"python -m pip install {' '.join(f'{w}=={version}' for w in WHEELS)} 'nvidia-cuda-nvcc>=13,<14'"
  for wheel in WHEELS:
    try:
      found = importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
      raise RuntimeError(
        f"compiling for an absent GPU needs {wheel}, which is not installed; run: {install}"
      ) from None
    if found != version:
      raise RuntimeError(
        f"compiling for an absent GPU needs {wheel} of jax's version {version}, found {found}; run: {install}"
      )


def compile_for(
  fn, *args, devices: int = 1, device: str = "h100", shardings=None, options=None
) -> Compilation:
  """Compiles `fn(*args)` for GPUs that are not there.

  Args:
    fn: a function of arrays, or a jitted one (then its own options hold, static arguments must be bound).
    args: pytrees of arrays or `ShapeDtypeStruct`s; only shapes and dtypes are read.
    devices: GPUs in the mesh, axis "data".
    device: a name of `targets/*.txtpb`.
    shardings: None (all replicated), or one entry per argument: a `PartitionSpec`, or a pytree prefix of them.
    options: XLA's, e.g. `NO_AUTOTUNING`.

  Returns:
    The compilation with its kernels' resources. Every call compiles anew, so that a cache cannot hide a report.

  Raises:
    RuntimeError: if the wheels or the CUDA assembler are missing, with the pip command.
  """
  gpus = mesh(devices, device)
  shardings = (PartitionSpec(),) * len(args) if shardings is None else tuple(shardings)
  if len(shardings) != len(args):
    raise ValueError(
      f"shardings must have one entry per argument: got {len(shardings)} for {len(args)}."
    )
  specs = tuple(_specs(gpus, s, a) for s, a in zip(shardings, args, strict=True))
  with _dumps() as folder, _settings(), jax.sharding.use_abstract_mesh(gpus.abstract_mesh):
    # A new function object each time: jax reuses lowered modules of a known one, and those name an earlier folder.
    lowered = jax.jit(lambda *a: fn(*a)).lower(*specs)
    try:
      compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if "suitable version of ptxas" in str(error):
        raise RuntimeError(
          "compiling for an absent GPU needs CUDA's assembler ptxas, which was not found; run: "
          "python -m pip install 'nvidia-cuda-nvcc>=13,<14'"
        ) from error
      raise
    return Compilation(compiled, _read_dumps(folder))


def _specs(gpus: Mesh, sharding, arg):
  """`arg` with shapes and shardings only; `sharding` may be a prefix of its tree."""

  def is_spec(x):
    return x is None or isinstance(x, PartitionSpec)

  def place(spec):
    return NamedSharding(gpus, spec or PartitionSpec())

  def typed(x):
    return jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.numpy.result_type(x))

  def one(x, spec):
    return jax.ShapeDtypeStruct(typed(x).shape, typed(x).dtype, sharding=place(spec))

  return jax.tree.map(
    lambda spec, part: jax.tree.map(lambda x: one(x, spec), part), sharding, arg, is_leaf=is_spec
  )


@contextlib.contextmanager
def _dumps():
  """Has Mosaic GPU write its reports into a folder that lives as long as the block.

  The variables are read when a kernel is lowered and travel inside its module, so they work after jax was imported and
  side by side in several processes. With a folder given it also disassembles, and complains where there is no nvdisasm:
  a stand-in that does nothing keeps it quiet, since nobody reads that listing.
  """
  with tempfile.TemporaryDirectory(prefix="mosaic-") as name:
    folder = pathlib.Path(name)
    (folder / "cuda" / "bin").mkdir(parents=True)
    quiet = folder / "cuda" / "bin" / "nvdisasm"
    quiet.write_text("#!/bin/sh\n")
    quiet.chmod(0o755)
    (folder / "reports").mkdir()
    names = {
      "MOSAIC_GPU_DUMP_TO": str(folder / "reports"),
      "MOSAIC_GPU_CUDA_ROOT": str(folder / "cuda"),
    }
    import jax.experimental.mosaic.gpu  # noqa: F401  (sets MOSAIC_GPU_CUDA_ROOT itself on import: let it, then change it)

    before = {k: os.environ.get(k) for k in names}
    os.environ.update(names)
    try:
      yield folder / "reports"
    finally:
      for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


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
  """One entry per kernel whose assembler report lies in the folder, in the order they were lowered, numbered from 0."""

  def number(path):
    return int(re.search(r"(\d+)$", path.stem)[1])  # counts all kernels of the process

  paths = sorted(folder.glob("*.ptxas"), key=number)
  return tuple(
    _resources(path, f"{path.stem.rpartition('_')[0]}_{i}") for i, path in enumerate(paths)
  )


def _resources(path: pathlib.Path, name: str) -> KernelResources:
  report = path.read_text()

  def number(pattern):
    return int(m[1]) if (m := re.search(pattern, report)) else 0

  if not number(r"Used (\d+) registers"):
    raise RuntimeError(
      f"the assembler's report of {path.stem} names no registers: {report[:200]!r}."
    )
  return KernelResources(
    name,
    number(r"Used (\d+) registers"),
    number(r"(\d+) bytes spill stores"),
    number(r"(\d+) bytes spill loads"),
    number(r"(\d+) bytes smem") + _dynamic_shared(path.with_name(f"{path.stem}.resources.txt")),
    path.with_suffix(".ptx").read_text(),
  )


def _dynamic_shared(path: pathlib.Path) -> int:
  """Shared memory that the launch asks for: scratch arrays and 8 bytes a barrier. The assembler sees the static part only."""
  text = path.read_text()
  scratch = re.search(r"smem_scratch_bytes=(\d+)", text)
  if not scratch:
    raise RuntimeError(f"cannot read the dynamic shared memory of {path.stem}: {text[:200]!r}.")
  barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", text)
  return int(scratch[1]) + 8 * sum(int(size) * int(count) for size, count in barriers)
