"""Attention's packed output brought back to the tokens: `weights * (tokens + U coarse)` in one pass.

`lift` is defined by its plain form in JAX below, which also gives its gradients; on Hopper a Mosaic GPU kernel (`hopper_lift.py`)
reads the tokens once and writes them once, and multiplies for the heads that have coarse rows only.
"""

import dataclasses

import jax
import jax.numpy as jnp
from freqformer.kernels.around.prepare import MAX_CELLS, refusal, two_terms
from freqformer.kernels.core.cotangents import no_gradient
from freqformer.kernels.core.partition import by_sample_and_head, several_devices
from freqformer.kernels.core.target import Target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Expansion:
  """How each tile is lifted: its rows get `matrices[classes[t]]` times the coarse tokens from `starts[t]` on.

  Attributes:
    matrices: float32 `[classes, block, cells]`; rows of padding and columns that a class does not have are zero.
    classes, starts: int32 `[tiles]`.
    front: static; rows before the tokens in the packed buffer.
  """

  matrices: jax.Array
  classes: jax.Array
  starts: jax.Array
  front: int = dataclasses.field(metadata={"static": True})

  @property
  def block(self) -> int:
    return self.matrices.shape[1]

  @property
  def aligned(self) -> bool:
    """Whether every tile's coarse tokens begin at a multiple of 8, seen from the shapes."""
    return self.matrices.shape[0] == 1 and self.matrices.shape[2] % 8 == 0


def lift(packed, weights, low, expansion: Expansion, implementation=None):
  """Sum of both resolutions.

  Args:
    packed: `[b, front + n, h, d]`, coarse tokens first; finite everywhere.
    weights: `[b, h]`, multiplies the sum.
    low: bool `[b, h]`, heads whose coarse rows count; those of others are not read.
    implementation: "pallas_mgpu" or "plain"; None: the kernel where it is supported.

  Returns:
    `[b, n, h, d]` in packed's dtype. Differentiable in packed and weights.

  Raises:
    NotImplementedError: if the kernel was named and does not support the call, with the reasons.
  """
  reason = None if implementation == "plain" else unsupported(packed, expansion)
  if implementation == "pallas_mgpu" and reason:
    raise NotImplementedError(f"lift: {reason}")
  if implementation == "plain" or reason:
    return _plain(packed, weights, low, expansion)
  return _fused(packed, weights, low, expansion)


def unsupported(packed, expansion: Expansion, target: Target | None = None) -> str | None:
  """Why the kernel cannot run this call, all reasons at once; None if it can."""
  most = (
    MAX_CELLS if expansion.aligned else MAX_CELLS - 7
  )  # it reads 64 rows from a multiple of 8 on
  return refusal(packed, expansion.block, expansion.matrices.shape[2], target, most)


@jax.named_scope("lift")
def _plain(packed, weights, low, expansion):
  """The definition, in float32 (or wider), rounded once."""
  dtype = jnp.promote_types(packed.dtype, jnp.float32)
  classes, _, k = expansion.matrices.shape
  matrices, starts = jnp.asarray(expansion.matrices, dtype), jnp.asarray(expansion.starts)
  if classes == 1:  # no gather, whose gradient would be a scatter
    coarse = packed[:, : k * len(starts)]
  else:
    coarse = packed[
      :, (starts[:, None] + jnp.arange(k)).reshape(-1)
    ]  # behind a tile's own cells the matrix is zero
  coarse = (
    jnp.where(low[:, None, :, None], coarse, 0)
    .astype(dtype)
    .reshape(packed.shape[0], -1, k, *packed.shape[2:])
  )
  matrices, product = (
    (matrices[0], "rk,btkhd->btrhd")
    if classes == 1
    else (matrices[expansion.classes], "trk,btkhd->btrhd")
  )
  lifted = jnp.einsum(product, matrices, coarse, precision=jax.lax.Precision.HIGHEST)
  tokens = packed[:, expansion.front :]
  out = (tokens.astype(dtype) + lifted.reshape(tokens.shape)) * weights[:, None, :, None].astype(
    dtype
  )
  return out.astype(packed.dtype)


@jax.custom_vjp
def _fused(packed, weights, low, expansion):
  if not several_devices():
    return _run(packed, weights, low, expansion)
  dims = ["b.h.", "bh", "bh", *("." * jnp.ndim(leaf) for leaf in jax.tree.leaves(expansion))]
  return by_sample_and_head(_run, (packed, weights, low, expansion), dims, "b.h.")


def _fused_fwd(*operands):
  return _fused(*operands), operands


def _fused_bwd(operands, cotangent):
  packed, weights, low, expansion = operands
  _, pull = jax.vjp(
    lambda packed, weights: _plain(packed, weights, low, expansion), packed, weights
  )
  return *pull(cotangent), *jax.tree.map(no_gradient, (low, expansion))


_fused.defvjp(_fused_fwd, _fused_bwd)


@jax.named_scope("lift")
def _run(packed, weights, low, expansion):
  # Pallas is imported where it is used
  from freqformer.kernels.around import hopper_lift as hopper_lift

  (classes, block, k), starts = expansion.matrices.shape, jnp.asarray(expansion.starts, jnp.int32)
  shifts = 1 if expansion.aligned else 8
  # Copies begin at multiples of 8 rows; where a tile's first coarse token lies behind one, its matrix moves to the right.
  padded = [((0, 0), (0, 0), (shift, MAX_CELLS - shift - k)) for shift in range(shifts)]
  matrices = jnp.stack(
    [jnp.pad(jnp.asarray(expansion.matrices, jnp.float32), pad) for pad in padded], 1
  )
  terms = two_terms(matrices.reshape(-1, block, MAX_CELLS))
  plan = hopper_lift.Plan(*packed.shape, block, expansion.front)
  kinds = jnp.asarray(expansion.classes) * shifts + starts % shifts
  terms = terms.reshape(classes * shifts, 2, plan.pieces, hopper_lift.ROWS, MAX_CELLS)
  return hopper_lift.forward(
    plan, packed, terms, kinds, starts // 8, low.astype(jnp.int32), weights.astype(jnp.float32)
  )
