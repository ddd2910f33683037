"""FreqFormer as a layer runs it, between the projections, and what of it is left without attention."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
from freqformer.kernels.around.prepare import EPS, prepare, unsupported

import freqformer.methods.freqformer as freqformer_module
from freqformer.grid.rotary import angle_tables, rotate
from freqformer.methods.base import Cond, Projected
from freqformer.methods.freqformer import FreqFormer


def freqformer_forward(
  method: FreqFormer, q, k, v, arrays, tables, implementation: str | None = None
):
  """The method on `[b, n_buffer, h, d]`: output and density; rotary included, QK-norm not."""
  cond = Cond(jnp.zeros(q.shape[0]), jnp.zeros((q.shape[0], 1)))
  out, _, aux = method(
    None, Projected(q, k, v, rotate, rotate, arrays, implementation), cond, tables, {}
  )
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
  """What a layer hands to its method from the joint projection `[b, n_buffer, 3, h, d]`: gains 1, bias 0.

  As in the layer, a kernel norms, rotates and packs where the device has one.
  """
  _, _, _, h, d = joint.shape

  def norm(x):
    return (
      x * jax.lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True) + EPS)
    ).astype(x.dtype)

  finish, fused = (lambda x, positions: rotate(norm(x), positions)), None
  if implementation in (None, "pallas_mgpu") and not unsupported(joint, arrays.layout.tiles):
    learned = (
      jnp.zeros((3, h, d), joint.dtype),
      (jnp.ones(d), jnp.ones(d)),
      angle_tables(arrays.positions, d),
    )
    fused = functools.partial(prepare, joint, *learned, arrays.kv_len)
  return Projected(*jnp.unstack(joint, axis=2), finish, finish, arrays, implementation, fused)


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
