"""Matrix products of one warpgroup (wgmma), and arrays in the register layout of their results."""

import jax.numpy as jnp
import numpy as np
from freqformer.kernels.hopper.interpret import is_interpreted
from freqformer.kernels.hopper.machine import ROWS
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LAYOUT = plgpu.Layout.WGMMA
# Layouts of one number per row and of one per column of such an array.
PER_ROW = LAYOUT.reduce(1)
PER_COLUMN = LAYOUT.reduce(0)
_SWIZZLE_BYTES = 128  # the widest swizzle of shared memory


# ---- arrays --------------------------------------------------------------------------------------


def tiles_type(*shape: int, dtype, lanes: int | None = None):
  """Returns shared memory for `[..., rows, d]` in the swizzled form of TMA and wgmma.

  Args:
    lanes: columns that are swizzled together, and at whose multiples the array can be cut. None
      takes as many as the widest swizzle holds.
  """
  itemsize = np.dtype(dtype).itemsize
  lanes = lanes or min(_SWIZZLE_BYTES, shape[-1] * itemsize) // itemsize
  transforms = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(lanes * itemsize))
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def rows_full(value):
  """Returns float32 `[ROWS]`, `value` for each row of the warpgroup."""
  return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), PER_ROW)


def zeros(columns: int):
  """Returns a float32 accumulator `[ROWS, columns]`."""
  return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), LAYOUT)


def over_columns(x, columns: int):
  """Broadcasts one number per row: `[ROWS] -> [ROWS, columns]`."""
  return lax.broadcast_in_dim(x, (ROWS, columns), [0])


def over_rows(x):
  """Broadcasts one number per column: `[columns] -> [ROWS, columns]`."""
  return lax.broadcast_in_dim(x, (ROWS, x.shape[0]), [1])


def columns_iota(columns: int):
  """Returns int32 `[ROWS, columns]`, the column of each element."""
  return plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 1, layout=LAYOUT)


# ---- products ------------------------------------------------------------------------------------


def _nothing():
  """Does nothing while the tensor cores work."""


def product(a, b, issued=_nothing):
  """Returns `a b^T` of a `[ROWS, d]`, b `[columns, d]` in shared memory; float32 `[ROWS, columns]`.

  `issued` runs while the tensor cores do.
  """

  def run(acc):
    plgpu.wgmma(acc, a, b.transpose((1, 0)))
    issued()
    return acc[...]

  return pl.run_scoped(run, plgpu.ACC((ROWS, b.shape[0]), jnp.float32))


def two_products(a, b, c, d):
  """Returns `a b^T` and `c d^T`, issued together; operands as in `product`.

  The first is waited for alone, but ptxas moves that wait to the second's: what runs during them is
  the other warpgroup.
  """

  def run(first, second):
    plgpu.wgmma(first, a, b.transpose((1, 0)))
    plgpu.wgmma(second, c, d.transpose((1, 0)))
    return plgpu.wgmma_accumulator_load(first, wait_n=1), second[...]

  shape = (ROWS, b.shape[0])
  return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))


def accumulate(acc, a, b, staging=None, issued=_nothing):
  """Returns `acc + a b`; `issued` runs while the tensor cores do.

  Args:
    acc: float32 `[ROWS, d]`.
    a: `[ROWS, k]` in registers.
    b: `[k, d]` in shared memory.
    staging: see `staging_types`.
  """
  if staging is None:

    def run(ref):
      plgpu.wgmma(ref, a, b)
      issued()

    return pl.run_state(run)(plgpu.ACC.init(acc))
  staging[...] = a

  def run_staged(ref):
    plgpu.wgmma(ref, staging, b)
    issued()
    return ref[...]

  return acc + pl.run_scoped(run_staged, plgpu.ACC(acc.shape, jnp.float32))


def accumulate_beside(acc, a, b, c, d, staging=None, issued=_nothing):
  """Returns `acc + a b` (`accumulate`) and `c d^T` (`product`), in flight beside `issued`."""

  def run(second):
    plgpu.wgmma(second, c, d.transpose((1, 0)))
    total = accumulate(acc, a, b, staging, issued)
    return total, second[...]

  return pl.run_scoped(run, plgpu.ACC((ROWS, d.shape[0]), jnp.float32))


def staging_types(consumers: int, columns: int, dtype) -> list:
  """Returns scratch `[consumers, ROWS, columns]` for `accumulate` in the interpreter; [] on a GPU.

  Interpreted, wgmma takes its left operand from shared memory only, and not inside `run_state`.
  """
  return [tiles_type(consumers, ROWS, columns, dtype=dtype)] if is_interpreted() else []
