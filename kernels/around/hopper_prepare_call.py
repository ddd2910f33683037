"""Hopper's implementation of `prepare`: refuses a call, or lays out what the kernel reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.around.prepare import BLOCKS, HEAD_DIMS, MAX_CELLS, Cells, Prepared
from freqformer.kernels.core.target import Target


def unsupported(joint, lengths, cells: Cells | None, target: Target) -> str | None:
  """Returns why the kernel cannot run a call, all reasons at once; None if it can."""
  return refusal(joint, joint.shape[1] // len(lengths), cells, target)


def refusal(x, block: int, tiled, target: Target, most: int = MAX_CELLS) -> str | None:
  """Returns why the kernels around attention cannot take tokens, all reasons at once; or None.

  Args:
    x: `[..., d]`.
    tiled: what compresses or lifts; None: nothing does.
    most: coarse tokens that a tile may have.
  """
  from freqformer.kernels.hopper.machine import wrong_device

  reasons = [reason for reason in [wrong_device(target)] if reason]
  if x.dtype != jnp.bfloat16:
    reasons.append(f"the tokens are {x.dtype}, it takes bfloat16")
  if x.shape[-1] not in HEAD_DIMS:
    reasons.append(f"head_dim is {x.shape[-1]}, it takes one of {HEAD_DIMS}")
  if block not in BLOCKS:
    reasons.append(f"a tile has {block} rows, it takes one of {BLOCKS}")
  cells = 0 if tiled is None else tiled.per_tile
  if cells is None:
    reasons.append("the transform leaves the tile")
  elif cells > most:
    reasons.append(f"a tile has {cells} coarse tokens, it takes at most {most}")
  return "; ".join(reasons) or None


@jax.named_scope("prepare")
def forward(
  joint,
  bias,
  gains,
  tables,
  lengths,
  cells,
  bands,
  ahead,
  inverses,
  *,
  filtered,
  pooled,
  over_heads,
) -> Prepared:
  """Runs the kernel and places rows before the tokens that it did not place itself.

  `inverses`: of a norm over heads, float32 `[b, 2, n]` of tokens and `[b, 2, n_coarse]` of coarse
  ones (None without cells); otherwise None.
  """
  from freqformer.kernels.around import hopper_prepare

  b, n, _, h, d = joint.shape
  tiles = len(lengths)
  front = 0 if ahead is None else ahead[0].shape[1]
  plan = hopper_prepare.Plan(
    b, n, h, d, n // tiles, front, pooled=pooled, filtered=filtered, over_heads=over_heads
  )
  heads = [h] if over_heads else []
  operands = {
    "joint": joint,
    "bias": jnp.asarray(bias, jnp.float32).reshape(3, h, 2, d // 2),
    "cos": tables[0],
    "sin": tables[1],
    "gains": jnp.stack([jnp.asarray(g, jnp.float32) for g in gains]).reshape(2, *heads, 2, d // 2),
  }
  if pooled or cells is not None:
    operands["lengths"] = jnp.asarray(lengths, jnp.int32)
  if cells is not None:
    count = -(-cells.per_tile // 8) * 8
    in_place = cells.rows is None and count == cells.per_tile
    plan = dataclasses.replace(plan, front=cells.front, cells=count, in_place=in_place)
    operands |= _cell_operands(cells, count, plan.pieces, inverses and inverses[1])
  if over_heads:
    operands["inverses"] = inverses[0]
  if filtered:
    operands |= {"filters": _filter_operand(cells.filters), "bands": jnp.asarray(bands, jnp.int32)}
  # The barrier: XLA would fuse the kernel with the update of its own result, and find a cycle.
  found = jax.lax.optimization_barrier(hopper_prepare.forward(plan, operands))
  if cells is not None:
    found |= {name: _place_coarse_rows(found, name, cells, plan) for name in "qkv"}
  if ahead is not None:
    rows = dict(zip("qkv", ahead, strict=True))
    found |= {name: found[name].at[:, :front].set(rows[name]) for name in "qkv"}
  pools = [found[f"{name}_pool"].reshape(b, h, tiles, d) for name in "qk" if pooled]
  return Prepared(found["q"], found["k"], found.get("v"), *pools)


def two_terms(matrices):
  """Returns bf16 `[m, 2, ...]` of float32 `[m, ...]`, rounded and the rest, for tensor cores."""
  # Not a cast there and back, which XLA may drop.
  high = jax.lax.reduce_precision(matrices, exponent_bits=8, mantissa_bits=7)
  return jnp.stack([high, matrices - high], 1).astype(jnp.bfloat16)


def _cell_operands(cells: Cells, count: int, pieces: int, inverses=None) -> dict:
  """Returns matrices as two terms in pieces of 64 x 64, and tables by tile of `count` rows.

  `inverses`: of a norm over heads, `[b, 2, n_coarse]`, or None.
  """
  classes, k, block = cells.matrices.shape
  matrices = jnp.pad(jnp.asarray(cells.matrices, jnp.float32), ((0, 0), (0, MAX_CELLS - k), (0, 0)))
  terms = two_terms(matrices).reshape(classes, 2, MAX_CELLS, pieces, block // pieces)
  tiles = len(cells.classes)

  def by_tile(table):
    # A tile reads 64 rows from its first one on; those behind its own meet zero weights.
    if cells.rows is None and k == count:
      return jnp.pad(table, ((0, MAX_CELLS - count), *((0, 0),) * (table.ndim - 1)))
    rows = np.arange(tiles * k) if cells.rows is None else jnp.asarray(cells.rows)
    spread = jnp.zeros((tiles * count + MAX_CELLS - count, *table.shape[1:]), jnp.float32)
    return spread.at[rows // k * count + rows % k].set(table)

  found = {
    "weights": terms.transpose(0, 1, 3, 2, 4),
    "classes": jnp.asarray(cells.classes),
    "cell_cos": by_tile(cells.cos),
    "cell_sin": by_tile(cells.sin),
  }
  if inverses is not None:
    found["cell_inverses"] = jnp.moveaxis(by_tile(jnp.moveaxis(inverses, -1, 0)), 0, -1)
  return found


def _filter_operand(filters):
  """Returns `[classes, bands, block, block]` as bf16 pieces, two terms each, for the kernel."""
  classes, bands, block, _ = filters.shape
  terms = two_terms(jnp.asarray(filters, jnp.float32).reshape(-1, block, block))
  pieces = block // MAX_CELLS
  terms = terms.reshape(classes, bands, 2, pieces, MAX_CELLS, pieces, MAX_CELLS)
  return terms.transpose(0, 1, 3, 2, 5, 4, 6)


def _place_coarse_rows(found, name, cells, plan):
  """Writes everything before the tokens that the kernel did not write, in place."""
  x = found[name]
  if plan.in_place:
    placed = plan.tiles * plan.cells
    return x if placed == plan.front else x.at[:, placed : plan.front].set(0)
  k = cells.per_tile
  coarse = found[f"{name}_cells"][:, :, :k].reshape(plan.b, plan.tiles * k, plan.h, plan.d)
  if cells.rows is not None:
    coarse = jnp.take(coarse, cells.rows, axis=1, mode="clip", unique_indices=True)
  filler = ((0, 0), (0, plan.front - coarse.shape[1]), (0, 0), (0, 0))
  return x.at[:, : plan.front].set(jnp.pad(coarse, filler))
