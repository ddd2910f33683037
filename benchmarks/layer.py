"""A layer between its projections, with its attention calls taken out of it."""

import contextlib
import sys
from unittest import mock

import jax.numpy as jnp
from freqformer.kernels.block_sparse.table import dense_mask

from freqformer.methods.base import Cond, Method, Projected


def projected(joint, arrays, implementation: str | None = None) -> Projected:
  """Returns what a layer hands to its method: gains 1, bias 0.

  Args:
    joint: the joint projection `[b, n_buffer, 3, h, d]`.
    arrays: of the layout.
    implementation: attention's, or None.
  """
  _, _, _, h, d = joint.shape
  gain = jnp.ones(d)
  return Projected.of_joint(
    joint, jnp.zeros((3, h, d), joint.dtype), (gain, gain), arrays, implementation
  )


@contextlib.contextmanager
def taken_out():
  """Replaces both ops in every method's module by stand-ins that record what they are called with.

  Yields:
    the arguments `(q, k, v, mask)` of each attention call, and of each call of linear attention
    `(q, k, v, segments, other arrays by name)`.
  """
  attentions = []
  linears = []

  def attention(q, k, v, mask=None, **_):
    mask = dense_mask(q.shape[1], k.shape[1]) if mask is None else mask
    attentions.append((q, k, v, mask))
    return v[:, : q.shape[1]], jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)

  def linear(q, k, v, segments, *, feature_map, implementation=None, **arrays):
    linears.append((q, k, v, segments, arrays))
    return v, None

  with contextlib.ExitStack() as stack:
    for module in [m for name, m in sys.modules.items() if name.startswith("freqformer.methods.")]:
      for name, stand_in in (("attention", attention), ("linear_attention", linear)):
        if callable(getattr(module, name, None)):
          stack.enter_context(mock.patch.object(module, name, stand_in))
    yield attentions, linears


def around_attention(method: Method, implementation: str | None, joint, arrays, tables):
  """Runs a method without parameters at t = 0, without its one attention call.

  Returns:
    the arguments that attention would have got (q, k, v, mask), so that they are computed, and the
    output.
  """
  batch = joint.shape[0]
  cond = Cond(jnp.zeros(batch), jnp.zeros((batch, 1)))
  with taken_out() as (attentions, _):
    out, *_ = method(None, projected(joint, arrays, implementation), cond, tables, {})
  return attentions[0], out


def norm_and_rotary(implementation: str | None, joint, arrays):
  """Returns q and k finished, and v: the part of a layer that every method has."""
  qkv = projected(joint, arrays, implementation)
  return *qkv.rotated(), qkv.v
