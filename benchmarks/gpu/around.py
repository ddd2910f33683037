"""The kernels around attention on the GPU, against their plain forms in float32 from the same 16-bit inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.around.lift import lift
from freqformer.kernels.around.prepare import prepare

from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.rotary import angle_tables
from freqformer.grid.tile_matrices import tile_cells

TOLERANCE = 4e-3  # one rounding to bfloat16 is 1.7e-3 at most


@dataclasses.dataclass(frozen=True)
class Case:
  """One layer's sizes; `filtered` as in `kernels.around.prepare`, every head with a band in turn."""

  name: str
  grid: tuple[int, int, int]
  block: int = 128
  d: int = 128
  h: int = 12
  b: int = 1
  filtered: str = ""


CASES = (
  Case("around: tiles alike", (16, 32, 32)),
  Case("around: ragged", (21, 30, 52), b=2),
  Case("around: ragged, 64 rows, d 64, v filtered", (9, 20, 33), 64, 64, filtered="v"),
  Case("around: q, k, v filtered", (16, 32, 32), filtered="qkv"),
)


def _error(got, want) -> float:
  """Root of the mean square, relative."""
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  return float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))


def tiny(case: Case) -> Case:
  return dataclasses.replace(case, grid=(4, 8, 9), h=3)


def check(case: Case, implementation: str) -> dict:
  """Worst error of packed q, k, v and means, and of lifted tokens; the device decides who runs, not `implementation`."""
  del implementation
  layout, draw = TileLayout.fit(case.grid, case.block), np.random.default_rng(0)
  arrays, spectral = (
    layout.arrays(),
    SpectralBasis("block_dct", (0.5,) * 3, (0.75,) * 3).fit(layout),
  )
  front = -(-spectral.n_coarse // case.block) * case.block
  tables = tile_cells(spectral, front, bool(case.filtered))

  def normal(*shape):
    return jnp.asarray(draw.standard_normal(shape), jnp.float32)

  joint = normal(case.b, layout.n_buffer, 3, case.h, case.d).astype(jnp.bfloat16)
  learned = normal(3, case.h, case.d), (1 + 0.1 * normal(case.d), 1 + 0.1 * normal(case.d))
  bands = jnp.arange(case.b * case.h).reshape(case.b, case.h) % 3
  rotary = angle_tables(arrays.positions, case.d)
  cells = tables.cells(spectral.centres, case.d)

  def packed(joint):
    return prepare(
      joint, *learned, rotary, arrays.kv_len, cells, bands, filtered=case.filtered, pooled=True
    )

  def lifted(x):
    return lift(x, 1 + 0.1 * bands, bands == 0, tables.expansion)

  found, right = jax.jit(packed)(joint), jax.jit(packed)(joint.astype(jnp.float32))
  rows = np.concatenate([np.ones(front, bool), arrays.valid])
  errors = {
    name: _error(f[:, rows], r[:, rows])
    for name, f, r in zip("qkv", found[:3], right[:3], strict=True)
  }
  errors["means"] = max(_error(f, r) for f, r in zip(found[3:], right[3:], strict=True))
  out, expected = jax.jit(lifted)(found.v), jax.jit(lifted)(found.v.astype(jnp.float32))
  errors["lift"] = _error(out[:, arrays.valid], expected[:, arrays.valid])
  return {f"error_{name}": value for name, value in errors.items()} | {
    "correct": max(errors.values()) <= TOLERANCE
  }
