"""Competitors of block-sparse attention: dense attention in plain JAX."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from freqformer.kernels.block_sparse.api import attention

from benchmarks import timing


def sparse(q, k, v, mask):
  """The block-sparse call under test, `[b, n, h, d]`."""
  return attention(q, k, v, mask)[0]


def dense_loop(q, k, v, chunk: int, late: bool = False, remat: bool = False):
  """Dense attention over chunks of queries, all heads at once, to keep the score matrix small.

  Args:
    q: `[b, n, h, d]`, n divisible by `chunk`.
    k: `[b, n, h, d]`.
    v: `[b, n, h, d]`.
    chunk: query rows per step.
    late: divide by the softmax's sum after the second matmul, not before.
    remat: recompute each chunk's scores in the backward pass instead of keeping them.
  """
  b, n, h, d = q.shape
  keys = k.transpose(0, 2, 1, 3)
  values = v.transpose(0, 2, 1, 3)

  def rows_of(queries):
    scores = jnp.einsum("bhid,bhjd->bhij", queries, keys)
    if not late:
      return jnp.einsum("bhij,bhjd->bhid", jax.nn.softmax(scores, axis=-1), values)
    p = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return jnp.einsum("bhij,bhjd->bhid", p, values) / p.sum(-1, keepdims=True)

  queries = (q / math.sqrt(d)).reshape(b, -1, chunk, h, d).transpose(1, 0, 3, 2, 4)
  out = jax.lax.map(jax.checkpoint(rows_of) if remat else rows_of, queries)
  return out.transpose(1, 0, 3, 2, 4).reshape(b, n, h, d)


def gradients(f: Callable) -> Callable:
  """Makes forward and backward of `f(q, k, v, *rest)`: `(d_out, q, k, v, *rest)` -> out, grads."""

  def run(d_out, q, k, v, *rest):
    out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, *rest), q, k, v)
    return out, vjp(d_out.astype(out.dtype))

  return run


def call(f: Callable, *args) -> Callable:
  """Compiles `f`; its arguments are passed at every call, so that none becomes a constant."""
  return functools.partial(jax.jit(f), *args)


@dataclasses.dataclass(frozen=True)
class DenseForm:
  """One form of `dense_loop`, with its arguments."""

  chunk: int
  late: bool

  def __str__(self):
    return f"chunk {self.chunk}, {'late division' if self.late else 'jax.nn.softmax'}"


def by_speed(
  forms: Iterable[DenseForm], args, wrap=lambda f: f, remat: bool = False
) -> list[tuple[DenseForm, Callable]]:
  """Returns the forms, the fastest first, each compiled: competitors are chosen before the race.

  Args:
    args: of the compiled calls.
    wrap: makes `f(*args)` of `f(q, k, v)`.
    remat: as of `dense_loop`.
  """
  calls = {}
  for form in forms:
    loop = functools.partial(dense_loop, chunk=form.chunk, late=form.late, remat=remat)
    calls[form] = call(wrap(loop), *args)
  times = timing.interleave(calls, rounds=1, slice_s=0)
  return sorted(calls.items(), key=lambda found: times[found[0]].median)
