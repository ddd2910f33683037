"""Compiling for an H100 that is not there: reports of kernels, collectives, missing wheels."""

import importlib.metadata
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.core.partition import by_sample_and_head
from freqformer.kernels.core.target import Target, current_target
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from tools import offline

_TILE = (64, 128)
_TILE_BYTES = 64 * 128 * 2
_spec = jax.ShapeDtypeStruct


def scale_rows(x, factor=2):
  """A probe: every 64x128 tile of a bf16 `[n, 128]` array through shared memory, times 2."""

  def scale_body(x_gm, o_gm, x_sm, bar):
    rows = pl.ds(lax.axis_index("i") * _TILE[0], _TILE[0])
    plgpu.copy_gmem_to_smem(x_gm.at[rows], x_sm, bar)
    plgpu.barrier_wait(bar)
    x_sm[...] = x_sm[...] * factor
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


def test_kernels_report_their_resources_every_time():
  def both(a, b):
    return scale_rows(a), scale_rows(b) + 1

  inputs = [_spec((rows, 128), jnp.bfloat16) for rows in (1024, 4096)]
  first = offline.compile_for(both, *inputs)
  # Neither jax's caches nor Mosaic's may swallow the report.
  assert offline.compile_for(both, *inputs).kernels == first.kernels
  assert {kernel.name for kernel in first.kernels} == {"scale_body_0", "scale_body_1"}
  for kernel in first.kernels:
    assert kernel.spill_stores == kernel.spill_loads == 0
    assert 8 <= kernel.registers <= 255
    # The tile, its barrier, and what alignment adds; the assembler alone reports a byte or so.
    assert _TILE_BYTES < kernel.shared_bytes < _TILE_BYTES + 2048 < offline.SHARED_LIMIT
  assert first.argument_bytes == 5120 * 128 * 2
  assert 0 <= first.output_bytes - first.argument_bytes < 64  # a tuple's pointers
  assert first.temp_bytes <= first.output_bytes


def test_a_program_is_known_by_its_kernels_and_its_own_work():
  x = _spec((1024, 128), jnp.bfloat16)
  programs = {
    "first": lambda x: scale_rows(x) + 1,
    "kernel": lambda x: scale_rows(x, 3) + 1,
    "work": lambda x: scale_rows(x) + 2,
  }
  known = offline.compile_for(programs["first"], x).fingerprint
  # Each is lowered anew, with another number for its kernel.
  found = {
    name: offline.compile_for(program, x, unless=known) for name, program in programs.items()
  }
  assert found.pop("first") is None
  assert len({known, *(own.fingerprint for own in found.values())}) == 3
  other = offline.compile_for(programs["first"], x, options=offline.NO_AUTOTUNING, unless=known)
  assert other.fingerprint != known


def test_last_bits_of_a_table_make_no_other_program():
  """NumPy's cosines and powers differ in them from processor to processor."""
  x = _spec((1024, 128), jnp.float32)
  table = np.linspace(1, 2, 128, dtype=np.float32)
  known = offline.compile_for(lambda x: x + table, x).fingerprint
  elsewhere = np.nextafter(table, np.float32(0))
  assert offline.compile_for(lambda x: x + elsewhere, x, unless=known) is None
  for other in (np.ones(128, np.float32), np.arange(128), np.tile(table, (1024, 1))):
    assert offline.compile_for(lambda x, other=other: x + other, x, unless=known) is not None


def test_kernels_that_xla_lowers_for_several_gpus_count(monkeypatch):
  """By what they were traced to, and by the code that lowers them."""

  def program(factor):
    def scale(x):
      return scale_rows(x.reshape(-1, 128), factor).reshape(x.shape)

    return lambda x: by_sample_and_head(scale, (x,), ("b",), "b")

  x = _spec((8, 64, 128), jnp.bfloat16)
  given = {"devices": 8, "shardings": (P("data"),)}
  known = offline.compile_for(program(2), x, **given)
  assert len(known.kernels) == 1
  assert offline.compile_for(program(2), x, unless=known.fingerprint, **given) is None
  assert offline.compile_for(program(3), x, unless=known.fingerprint, **given) is not None
  monkeypatch.setattr(offline, "_code_of_kernels", lambda: b"changed")
  assert offline.compile_for(program(2), x, unless=known.fingerprint, **given) is not None


def test_eight_gpus_show_their_collective():
  def mean(params, x):
    return jax.grad(lambda p: jnp.mean((x @ p) ** 2))(params)

  args = [_spec((64, 64), jnp.float32), _spec((4096, 64), jnp.float32)]
  eight = offline.compile_for(mean, *args, devices=8, shardings=(P(), P("data")))
  assert "all-reduce" in eight.compiled.as_text()
  assert eight.argument_bytes == 64 * 64 * 4 + 4096 // 8 * 64 * 4


def test_code_sees_the_absent_gpu_and_no_trace_is_left():
  """Settings of the process are afterwards what they were, even after an error."""

  def settings():
    dumps = {k: v for k, v in os.environ.items() if k.startswith("MOSAIC_GPU_DUMP")}
    little = jax.config.read("jax_disable_most_optimizations")
    return dumps, little, jax.config.jax_persistent_cache_min_compile_time_secs, current_target()

  seen = []

  def fails(x):
    seen.append(settings())
    return 1 // 0

  before = settings()
  with pytest.raises(ZeroDivisionError):
    offline.compile_for(fails, jnp.zeros(3))
  assert settings() == before
  # The tests spare XLA's optimisations (tests/conftest.py); a compile for a GPU does not.
  ((dumps, spared, _, target),) = seen
  assert before[1] and not spared
  assert dumps
  assert target == Target("cuda", "NVIDIA H100 80GB HBM3", "9.0")
  assert before[3].platform == "cpu" and before[3].capability is None


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
