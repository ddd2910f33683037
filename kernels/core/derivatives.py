"""Refusals of derivatives in words of our own; JAX's name a part of the op and no remedy.

A refusal is an identity on values. On tangents it is a primitive that raises when JAX does what the
op cannot do: evaluates them (forward mode) or transposes them (reverse mode).
"""

import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_guard = Primitive("derivative_guard")


def no_forward_mode(x: jax.Array, why: str) -> jax.Array:
  """Returns `x`; a derivative in forward mode raises NotImplementedError with `why`."""
  return _guarded("forward", why, x)


def no_reverse_mode(x: jax.Array, why: str) -> jax.Array:
  """Returns `x`; a gradient raises NotImplementedError with `why`, forward mode goes through."""
  return _guarded("reverse", why, x)


def no_derivative(x: jax.Array, why: str) -> jax.Array:
  """Returns `x`; any derivative raises NotImplementedError with `why`."""
  return _guarded("any", why, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _guarded(refused: str, why: str, x):
  del refused, why
  return x


@_guarded.defjvp
def _guarded_jvp(refused, why, primals, tangents):
  if refused == "any":
    raise NotImplementedError(why)
  return primals[0], _guard.bind(tangents[0], refused=refused, why=why)


def _evaluate(x, *, refused, why):
  if refused == "forward":
    raise NotImplementedError(why)
  return x


def _transpose(cotangent, x, *, refused, why):
  del x
  if refused == "reverse":
    raise NotImplementedError(why)
  return [cotangent]


def _batch(args, dims, **params):
  return _guard.bind(args[0], **params), dims[0]


_guard.def_impl(_evaluate)
_guard.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_guard, mlir.lower_fun(_evaluate, multiple_results=False))
ad.deflinear2(_guard, _transpose)
batching.primitive_batchers[_guard] = _batch
