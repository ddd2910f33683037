"""The one entry point: `attention(q, k, v, mask) -> (out, lse)`, differentiable in q, k and v.

An implementation is a module with three functions, and is all that another device needs:

  unsupported(q, k, v, mask, target) -> str | None     why it cannot run a call, as one clause
  forward(q, k, v, mask, *, scale) -> (out, lse)
  backward(q, k, v, mask, lse, delta, d_out, *, scale) -> (dq, dk, dv)

It gets k and v with q's heads, unless it says `GROUPED_HEADS = True`. `SECOND_DERIVATIVES` are the
modes in which JAX may differentiate it, "forward" and "reverse"; by default none.
"""

import functools
import math

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse.table import BlockMask, dense_mask
from freqformer.kernels.core.cotangents import no_gradient, of_weighted_means
from freqformer.kernels.core.derivatives import no_derivative, no_forward_mode, no_reverse_mode
from freqformer.kernels.core.op import Op, Split
from freqformer.kernels.core.partition import several_devices
from freqformer.kernels.core.varying import vary_over, varying_axes
from jax.ad_checkpoint import checkpoint_name

# Saved under these names, out and LSE survive rematerialisation: the forward runs once per step.
CHECKPOINT_NAMES = ("attention_out", "attention_lse")
_FORWARD_MODE = (
  "attention has no derivative in forward mode (jax.jvp, jax.jacfwd, a call of what jax.linearize "
  "returns); use jax.grad, jax.vjp or jax.jacrev, or for a second derivative jax.jvp of jax.grad"
)
_SECOND_DERIVATIVE = (
  "attention has no such second derivative in implementation '{}'; 'xla' has jax.jvp of jax.grad, "
  "and 'reference', for small inputs, any"
)
_OTHER_ORDER = "Arrays in the order [b, h, n, d] need x.swapaxes(1, 2)."
_DTYPES = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)


def _table_dims(mask: BlockMask) -> BlockMask:
  """Returns dimensions for `by_sample_and_head`: only `kv_len` and 1-D leaves have no `h`."""
  return jax.tree.map(lambda x: {1: ".", 2: "b."}.get(x.ndim, "bh"), mask)


