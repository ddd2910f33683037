"""Compiling for an H100 that is not there: reports of kernels, collectives of 8 GPUs, clear words where a wheel is missing."""

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
    out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
    grid=(x.shape[0] // _TILE[0],),
    grid_names=("i",),
    scratch_types=[plgpu.SMEM(_TILE, x.dtype), plgpu.Barrier()],
  )(x)


def test_a_kernel_reports_its_resources_every_time():
  x = jax.ShapeDtypeStruct((1024, 128), jnp.bfloat16)
  first, second = offline.compile_for(scale_rows, x), offline.compile_for(scale_rows, x)
  assert first.kernels == second.kernels  # neither jax's caches nor Mosaic's may swallow the report
  (kernel,) = first.kernels
  assert kernel.name.startswith("scale_body")
  assert kernel.spill_stores == kernel.spill_loads == 0
  assert 8 <= kernel.registers <= 255
  # The tile, its barrier, and what alignment adds; the assembler alone reports a byte or so.
  assert 64 * 128 * 2 < kernel.shared_bytes < 64 * 128 * 2 + 2048 < offline.SHARED_LIMIT
  assert first.argument_bytes == first.output_bytes == 1024 * 128 * 2
  assert first.temp_bytes < 1024 * 128 * 2


def test_two_kernels_are_told_apart():
  two = offline.compile_for(
    lambda a, b: (scale_rows(a), scale_rows(b) + 1), *_inputs((1024, 128), (4096, 128))
  )
  assert len({k.name for k in two.kernels}) == len(two.kernels) == 2


def _inputs(*shapes):
  return [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]


def test_eight_gpus_show_their_collective():
  def mean(params, x):
    return jax.grad(lambda p: jnp.mean((x @ p) ** 2))(params)

  args = [
    jax.ShapeDtypeStruct((64, 64), jnp.float32),
    jax.ShapeDtypeStruct((4096, 64), jnp.float32),
  ]
  eight = offline.compile_for(mean, *args, devices=8, shardings=(P(), P("data")))
  assert "all-reduce" in eight.compiled.as_text()
  assert eight.argument_bytes == 64 * 64 * 4 + 4096 // 8 * 64 * 4
  assert "all-reduce" not in offline.compile_for(mean, *args).compiled.as_text()


def test_no_trace_is_left():
  before = {k: v for k, v in os.environ.items() if k.startswith("MOSAIC_GPU_DUMP")}
  cached = jax.config.jax_persistent_cache_min_compile_time_secs
  with pytest.raises(ZeroDivisionError):
    offline.compile_for(lambda x: 1 // 0, jnp.zeros(3))
  assert {k: v for k, v in os.environ.items() if k.startswith("MOSAIC_GPU_DUMP")} == before
  assert jax.config.jax_persistent_cache_min_compile_time_secs == cached


def test_it_compiles_as_a_gpu_would():
  """Whatever this process spares its own programs; afterwards it spares them again."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    with offline._settings():
      assert not jax.config.read("jax_disable_most_optimizations")
    assert jax.config.read("jax_disable_most_optimizations")
  finally:
    jax.config.update("jax_disable_most_optimizations", before)


def test_code_sees_the_absent_gpu():
  seen = []
  offline.compile_for(lambda x: seen.append(current_target()) or x, jnp.zeros(3))
  assert seen == [Target("cuda", "NVIDIA H100 80GB HBM3", "9.0")]
  assert "compute capability 9.0" in str(seen[0])
  assert current_target().platform == "cpu" and current_target().capability is None


@pytest.mark.parametrize("found", [None, "0.10.0"])
def test_missing_wheels_say_what_to_run(monkeypatch, found):
  def version(name):
    if found is None:
      raise importlib.metadata.PackageNotFoundError(name)
    return found

  monkeypatch.setattr(importlib.metadata, "version", version)
  with pytest.raises(
    RuntimeError, match=rf"run: python -m pip install jax-cuda13-plugin=={jax.__version__}"
  ):
    offline.compile_for(lambda x: x, jnp.zeros(3))


def test_unknown_device_and_sharding_count():
  with pytest.raises(ValueError, match="choose one of .*h100"):
    offline.mesh(device="h1")
  with pytest.raises(ValueError, match="one entry per argument"):
    offline.compile_for(lambda x: x, jnp.zeros(3), shardings=())
