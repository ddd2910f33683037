"""Attention under JAX's transformations; `on_a_mesh.py` has them on eight devices.

Queries have four heads and keys two, so that each case is one of grouped heads, too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from freqformer.kernels.block_sparse import xla
from freqformer.kernels.block_sparse.api import attention

from tests.kernels.block_sparse.suite import (
  NAMES,
  Case,
  draw_inputs,
  draw_mask,
  oracle,
  relative_error,
)

H_KV = 2
SIZES = {"b": 4, "h": 4, "h_kv": H_KV, "d": 8, "n_q": 32, "n_kv": 32, "block_q": 8, "block_kv": 8}
CASE = Case("here", **SIZES, table_b=4, table_h=4, kv_len_per_batch=True, bias=True)


@pytest.fixture(scope="module")
def data():
  """q, k, v, the table as arrays of JAX, and random cotangents of out and LSE."""
  q, k, v, d_out, d_lse = map(jnp.float32, draw_inputs(CASE, 0, jnp.float32))
  return q, k, v, jax.tree.map(jnp.asarray, draw_mask(CASE, 0)), d_out, d_lse


@pytest.fixture(scope="module")
def wanted(data):
  return oracle(*data)


def with_gradients(call):
  """Returns the function of q, k, v, mask, d_out, d_lse that gives out, lse, dq, dk, dv."""

  def run(q, k, v, mask, d_out, d_lse):
    found, pull = jax.vjp(lambda *rows: call(*rows, mask), q, k, v)
    return *found, *pull((d_out, d_lse))

  return run


def check(found, wanted):
  for name, got, want in zip(NAMES, found, wanted, strict=True):
    assert relative_error(jax.device_get(got), want) < 3e-6, name


# ---- transformations of attention, and of the function that has its gradients, too ---------------


def over_samples(f):
  """Maps samples: what is left has one."""

  def one(q, k, v, mask, *cotangents):
    rows = [x[None] for x in (q, k, v)]
    mask = dataclasses.replace(
      mask, kv_indices=mask.kv_indices[None], kv_counts=mask.kv_counts[None]
    )
    return tuple(x[0] for x in f(*rows, mask, *(x[None] for x in cotangents)))

  def mapped(q, k, v, mask, *cotangents):
    table = dataclasses.replace(jax.tree.map(lambda _: 0, mask), kv_bias=None)
    return jax.vmap(one, (0, 0, 0, table, *(0 for _ in cotangents)))(q, k, v, mask, *cotangents)

  return mapped


def over_groups(f):
  """Maps heads of keys: what is left has one, and the queries' heads that read it."""

  def split(x, axis):
    return x.reshape(*x.shape[:axis], H_KV, -1, *x.shape[axis + 1 :])

  def joined(x, axis):
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  def mapped(q, k, v, mask, *cotangents):
    axes = [2, 1][: len(cotangents)]
    lists = {"kv_indices": 1, "kv_counts": 1}
    table = dataclasses.replace(jax.tree.map(lambda _: None, mask), **lists)
    mask = dataclasses.replace(mask, **{name: split(getattr(mask, name), 1) for name in lists})
    rows = [split(x, 2) for x in (q, k, v)]
    cotangents = [split(x, axis) for x, axis in zip(cotangents, axes, strict=True)]
    out_axes = (2, 1, 2, 2, 2)[: 5 if axes else 2]
    found = jax.vmap(f, (2, 2, 2, table, *axes), out_axes)(*rows, mask, *cotangents)
    return tuple(joined(x, axis) for x, axis in zip(found, out_axes, strict=True))

  return mapped