_INPUTS = ("b.h.", "b.h.", "b.h.", _table_dims)
ATTENTION = Op(
  name="attention",
  implementations={
    "hopper": "block_sparse.hopper",
    "triton": "block_sparse.triton",
    "xla": "block_sparse.xla",
    "reference": "block_sparse.reference",
  },
  forward=Split(_INPUTS, ("b.h.", "bh.")),
  backward=Split((*_INPUTS, "bh.", "bh.", "b.h."), "b.h."),
  slow_on_gpu="many times slower than a kernel for it would be (docs/kernels.md)",
  # XLA would gather for the loops and lists of the portable form, too.
  opaque=("hopper", "triton", "xla", "reference"),
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
    k, v: `[b, n_kv, h_kv, d]`; row r belongs to key tile `r // mask.block_kv`. Query head i reads
      head `i // (h // h_kv)`; h_kv must divide h.
    mask: None: every query sees every key (unpadded inputs only). Rows behind `kv_len` are padding:
      no valid output or gradient depends on the finite values they hold. Outputs of padding
      *query* rows are finite and meaningless; give them no cotangent. The values of a concrete
      table are checked when it is first used, those of a traced one never: `BlockMask.check`.
    scale: multiplies q k^T, a number; default `1 / sqrt(d)`.
    implementation: of `ATTENTION.implementations`; None: the first that supports the call.

  Returns:
    out `[b, n_q, h, d]` in q's dtype, and the log-sum-exp of each row's scaled scores
    `[b, h, n_q]`: natural log, float32 (float64 for float64 inputs), -inf where a row sees nothing.
    Both are differentiable; gradients come in their input's dtype.

  Raises:
    TypeError: if the mask is no `BlockMask` or the scale no number.
    ValueError: if shapes, dtypes and table contradict each other.
    NotImplementedError: if no implementation (or not the named one) supports the call, and why.
  """
  mask = _validated(q, k, v, mask).with_mean()
  scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else _number(scale)
  name = ATTENTION.choose(q, k, v, mask, implementation=implementation)
  # Inside `shard_map`, so that the gradient of what several devices share is summed over them.
  rows = vary_over(varying_axes((q, k, v, mask)), (q, k, v))
  return _attention(name, scale, *(no_forward_mode(x, _FORWARD_MODE) for x in rows), mask)


def _number(scale) -> float:
  try:
    return float(scale)
  except TypeError:  # of arrays that are traced or no scalars
    raise TypeError(
      f"scale must be a number, because kernels are compiled for it; got {scale}. Multiply q by a "
      "traced or learned scale, or by one per head, and give scale=1.0."
    ) from None


def _validated(q, k, v, mask: BlockMask | None) -> BlockMask:
  """Checks one call and fills in the dense table; the result describes exactly q's and k's rows."""
  if mask is not None and not isinstance(mask, BlockMask):
    kind = getattr(mask, "dtype", type(mask).__name__)
    raise TypeError(
      f"mask must be a BlockMask or None, got {kind} {getattr(mask, 'shape', '')}. A boolean NumPy "
      "array of tiles [q_tiles, kv_tiles] becomes one by kernels.block_sparse.table.from_tiles; "
      "masks of single tokens, as for causal attention, are not supported: see "
      "jax.nn.dot_product_attention."
    )
  if (
    q.ndim != 4
    or k.shape != v.shape
    or k.ndim != 4
    or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3])
    or k.shape[2] == 0
    or q.shape[2] % k.shape[2]
  ):
    raise ValueError(
      "attention takes q [b, n_q, h, d] and k, v [b, n_kv, h_kv, d] with equal b and d, where h_kv "
      f"divides h; got {q.shape=}, {k.shape=}, {v.shape=}. {_OTHER_ORDER}"
    )
  if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
    raise ValueError(
      f"q, k, v must share one of f64, f32, bf16, f16; got {q.dtype}, {k.dtype}, {v.dtype}."
    )
  if mask is None:
    return dense_mask(q.shape[1], k.shape[1])
  mask.check_if_concrete()
  _check_rows(q, k, mask)
  b, _, h, _ = q.shape
  lead = (*mask.kv_counts.shape[:2], mask.kv_len.shape[0] if mask.kv_len.ndim == 2 else 1)
  if lead[0] not in (1, b) or lead[1] not in (1, h) or lead[2] not in (1, b):
    raise ValueError(
      f"the table is for (batch, heads, batch of kv_len) = {lead}, input: batch {b}, {h} heads; "
      "each must match or be 1."
    )
  return mask


def _check_rows(q, k, mask: BlockMask) -> None:
  """Refuses a table of another number of rows than q and k have."""
  sides = (("query", q, mask.q_tiles, mask.block_q), ("key", k, mask.kv_tiles, mask.block_kv))
  swapped = all(-(-x.shape[2] // block) == tiles for _, x, tiles, block in sides)
  for what, x, tiles, block in sides:
    rows = x.shape[1]
    if -(-rows // block) != tiles:
      raise ValueError(
        f"the table has {tiles} {what} tiles of {block} rows, but the input has {rows} {what} "
        f"rows = {-(-rows // block)} tiles; build the table for this buffer."
        + (f" {_OTHER_ORDER}" if swapped else "")
      )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(name, scale, q, k, v, mask):
  return _run(name, (q, k, v, mask), scale=scale)


def _run(name: str, operands: tuple, direction: str = "forward", **settings):
  """Runs an implementation on arrays that it takes, and says which derivatives its results lack."""
  q, k, v, mask, *others = operands
  module = ATTENTION.module(name)
  modes = getattr(module, "SECOND_DERIVATIVES", ())
  why = _SECOND_DERIVATIVE.format(name)
  if ATTENTION.is_split(name, operands) or not getattr(module, "GROUPED_HEADS", False):
    k, v = (_repeated(x, q.shape[2]) for x in (k, v))
  rows = (q, k, v, *others)
  if "forward" not in modes:
    rows = [no_derivative(x, why) for x in rows]
  q, k, v, *others = rows
  found = ATTENTION.run(name, (q, k, v, _of_any_head(mask), *others), direction, **settings)
  if "reverse" not in modes:
    found = tuple(no_reverse_mode(x, why) for x in found)
  return found


def _repeated(x, h: int):
  """Returns k or v with q's heads. Where a group's heads are on several devices, each needs it."""
  b, n, h_kv, d = x.shape
  if h_kv == h:
    return x
  # Not by jnp.repeat, which asks for its result's sharding under an Explicit mesh.
  return jnp.broadcast_to(x[:, :, :, None], (b, n, h_kv, h // h_kv, d)).reshape(b, n, h, d)


def _of_any_head(mask: BlockMask) -> BlockMask:
  """Returns the table without its stored order of heads, which does not hold for a part of them."""
  return mask.without_order() if several_devices() else mask


def _attention_fwd(name, scale, q, k, v, mask):
  found = _run(name, (q, k, v, mask), scale=scale)
  out, lse = (checkpoint_name(x, n) for x, n in zip(found, CHECKPOINT_NAMES, strict=True))
  return (out, lse), (q, k, v, mask, out, lse)


def _attention_bwd(name, scale, residuals, cotangents):
  q, k, v, mask, out, lse = residuals
  d_out, delta = of_weighted_means(out, lse, *cotangents)
  found = _run(name, (q, k, v, mask, lse, delta, d_out), "backward", scale=scale)
  grads = (_gradient_of(x, dx) for x, dx in zip((q, k, v), found, strict=True))
  return *grads, jax.tree.map(no_gradient, mask)


def _gradient_of(x, dx):
  """Returns a gradient in the dtype and sharding of its array, summed over heads that read one."""
  kind = jax.typeof(x)
  if kind.sharding.mesh.explicit_axes:
    dx = jax.reshard(dx, kind.sharding)
  if dx.shape != x.shape:
    b, n, h, d = x.shape
    dx = dx.reshape(b, n, h, -1, d).sum(3)
  return dx.astype(x.dtype)


_attention.defvjp(_attention_fwd, _attention_bwd)
