"""Counting bytes in a compiled program: against programs whose traffic is known."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.compiled.layer_traffic import parts_of
from freqformer.analysis.hlo_bytes import operations, size
from tools.offline import compile_for

N = 1 << 20


def _operations(fn, *shapes):
  specs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  return operations(compile_for(fn, *specs).compiled.as_text())


def _bytes(fn, *shapes):
  return sum(op.bytes for op in _operations(fn, *shapes))


def test_sizes():
  assert size("(f32[2,3]{1,0}, bf16[4]{0}, pred[])") == 24 + 8 + 1


def test_a_pass_reads_and_writes_what_it_takes():
  assert _bytes(lambda x, y: jnp.tanh(x) * y + 1, (N,), (N,)) == 3 * 4 * N
  assert _bytes(lambda x: jnp.tanh(x + 1)[: N // 4], (N,)) == 2 * N
  # One column of three, as v of a joint projection.
  assert _bytes(lambda x: 2 * (x + 1).reshape(-1, 3, 128)[:, 2], (3 * N // 128, 128)) == 2 * 4 * N


def test_loops_count_as_often_as_they_run():
  def roll(x):
    return jnp.roll(jnp.sin(x), 1)

  def rolls(n, x):
    return jax.lax.fori_loop(0, n, lambda i, x: roll(x), x)

  eight, more = (_bytes(functools.partial(rolls, n), (N,)) for n in (8, 16))
  assert more - eight >= 8 * _bytes(roll, (N,))

  def until(x):
    return jax.lax.while_loop(lambda x: x.sum() < 0, jnp.sin, x)

  text = compile_for(until, jax.ShapeDtypeStruct((N,), jnp.float32)).compiled.as_text()
  one, two, seven = (
    sum(op.bytes for op in operations(text, unknown_trips=trips)) for trips in (1, 2, 7)
  )
  assert seven - two == 5 * (two - one) >= 5 * 2 * 4 * N


def test_scopes_reach_the_operations():
  lift = jax.named_scope("lift")(jnp.tanh)
  (op,) = _operations(lambda x: lift(x) + 1, (N,))
  assert parts_of(op.scopes) == "lift" and not op.kernel
  assert parts_of(["jit(f)/pack/norm_rotary/mul", "jit(f)/pack/concatenate"]) == "norm_rotary+pack"
  assert parts_of(["jit(f)/dot_general"]) == ""