def over_tables(f):
  """Maps tables alone, of which the second one is asked for."""

  def mapped(q, k, v, mask, *cotangents):
    other = dataclasses.replace(mask, kv_counts=mask.kv_counts // 2, kv_bias=-mask.kv_bias)
    masks = jax.tree.map(lambda *x: jnp.stack(x), other, mask)
    run = jax.vmap(f, (None, None, None, 0, *(None for _ in cotangents)))
    return tuple(x[1] for x in run(q, k, v, masks, *cotangents))

  return mapped


def scanned(f):
  """Takes samples one after another."""

  def mapped(*operands):
    mask = operands[3]
    every = dataclasses.replace(mask, kv_bias=jnp.stack([mask.kv_bias] * len(mask.kv_len)))
    parts = jax.tree.map(lambda x: x[:, None], (*operands[:3], every, *operands[4:]))

    def step(carry, part):
      own = dataclasses.replace(part[3], kv_bias=part[3].kv_bias[0])
      return carry, f(*part[:3], own, *part[4:])

    _, found = jax.lax.scan(step, None, parts)
    return tuple(x[:, 0] for x in found)

  return mapped


TRANSFORMED = {
  "plain": lambda f: f,
  "samples": over_samples,
  "groups": over_groups,
  "tables": over_tables,
  "samples_of_groups": lambda f: over_samples(over_groups(f)),
  "scan": scanned,
  "remat": jax.checkpoint,
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_gradients_of_the_transformed(name, data, wanted):
  call = TRANSFORMED[name](functools.partial(attention, implementation="reference"))
  check(jax.jit(with_gradients(call))(*data), wanted)


@pytest.mark.parametrize("name", ["samples", "groups", "tables", "scan"])
def test_the_transformed_of_gradients(name, data, wanted):
  """The portable form, whose loops carry all results."""
  call = with_gradients(functools.partial(attention, implementation="xla"))
  check(jax.jit(TRANSFORMED[name](call))(*data), wanted)


def test_without_jit(data, wanted):
  check(with_gradients(functools.partial(attention, implementation="reference"))(*data), wanted)


# ---- derivatives ---------------------------------------------------------------------------------


def _loss(implementation, q, k, v, mask):
  out, lse = attention(q, k, v, mask, implementation=implementation)
  return (out**3).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()


@pytest.mark.parametrize("several", [jax.jvp, lambda f, *x: jax.jit(lambda *x: jax.jvp(f, *x))(*x)])
def test_forward_mode_is_refused_in_our_words(several, data):
  q, k, v, mask, *_ = data
  with pytest.raises(NotImplementedError, match="attention has no .* forward mode.*jax.jacrev"):
    several(lambda q: attention(q, k, v, mask), (q,), (q,))


def test_second_derivatives(data):
  """Those that an implementation has are right, the others are refused in our words."""
  q, k, v, mask, direction, _ = data

  def forward_over_reverse(implementation):
    gradient = jax.grad(functools.partial(_loss, implementation))
    return jax.jvp(lambda q: gradient(q, k, v, mask), (q,), (direction,))[1]

  def reverse_over_reverse(implementation):
    gradient = jax.grad(functools.partial(_loss, implementation))
    return jax.grad(lambda q: (gradient(q, k, v, mask) * direction).sum())(q)

  found = jax.jit(lambda: reverse_over_reverse("reference"))()
  step = 1e-2
  gradient = jax.jit(jax.grad(functools.partial(_loss, "reference")))
  around = [gradient(q + x * step * direction, k, v, mask) for x in (-1, 1)]
  assert relative_error((around[1] - around[0]) / (2 * step), found) < 1e-3
  # The portable form's takes seconds to compile.
  other = jax.jit(lambda: forward_over_reverse("xla"))()
  assert relative_error(other, found) < 1e-5
  with pytest.raises(NotImplementedError, match="no such second derivative.*'xla'.*'reference'"):
    jax.jit(lambda: reverse_over_reverse("xla"))()


def test_implementations_without_second_derivatives_refuse_them(data, monkeypatch):
  """As the Hopper kernels, in the mode that the portable form has, too."""
  monkeypatch.delattr(xla, "SECOND_DERIVATIVES")
  q, k, v, mask, *_ = data
  gradient = jax.grad(functools.partial(_loss, "xla"))
  with pytest.raises(NotImplementedError, match="no such second derivative"):
    jax.jvp(lambda q: gradient(q, k, v, mask), (q,), (q,))
