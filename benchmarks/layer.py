"""FreqFormer as a layer runs it, between the projections, with and without its attention call."""

from collections.abc import Callable
from unittest import mock

import jax.numpy as jnp

import freqformer.methods.freqformer as freqformer_module
from freqformer.methods.base import Cond, Projected
from freqformer.methods.freqformer import FreqFormer


def freqformer_forward(
  method: FreqFormer, q, k, v, arrays, tables, implementation: str | None = None
):
  """Runs the method on `[b, n_buffer, h, d]`, QK-norm and rotary included.

  Returns:
    output and density.
  """
  joint = jnp.stack([q, k, v], 2)
  out, _, aux = _run(method, projected(joint, arrays, implementation), tables)
  return out, aux["density"]


def _run(method: FreqFormer, qkv: Projected, tables):
  """Runs the method at t = 0 without parameters of its own."""
  batch = qkv.q.shape[0]
  cond = Cond(jnp.zeros(batch), jnp.zeros((batch, 1)))
  return method(None, qkv, cond, tables, {})


def _without_attention(run: Callable):
  """Runs a method with its attention call left out.

  Returns:
    the arguments that attention would have got (q, k, v, mask), so that they are computed, and the
    output.
  """
  taken = []

  def stand_in(q, k, v, mask, **_):
    taken.append((q, k, v, mask))
    return v, None

  with mock.patch.object(freqformer_module, "attention", stand_in):
    out, *_ = run()
  return taken[0], out


def freqformer_without_attention(method: FreqFormer, *args):
  """Runs all of `freqformer_forward` but the attention call: selection, packing, compression, lift.

  Returns:
    as `_without_attention`.
  """
  return _without_attention(lambda: freqformer_forward(method, *args))


def projected(joint, arrays, implementation: str | None = None) -> Projected:
  """Returns what a layer hands to its method: gains 1, bias 0.

  Args:
    joint: the joint projection `[b, n_buffer, 3, h, d]`.
    arrays: of the layout.
    implementation: attention's, or None.
  """
  _, _, _, h, d = joint.shape
  bias = jnp.zeros((3, h, d), joint.dtype)
  gain = jnp.ones(d)
  return Projected.of_joint(joint, bias, (gain, gain), arrays, implementation)


def around_attention(method: FreqFormer, implementation: str | None, joint, arrays, tables):
  """Runs FreqFormer's layer between its projections without the attention call.

  Returns:
    as `_without_attention`.
  """
  return _without_attention(lambda: _run(method, projected(joint, arrays, implementation), tables))


def norm_and_rotary(implementation: str | None, joint, arrays):
  """Returns q and k finished, and v: the part of a layer that every method has."""
  qkv = projected(joint, arrays, implementation)
  return *qkv.rotated(), qkv.v
