"""FreqFormer as a layer runs it, between the projections, and what of it is left without attention."""

from unittest import mock

import jax.numpy as jnp

import freqformer.methods.freqformer as freqformer_module
from freqformer.methods.base import Cond, Projected
from freqformer.methods.freqformer import FreqFormer


def freqformer_forward(
  method: FreqFormer, q, k, v, arrays, tables, implementation: str | None = None
):
  """The method on `[b, n_buffer, h, d]`: output and density; QK-norm and rotary included."""
  cond = Cond(jnp.zeros(q.shape[0]), jnp.zeros((q.shape[0], 1)))
  joint = jnp.stack([q, k, v], 2)
  out, _, aux = method(None, projected(joint, arrays, implementation), cond, tables, {})
  return out, aux["density"]


def freqformer_without_attention(method: FreqFormer, *args):
  """All of `freqformer_forward` but the attention call: what is left is selection, packing, compression and lift.

  Returns:
    the arguments that attention would have got (q, k, v, mask), so that they are computed, and the output.
  """
  taken = []

  def stand_in(q, k, v, mask, **_):
    taken.append((q, k, v, mask))
    return v, None

  with mock.patch.object(freqformer_module, "attention", stand_in):
    out, _ = freqformer_forward(method, *args)
  return taken[0], out


def projected(joint, arrays, implementation: str | None = None) -> Projected:
  """What a layer hands to its method from the joint projection `[b, n_buffer, 3, h, d]`: gains 1, bias 0."""
  _, _, _, h, d = joint.shape
  bias, gain = jnp.zeros((3, h, d), joint.dtype), jnp.ones(d)
  return Projected.of_joint(joint, bias, (gain, gain), arrays, implementation)


def around_attention(method: FreqFormer, implementation, joint, arrays, tables):
  """FreqFormer's layer between its projections without the attention call: what attention would get, and the output."""
  taken = []

  def stand_in(q, k, v, mask, **_):
    taken.append((q, k, v, mask))
    return v, None

  cond = Cond(jnp.zeros(joint.shape[0]), jnp.zeros((joint.shape[0], 1)))
  with mock.patch.object(freqformer_module, "attention", stand_in):
    out, *_ = method(None, projected(joint, arrays, implementation), cond, tables, {})
  return taken[0], out


def norm_and_rotary(implementation, joint, arrays):
  """What every method does with the joint projection: q and k finished, v split off."""
  qkv = projected(joint, arrays, implementation)
  return *qkv.rotated(), qkv.v
