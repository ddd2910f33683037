"""Compiling for an H100 that is not there: reports of kernels, collectives, missing wheels."""

import importlib.metadata
import os

import jax
import jax.numpy as jnp
import pytest
from freqformer.kernels.core.target import Target, current_target
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from tools import offline

_TILE = (64, 128)
_TILE_BYTES = 64 * 128 * 2
_spec = jax.ShapeDtypeStruct


def scale_rows(x):
  """A probe: every 64x128 tile of a bf16 `[n, 128]` array through shared memory, times 2."""

  def scale_body(x_gm, o_gm, x_sm, bar):
    rows = pl.ds(lax.axis_index("i") * _TILE[0], _TILE[0])
    plgpu.copy_gmem_to_smem(x_gm.at[rows], x_sm, bar)
    plgpu.barrier_wait(bar)
    x_sm[...] = x_sm[...] * 2
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_sm, o_gm.at[rows])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    scale_body,
    out_type=_spec(x.shape, x.dtype),
    grid=(x.shape[0] // _TILE[0],),
    grid_names=("i",),
    scratch_types=[plgpu.SMEM(_TILE, x.dtype), plgpu.Barrier()],
  )(x)


def test_a_kernel_reports_its_resources_every_time():
  x = _spec((1024, 128), jnp.bfloat16)
  first = offline.compile_for(scale_rows, x)
  # Neither jax's caches nor Mosaic's may swallow the report.
  assert offline.compile_for(scale_rows, x).kernels == first.kernels
  (kernel,) = first.kernels
  assert kernel.name.startswith("scale_body")
  assert kernel.spill_stores == kernel.spill_loads == 0
  assert 8 <= kernel.registers <= 255
  # The tile, its barrier, and what alignment adds; the assembler alone reports a byte or so.
  assert _TILE_BYTES < kernel.shared_bytes < _TILE_BYTES + 2048 < offline.SHARED_LIMIT
  assert first.argument_bytes == first.output_bytes == 1024 * 128 * 2
  assert first.temp_bytes < 1024 * 128 * 2


def test_two_kernels_are_told_apart():
  def both(a, b):
    return scale_rows(a), scale_rows(b) + 1

  inputs = [_spec((rows, 128), jnp.bfloat16) for rows in (1024, 4096)]
  names = {kernel.name for kernel in offline.compile_for(both, *inputs).kernels}
  assert names == {"scale_body_0", "scale_body_1"}


def test_eight_gpus_show_their_collective():
  def mean(params, x):
    return jax.grad(lambda p: jnp.mean((x @ p) ** 2))(params)

  args = [_spec((64, 64), jnp.float32), _spec((4096, 64), jnp.float32)]
  eight = offline.compile_for(mean, *args, devices=8, shardings=(P(), P("data")))
  assert "all-reduce" in eight.compiled.as_text()
  assert eight.argument_bytes == 64 * 64 * 4 + 4096 // 8 * 64 * 4
  assert "all-reduce" not in offline.compile_for(mean, *args).compiled.as_text()


def test_no_trace_is_left():
  """Settings of the process are afterwards what they were, even after an error."""

  def settings():
    dumps = {k: v for k, v in os.environ.items() if k.startswith("MOSAIC_GPU_DUMP")}
    little = jax.config.read("jax_disable_most_optimizations")
    return dumps, little, jax.config.jax_persistent_cache_min_compile_time_secs

  seen = []

  def fails(x):
    seen.append(settings())
    return 1 // 0

  before = settings()
  with pytest.raises(ZeroDivisionError):
    offline.compile_for(fails, jnp.zeros(3))
  assert settings() == before
  # The tests spare XLA's optimisations (tests/conftest.py); a compile for a GPU does not.
  ((dumps, spared, _),) = seen
  assert before[1] and not spared
  assert dumps


def test_code_sees_the_absent_gpu():
  seen = []
  offline.compile_for(lambda x: seen.append(current_target()) or x, jnp.zeros(3))
  assert seen == [Target("cuda", "NVIDIA H100 80GB HBM3", "9.0")]
  assert "compute capability 9.0" in str(seen[0])
  assert current_target().platform == "cpu"
  assert current_target().capability is None


@pytest.mark.parametrize("found", [None, "0.10.0"])
def test_missing_wheels_say_what_to_run(monkeypatch, found):
  def version(name):
    if found is None:
      raise importlib.metadata.PackageNotFoundError(name)
    return found

  monkeypatch.setattr(importlib.metadata, "version", version)
  command = rf"run: python -m pip install jax-cuda13-plugin=={jax.__version__}"
  with pytest.raises(RuntimeError, match=f"found {found or 'none'}; {command}"):
    offline.compile_for(lambda x: x, jnp.zeros(3))


def test_unknown_device_and_sharding_count():
  with pytest.raises(ValueError, match="choose one of .*h100"):
    offline.mesh(device="h1")
  with pytest.raises(ValueError, match="one entry per argument"):
    offline.compile_for(lambda x: x, jnp.zeros(3), shardings=())
