"""The one entry point: `attention(q, k, v, mask) -> (out, lse)`, differentiable in q, k and v.

An implementation is a module with three functions, and is all that another device needs:

  unsupported(q, k, v, mask, target) -> str | None     why it cannot run a call, as one clause
  forward(q, k, v, mask, *, scale) -> (out, lse)
  backward(q, k, v, mask, lse, delta, d_out, *, scale) -> (dq, dk, dv)
"""

import functools
import math

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse.table import BlockMask, dense_mask
from freqformer.kernels.core.cotangents import no_gradient, of_weighted_means
from freqformer.kernels.core.op import Op, Split
from freqformer.kernels.core.partition import several_devices
from jax.ad_checkpoint import checkpoint_name

# Saved under these names, out and LSE survive rematerialisation: the forward runs once per step.
CHECKPOINT_NAMES = ("attention_out", "attention_lse")
_DTYPES = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)


def _table_dims(mask: BlockMask) -> BlockMask:
  """Returns dimensions for `by_sample_and_head`: only `kv_len` and 1-D leaves have no `h`."""
  return jax.tree.map(lambda x: {1: ".", 2: "b."}.get(x.ndim, "bh"), mask)


_INPUTS = ("b.h.", "b.h.", "b.h.", _table_dims)
ATTENTION = Op(
  name="attention",
  implementations={
    "hopper": "block_sparse.hopper",
    "xla": "block_sparse.xla",
    "reference": "block_sparse.reference",
  },
  forward=Split(_INPUTS, ("b.h.", "bh.")),
  backward=Split((*_INPUTS, "bh.", "bh.", "b.h."), "b.h."),
  # XLA would gather for the loops and lists of the portable form, too.
  opaque=("hopper", "xla", "reference"),
)


@jax.named_scope("attention")
def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: BlockMask | None = None,
  *,
  scale: float | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Softmax attention over the key tiles that each query tile lists.

  Args:
    q: `[b, n_q, h, d]`; row r belongs to query tile `r // mask.block_q`. f64, f32, bf16 or f16.
    k, v: `[b, n_kv, h, d]`; row r belongs to key tile `r // mask.block_kv`.
    mask: None: every query sees every key (unpadded inputs only). Rows behind `kv_len` are padding:
      no valid output or gradient depends on the finite values they hold. Outputs of padding
      *query* rows are finite and meaningless; give them no cotangent.
    scale: multiplies q k^T; default `1 / sqrt(d)`.
    implementation: of `ATTENTION.implementations`; None: the first that supports the call.

  Returns:
    out `[b, n_q, h, d]` in q's dtype, and the log-sum-exp of each row's scaled scores
    `[b, h, n_q]`: natural log, float32 (float64 for float64 inputs), -inf where a row sees nothing.
    Both are differentiable; gradients come in their input's dtype.

  Raises:
    ValueError: if shapes, dtypes and table contradict each other.
    NotImplementedError: if no implementation (or not the named one) supports the call, and why.
  """
  mask = _validated(q, k, v, mask).with_mean()
  scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
  name = ATTENTION.choose(q, k, v, mask, implementation=implementation)
  return _attention(name, scale, q, k, v, mask)


def _validated(q, k, v, mask: BlockMask | None) -> BlockMask:
  """Checks one call and fills in the dense table; the result describes exactly q's and k's rows."""
  if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
    raise ValueError(
      "attention takes q [b, n_q, h, d] and k, v [b, n_kv, h, d] with equal b, h, d; got "
      f"{q.shape=}, {k.shape=}, {v.shape=}."
    )
  if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
    raise ValueError(
      f"q, k, v must share one of f64, f32, bf16, f16; got {q.dtype}, {k.dtype}, {v.dtype}."
    )
  if mask is None:
    return dense_mask(q.shape[1], k.shape[1])
  mask.check_shapes()
  for what, rows, tiles, block in (
    ("query", q.shape[1], mask.q_tiles, mask.block_q),
    ("key", k.shape[1], mask.kv_tiles, mask.block_kv),
  ):
    if -(-rows // block) != tiles:
      raise ValueError(
        f"the table has {tiles} {what} tiles of {block} rows, but the input has {rows} {what} "
        f"rows = {-(-rows // block)} tiles; build the table for this buffer."
      )
  b, _, h, _ = q.shape
  lead = (*mask.kv_counts.shape[:2], mask.kv_len.shape[0] if mask.kv_len.ndim == 2 else 1)
  if lead[0] not in (1, b) or lead[1] not in (1, h) or lead[2] not in (1, b):
    raise ValueError(
      f"the table is for (batch, heads, batch of kv_len) = {lead}, input: batch {b}, {h} heads; "
      "each must match or be 1."
    )
  return mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(name, scale, q, k, v, mask):
  return ATTENTION.run(name, (q, k, v, _of_any_head(mask)), scale=scale)


def _of_any_head(mask: BlockMask) -> BlockMask:
  """Returns the table without its stored order of heads, which does not hold for a part of them."""
  return mask.without_order() if several_devices() else mask


def _attention_fwd(name, scale, q, k, v, mask):
  found = ATTENTION.run(name, (q, k, v, _of_any_head(mask)), scale=scale)
  out, lse = (checkpoint_name(x, n) for x, n in zip(found, CHECKPOINT_NAMES, strict=True))
  return (out, lse), (q, k, v, mask, out, lse)


def _attention_bwd(name, scale, residuals, cotangents):
  q, k, v, mask, out, lse = residuals
  d_out, delta = of_weighted_means(out, lse, *cotangents)
  operands = (q, k, v, _of_any_head(mask), lse, delta, d_out)
  dq, dk, dv = ATTENTION.run(name, operands, "backward", scale=scale)
  grads = (dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype))
  return *grads, jax.tree.map(no_gradient, mask)


_attention.defvjp(_attention_fwd, _attention_bwd)
