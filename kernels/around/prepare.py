"""What lies between the joint projection and attention, in one pass: split, QK-norm, rotary, compression, packing, means.

`prepare` is defined by its plain form in JAX below, which also gives its gradients. On Hopper a Mosaic GPU kernel
(`hopper_prepare.py`) reads the projection once and writes q, k and v once; elsewhere `unsupported` says why not.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from freqformer.kernels.core.cotangents import no_gradient
from freqformer.kernels.core.partition import by_sample_and_head, several_devices
from freqformer.kernels.core.target import Target, current_target

HEAD_DIMS = (64, 128)
BLOCKS = (64, 128)
MAX_CELLS = 64  # coarse tokens of a tile: rows of one product
EPS = 1e-6  # of the norm; flax's default


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
  """How each tile is compressed: coarse token j of tile t is row j of `matrices[classes[t]]` times the tile's rows.

  Attributes:
    matrices: float32 `[classes, cells, block]`; columns of padding and rows that a class does not have are zero,
      other rows sum to one.
    classes: int32 `[tiles]`.
    rows: int32 `[n_coarse]`, `tile * cells + j` of each coarse token; None if all tiles are alike and that is its own number.
    cos, sin: float32 `[n_coarse, d / 2]`, rotary at the cells' centres.
    front: static; rows of the results before the tokens, at least n_coarse. What follows the coarse tokens is zero.
    filters: float32 `[classes, bands, block, block]`, projections of a tile's rows; constants and padding become zero. Or None.
  """

  matrices: jax.Array
  classes: jax.Array
  rows: jax.Array | None
  cos: jax.Array
  sin: jax.Array
  front: int = dataclasses.field(metadata={"static": True})
  filters: jax.Array | None = None


class Prepared(NamedTuple):
  """q, k, v, `[b, front + n, h, d]`: coarse tokens, then tokens; means of q and k over each tile's valid rows, or None.

  The means are float32 `[b, h, tiles, d]`, of the tokens as they were rounded; no gradient flows through them.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  q_pool: jax.Array | None = None
  k_pool: jax.Array | None = None


