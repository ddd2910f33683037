"""FreqFormer as a layer runs it, between the projections, and what of it is left without attention."""

from unittest import mock

import jax.numpy as jnp

import freqformer.methods.freqformer as freqformer_module
from freqformer.methods.base import Cond, Projected
from freqformer.methods.freqformer import FreqFormer
from freqformer.rotary import rotate


def freqformer_forward(method: FreqFormer, q, k, v, arrays, tables, implementation: str | None = None):
  """The method on `[b, n_buffer, h, d]`: output and density; rotary included, QK-norm not."""
  cond = Cond(jnp.zeros(q.shape[0]), jnp.zeros((q.shape[0], 1)))
  out, _, aux = method(None, Projected(q, k, v, rotate, rotate, arrays, implementation), cond, tables, {})
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
