"""The one entry point: `attention(q, k, v, mask) -> (out, lse)`, differentiable in q, k, v through both results.

A backend is a module with three functions, and is all that another device needs:

  unsupported(q, k, v, mask, target) -> str | None     why it cannot run this call, as one clause
  forward(q, k, v, mask, scale) -> (out, lse)
  backward(q, k, v, mask, scale, lse, delta, d_out) -> (dq, dk, dv)

Dispatch tries an ordered list, keeps every refusal and raises them together. A named backend is used or refused, never
silently replaced.
"""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse.table import BlockMask, dense_mask
from freqformer.kernels.core.cotangents import no_gradient
from freqformer.kernels.core.dispatch import choose
from freqformer.kernels.core.partition import by_sample_and_head, several_devices, table_dims
from freqformer.kernels.core.target import Target, current_target
from jax.ad_checkpoint import checkpoint_name

# In order of preference; each name is a module of this package.
BACKENDS = {"pallas_mgpu": "hopper", "xla": "xla", "reference": "reference"}
# Saved under these names, out and LSE survive rematerialisation: the forward kernel runs once per step.
CHECKPOINT_NAMES = ("attention_out", "attention_lse")


def backend(name: str):
  """The module of a backend, imported when first used.

  Raises:
    ValueError: for an unknown name.
  """
  if name not in BACKENDS:
    raise ValueError(
      f"implementation={name!r} is unknown; choose one of {', '.join(BACKENDS)} or None for automatic choice."
    )
  return importlib.import_module(f"freqformer.kernels.block_sparse.{BACKENDS[name]}")


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
    mask: the table; None means that every query sees every key (unpadded inputs only). Rows behind `kv_len` are padding:
      whatever finite values they hold, no valid output or gradient depends on them. Outputs of padding *query* rows are
      finite and meaningless; give them no cotangent.
    scale: multiplies q k^T; default `1 / sqrt(d)`.
    implementation: a name of `BACKENDS`, or None for the first that supports the call.

  Returns:
    out `[b, n_q, h, d]` in q's dtype, and the log-sum-exp of each row's scaled scores `[b, h, n_q]`: natural log, float32
    (float64 for float64 inputs), -inf where a row sees nothing. Both are differentiable; gradients come in their input's dtype.

  Raises:
    ValueError: if shapes, dtypes and table contradict each other.
    NotImplementedError: if no backend (or not the named one) supports the call, with every reason.
  """
  mask = _validated(q, k, v, mask).with_mean()
  scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
  name = choose_backend(q, k, v, mask, implementation)
  return _attention(name, scale, q, k, v, mask)


def choose_backend(
  q, k, v, mask: BlockMask, implementation: str | None = None, target: Target | None = None
) -> str:
  """The name of the backend that `attention` would run; raises NotImplementedError with all reasons if there is none."""
  target = current_target() if target is None else target

  def refused(name):
    return backend(name).unsupported(q, k, v, mask, target)

  return choose("attention", BACKENDS, refused, implementation, target)


def _validated(q, k, v, mask: BlockMask | None) -> BlockMask:
  """Checks one call and fills in the dense table; the returned table describes exactly q's and k's rows."""
  if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
    raise ValueError(
      f"attention takes q [b, n_q, h, d] and k, v [b, n_kv, h, d] with equal b, h, d; got {q.shape=}, {k.shape=}, {v.shape=}."
    )
  if not q.dtype == k.dtype == v.dtype or q.dtype not in (
    jnp.float64,
    jnp.float32,
    jnp.bfloat16,
    jnp.float16,
  ):
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
        f"the table has {tiles} {what} tiles of {block} rows, but the input has {rows} {what} rows = "
        f"{-(-rows // block)} tiles; build the table for this buffer."
      )
  b, _, h, _ = q.shape
  lead = (
    mask.kv_counts.shape[0],
    mask.kv_counts.shape[1],
    mask.kv_len.shape[0] if mask.kv_len.ndim == 2 else 1,
  )
  if lead[0] not in (1, b) or lead[1] not in (1, h) or lead[2] not in (1, b):
    raise ValueError(
      f"the table is for (batch, heads, batch of kv_len) = {lead}, input: batch {b}, {h} heads; each must match or be 1."
    )
  return mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(name, scale, q, k, v, mask):
  return _forward(name, scale, q, k, v, mask)


def _forward(name, scale, q, k, v, mask):
  def run(q, k, v, mask):
    return backend(name).forward(q, k, v, mask, scale)

  if not several_devices():
    return run(q, k, v, mask)
  mask = mask.without_order()
  dims = ["b.h."] * 3 + table_dims(mask, q.shape[0], q.shape[2])
  return by_sample_and_head(run, (q, k, v, mask), dims, ("b.h.", "bh."))


def _backward(name, scale, q, k, v, mask, lse, delta, d_out):
  def run(q, k, v, mask, *rest):
    return backend(name).backward(q, k, v, mask, scale, *rest)

  if not several_devices():
    return run(q, k, v, mask, lse, delta, d_out)
  mask = mask.without_order()
  dims = ["b.h."] * 3 + table_dims(mask, q.shape[0], q.shape[2]) + ["bh."] * 2 + ["b.h."]
  return by_sample_and_head(run, (q, k, v, mask, lse, delta, d_out), dims, ("b.h.",) * 3)


def _attention_fwd(name, scale, q, k, v, mask):
  out, lse = _forward(name, scale, q, k, v, mask)
  out, lse = (checkpoint_name(x, n) for x, n in zip((out, lse), CHECKPOINT_NAMES, strict=True))
  return (out, lse), (q, k, v, mask, out, lse)


def _attention_bwd(name, scale, residuals, cotangents):
  """dS = P (dO V^T - delta) with delta = rowsum(dO * O) - dLSE: the second term is what most kernels drop."""
  q, k, v, mask, out, lse = residuals
  d_out, d_lse = cotangents
  alive = lse > -jnp.inf  # a row that sees nothing has no gradient, whatever its cotangents hold
  rows = alive.transpose(0, 2, 1)[..., None]
  d_out = jnp.where(rows, d_out, 0)
  # Not einsum: that would copy both operands, transposed and widened.
  delta = (d_out.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1).transpose(0, 2, 1)
  delta = jnp.where(alive, delta - d_lse, 0)
  grads = _backward(name, scale, q, k, v, mask, lse, delta, d_out)
  return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), jax.tree.map(
    no_gradient, mask
  )


_attention.defvjp(_attention_fwd, _attention_bwd)


def merge(outs, lses) -> tuple[jax.Array, jax.Array]:
  """One softmax over several disjoint key sets, from each set's own normalised output and LSE.

  Args:
    outs: arrays `[b, n, h, d]`.
    lses: arrays `[b, h, n]`, natural log; -inf where that set holds nothing for a row.

  Returns:
    out `[b, n, h, d]` and lse `[b, h, n]`; 0 and -inf where every set is empty. Safe to differentiate there too.
  """
  lse = jnp.stack(lses)
  top = jax.lax.stop_gradient(lse.max(0))
  top = jnp.where(top > -jnp.inf, top, 0)
  there = lse > -jnp.inf
  weights = jnp.where(there, jnp.exp(jnp.where(there, lse - top, 0)), 0)
  total = weights.sum(0)
  some = total > 0
  safe = jnp.where(some, total, 1)
  shares = (weights / safe).transpose(0, 1, 3, 2)[..., None]
  out = sum(o.astype(lse.dtype) * s for o, s in zip(outs, shares, strict=True)).astype(
    outs[0].dtype
  )
  return out, jnp.where(some, jnp.log(safe) + top, -jnp.inf)