def turn(x, cos, sin):
  """Rotary (RoPE, arXiv 2104.09864): turns channels (i, i + d / 2) of `x` `[..., n, h, d]` by angles of `[n, d / 2]` tables."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  first, second = jnp.split(x.astype(dtype), 2, axis=-1)
  cos, sin = cos[:, None], sin[:, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(
    x.dtype
  )


def prepare(
  joint,
  bias,
  gains,
  tables,
  lengths,
  cells: Cells | None = None,
  bands=None,
  *,
  filtered="",
  pooled=False,
  implementation=None,
) -> Prepared:
  """Adds the projection's bias to q, k and v, norms (RMS, `EPS`) and rotates q and k, packs.

  Args:
    joint: `[b, n, 3, h, d]`, the projection's product, in tiles of equally many rows; padding rows hold anything finite.
    bias: `[3, h, d]`, of the projection.
    gains: of the norms of q and k, `[d]` each.
    tables: cos and sin of every row's angles, float32 `[n, d / 2]`.
    lengths: int32 `[tiles]`, valid rows of each tile; they come first.
    cells: compression; None: tokens only, `front` is 0, and v is left to XLA.
    bands: int32 `[b, h]`, 1 plus the filter (of `cells.filters`) that a head's tokens go through before the norm, 0 for none.
    filtered: what goes through it: "", "v" or "qkv". Coarse tokens and means are of what is not filtered.
    pooled: whether the means of q and k are asked for.
    implementation: "pallas_mgpu" or "plain"; None: the kernel where it is supported.

  Raises:
    ValueError: if something is filtered without filters or bands.
    NotImplementedError: if the kernel was named and does not support the call, with the reasons.
  """
  if filtered not in ("", "v", "qkv") or (
    filtered and (bands is None or cells is None or cells.filters is None)
  ):
    raise ValueError(
      f'{filtered=} must be "", "v" or "qkv"; the latter two need bands and cells with filters.'
    )
  reason = None if implementation == "plain" else unsupported(joint, len(lengths), cells)
  if implementation == "pallas_mgpu" and reason:
    raise NotImplementedError(f"prepare: {reason}")
  operands = (joint, bias, tuple(gains), tuple(tables), lengths, cells, bands if filtered else None)
  form = (pooled, filtered)
  found = (
    _plain(form, *operands) if implementation == "plain" or reason else _fused(form, *operands)
  )
  return (
    found._replace(v=_biased(joint[:, :, 2], bias[2]).astype(joint.dtype))
    if cells is None
    else found
  )


def unsupported(
  joint, tiles: int, cells: Cells | None = None, target: Target | None = None
) -> str | None:
  """Why the kernel cannot run this call, all reasons at once; None if it can."""
  return refusal(
    joint, joint.shape[1] // tiles, 0 if cells is None else cells.matrices.shape[1], target
  )


def refusal(
  x, block: int, cells: int, target: Target | None = None, most: int = MAX_CELLS
) -> str | None:
  """What the kernels around attention do not take of `x` `[..., d]` in tiles of `block` rows with `cells` coarse tokens."""
  from freqformer.kernels.hopper.machine import wrong_device

  target = current_target() if target is None else target
  reasons = [reason for reason in [wrong_device(target)] if reason]
  if x.dtype != jnp.bfloat16:
    reasons.append(f"the tokens are {x.dtype}, it takes bfloat16")
  if x.shape[-1] not in HEAD_DIMS:
    reasons.append(f"head_dim is {x.shape[-1]}, it takes one of {HEAD_DIMS}")
  if block not in BLOCKS:
    reasons.append(f"a tile has {block} rows, it takes one of {BLOCKS}")
  if cells > most:
    reasons.append(f"a tile has {cells} coarse tokens, it takes at most {most}")
  return "; ".join(reasons) or None


@functools.cache
def log_choice(what: str, reason: str | None) -> None:
  """Says once who does the work."""
  logging.info("%s runs %s", what, f"in plain JAX ({reason})" if reason else "on its Hopper kernel")


# ---- plain form --------------------------------------------------------------------------------------------------------


@jax.named_scope("prepare")
def _plain(form, joint, bias, gains, tables, lengths, cells, bands) -> Prepared:
  """The definition: everything in float32 (or wider), rounded once. Without cells there is no v."""
  arrays = jnp.unstack(
    joint, axis=2
  )  # not three slices, whose gradients would be three arrays of the projection's size
  found = [
    _one(form, *x, tables, lengths, cells, bands)
    for x in zip("qkv", arrays, bias, (*gains, None), strict=True)
  ]
  packed, means = zip(*found, strict=True)
  return Prepared(*packed, *(means[:2] if form[0] else ()))


def _one(form, name, x, bias, gain, tables, lengths, cells, bands):
  """Packed, and the means of its tokens."""
  (pooled, filtered), finish = form, functools.partial(_finish, gain)
  if name == "v" and cells is None:
    return None, None
  tokens = finish(_biased(x, bias), *tables).astype(x.dtype)
  means = _means(tokens, lengths) if pooled and name in "qk" else None
  if name in filtered:
    wide = jnp.where((bands > 0)[:, None, :, None], _filtered(x, cells, bands), _biased(x, bias))
    tokens = finish(wide, *tables).astype(x.dtype)
  return tokens if cells is None else _with_cells(finish, tokens, x, bias, cells), means


def _biased(x, bias):
  """In at least float32."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return x.astype(wide) + bias.astype(wide)


def _finish(gain, x, cos, sin):
  """Norm and rotary; v has no gain and is left alone."""
  if gain is None:
    return x
  inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS)
  return turn(x * (inverse * gain.astype(x.dtype)), cos, sin)


def _with_cells(finish, tokens, x, bias, cells):
  """Coarse tokens and zeros before the tokens."""
  coarse = _by_tile(cells.matrices, x, cells)
  coarse = coarse if cells.rows is None else coarse[:, cells.rows]
  # The bias is a constant, and the matrices' rows leave constants alone.
  coarse = finish(_biased(coarse, bias), cells.cos, cells.sin).astype(x.dtype)
  filler = jnp.zeros((x.shape[0], cells.front - coarse.shape[1], *x.shape[2:]), x.dtype)
  return jnp.concatenate([coarse, filler, tokens], 1)


def _filtered(x, cells, bands):
  """Each head in its band; constants vanish, so there is no bias."""
  each = [_by_tile(cells.filters[:, i], x, cells) for i in range(cells.filters.shape[1])]
  return jnp.select([(bands == i + 1)[:, None, :, None] for i in range(len(each))], each)


def _by_tile(matrices, x, cells):
  """Each tile's matrix, of its class, times its rows, in at least float32. HIGHEST, for TF32 would not leave a constant one."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  x = jax.lax.optimization_barrier(x)  # widened inside the product, not once for all readers
  tiles = x.reshape(x.shape[0], len(cells.classes), -1, *x.shape[2:]).astype(dtype)
  alike = matrices.shape[0] == 1
  matrices = matrices[0] if alike else jnp.asarray(matrices)[cells.classes]
  product = "kr,btrhd->btkhd" if alike else "tkr,btrhd->btkhd"
  y = jnp.einsum(product, matrices.astype(dtype), tiles, precision=jax.lax.Precision.HIGHEST)
  return y.reshape(x.shape[0], -1, *x.shape[2:])


def _means(x, lengths):
  b, n, h, d = x.shape
  lengths = jnp.asarray(lengths)
  x = jax.lax.stop_gradient(x).reshape(b, len(lengths), -1, h, d)
  valid = (jnp.arange(x.shape[2]) < lengths[:, None])[..., None, None]
  means = (
    jnp.where(valid, x, 0).astype(jnp.promote_types(x.dtype, jnp.float32)).sum(2)
    / lengths[:, None, None]
  )
  return means.transpose(0, 2, 1, 3)


# ---- kernel ------------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(form, joint, bias, gains, tables, lengths, cells, bands):
  if not several_devices():
    return _run(form, joint, bias, gains, tables, lengths, cells, bands)
  operands = (joint, bias, gains, tables, lengths, cells, bands)
  dims = [
    "b..h.",
    ".h.",
    *("." * jnp.ndim(leaf) for leaf in jax.tree.leaves(operands[2:-1])),
    *(["bh"] if bands is not None else []),
  ]
  result = Prepared("b.h.", "b.h.", "b.h." if cells is not None else None, *("bh..",) * 2 * form[0])
  return by_sample_and_head(functools.partial(_run, form), operands, dims, result)


def _fused_fwd(form, *operands):
  return _fused(form, *operands), operands


def _fused_bwd(form, operands, cotangents):
  """Of the plain form, one array after the other: together, their float32 intermediates would be alive at once."""
  joint, bias, gains, *rest = operands
  grads, before = [], None
  for name, *x, cotangent in zip(
    "qkv", jnp.unstack(joint, axis=2), bias, (*gains, None), cotangents[:3], strict=True
  ):
    if cotangent is None:  # v without cells
      grads.append(jax.tree.map(jnp.zeros_like, x))
      continue
    if before is not None:
      before, cotangent = jax.lax.optimization_barrier((before, cotangent))
      grads[-1] = before
    _, pull = jax.vjp(lambda *x, name=name: _one((False, form[1]), name, *x, *rest)[0], *x)
    before = pull(cotangent)
    grads.append(before)
  d_joint, d_bias, d_gains = zip(*grads, strict=True)
  return (
    jnp.stack(d_joint, 2),
    jnp.stack(d_bias),
    d_gains[:2],
    *jax.tree.map(no_gradient, tuple(rest)),
  )


_fused.defvjp(_fused_fwd, _fused_bwd)


@jax.named_scope("prepare")
def _run(form, joint, bias, gains, tables, lengths, cells, bands) -> Prepared:
  """Calls the kernel; lays coarse rows that it could not place itself."""
  # Pallas is imported where it is used
  from freqformer.kernels.around import hopper_prepare as hopper_prepare

  b, n, _, h, d = joint.shape
  tiles, (pooled, filtered) = len(lengths), form
  plan = hopper_prepare.Plan(b, n, h, d, n // tiles, pooled=pooled)
  operands = {
    "joint": joint,
    "cos": tables[0],
    "sin": tables[1],
    "lengths": jnp.asarray(lengths, jnp.int32),
  }
  operands["bias"] = jnp.asarray(bias, jnp.float32).reshape(3, h, 2, d // 2)
  operands["gains"] = jnp.stack([jnp.asarray(g, jnp.float32) for g in gains]).reshape(2, 2, d // 2)
  if cells is not None:
    count = -(-cells.matrices.shape[1] // 8) * 8
    in_place = cells.rows is None and count == cells.matrices.shape[1]
    plan = dataclasses.replace(plan, front=cells.front, cells=count, in_place=in_place)
    operands |= _cell_operands(cells, count, plan.pieces)
  if bands is not None:
    plan = dataclasses.replace(plan, filtered=filtered)
    operands |= {"filters": _filter_operand(cells.filters), "bands": jnp.asarray(bands, jnp.int32)}
  # The barrier: XLA would fuse the kernel with the update of its own result, and then find a cycle.
  found = jax.lax.optimization_barrier(hopper_prepare.forward(plan, operands))
  if cells is not None:
    found |= {x: _lay_cells(found, x, cells, plan) for x in "qkv"}
  pools = [found[f"{x}_pool"].reshape(b, h, tiles, d) for x in "qk" if pooled]
  return Prepared(found["q"], found["k"], found.get("v"), *pools)


def _cell_operands(cells, count, pieces) -> dict:
  """Matrices as two 16-bit terms in pieces of 64 x 64, tables by tile."""
  classes, k, block = cells.matrices.shape
  matrices = jnp.pad(jnp.asarray(cells.matrices, jnp.float32), ((0, 0), (0, MAX_CELLS - k), (0, 0)))
  terms = two_terms(matrices)
  weights = terms.reshape(classes, 2, MAX_CELLS, pieces, block // pieces).transpose(0, 1, 3, 2, 4)
  tiles = len(cells.classes)
  rows = np.arange(tiles * k) if cells.rows is None else jnp.asarray(cells.rows)
  rows = rows // k * count + rows % k

  # A tile reads 64 rows from its first one; what lies behind its own meets zero weights.
  def spread(x):
    return jnp.zeros((tiles * count + MAX_CELLS - count, x.shape[-1]), jnp.float32).at[rows].set(x)

  if cells.rows is None and k == count:

    def spread(x):
      return jnp.pad(x, ((0, MAX_CELLS - count), (0, 0)))

  return {
    "weights": weights,
    "classes": jnp.asarray(cells.classes),
    "cell_cos": spread(cells.cos),
    "cell_sin": spread(cells.sin),
  }


def _filter_operand(filters):
  """`[classes, bands, block, block]` as `[classes, bands, pieces of rows, 2 terms, pieces of columns, 64, 64]`."""
  classes, bands, block, _ = filters.shape
  terms = two_terms(jnp.asarray(filters, jnp.float32).reshape(-1, block, block))
  pieces = block // MAX_CELLS
  terms = terms.reshape(classes, bands, 2, pieces, MAX_CELLS, pieces, MAX_CELLS)
  return terms.transpose(0, 1, 3, 2, 5, 4, 6)


def two_terms(matrices):
  """float32 `[m, ...] -> [m, 2, ...]` bf16: the matrix rounded, and what that left out. Tensor cores take 16 bits."""
  # Not a cast there and back, which XLA may drop.
  high = jax.lax.reduce_precision(matrices, exponent_bits=8, mantissa_bits=7)
  return jnp.stack([high, matrices - high], 1).astype(jnp.bfloat16)


def _lay_cells(found, name, cells, plan):
  """Everything before the tokens that the kernel did not write, in place."""
  x = found[name]
  if plan.in_place:
    placed = plan.tiles * plan.cells
    return x if placed == plan.front else x.at[:, placed : plan.front].set(0)
  k = cells.matrices.shape[1]
  coarse = found[f"{name}_cells"][:, :, :k].reshape(plan.b, plan.tiles * k, plan.h, plan.d)
  coarse = (
    coarse
    if cells.rows is None
    else jnp.take(coarse, cells.rows, axis=1, mode="clip", unique_indices=True)
  )
  filler = ((0, 0), (0, plan.front - coarse.shape[1]), (0, 0), (0, 0))
  return x.at[:, : plan.front].set(jnp.pad(coarse, filler))
