"""Attention under JAX's transformations, on one device; test_eight_devices.py has them on eight.

Queries have four heads and keys two, so that each case is one of grouped heads, too.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from freqformer.kernels.block_sparse import xla
from freqformer.kernels.block_sparse.api import attention
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.block_sparse.suite import (
  NAMES,
  Case,
  draw_inputs,
  draw_mask,
  oracle,
  relative_error,
)

DEVICES = 8
SEVERAL = jax.device_count() == DEVICES
H_KV = 2
SIZES = {"b": 4, "h": 4, "h_kv": H_KV, "d": 8, "n_q": 32, "n_kv": 32, "block_q": 8, "block_kv": 8}
CASE = Case("here", **SIZES, table_b=4, table_h=4, kv_len_per_batch=True, bias=True)
ROWS, ROW_SUMS = P("data", None, "heads"), P("data", "heads")
RESULTS = (ROWS, ROW_SUMS, ROWS, ROWS, ROWS)


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


def shard_mapped(f, mesh, axes=("data", "heads")):
  """Gives each device its own samples and heads; `check_vma` as by default."""

  def own(spec):
    return P(*(axis if axis in axes else None for axis in spec))

  def mapped(q, k, v, mask, *cotangents):
    specs = {4: P("data", "heads"), 3: P("data", "heads"), 2: P("data"), 1: P()}
    table = jax.tree.map(lambda x: own(specs[x.ndim]), mask)
    operands = (*[own(ROWS)] * 3, table, *[own(ROWS), own(ROW_SUMS)][: len(cotangents)])
    results = tuple(own(spec) for spec in RESULTS[: 5 if cotangents else 2])
    run = jax.shard_map(f, mesh=mesh, in_specs=operands, out_specs=results, axis_names=set(axes))
    return run(q, k, v, mask, *cotangents)

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


# ---- on a mesh -----------------------------------------------------------------------------------


def on_mesh(kind: AxisType, data, axes=("data", "heads")):
  """Returns a mesh (of one device if there is one) and the data on it, sharded along `axes`."""
  sizes = (4, 2) if SEVERAL else (1, 1)
  mesh = jax.make_mesh(sizes, ("data", "heads"), axis_types=(kind, kind))

  def place(x, spec):
    spec = P(*(axis if axis in axes else None for axis in spec))
    return jax.device_put(x, NamedSharding(mesh, spec))

  def place_table(x):
    return place(x, {1: P(), 2: P("data")}.get(x.ndim, P("data", "heads")))

  q, k, v, mask, d_out, d_lse = data
  rows = (place(x, ROWS) for x in (q, k, v))
  return mesh, (*rows, jax.tree.map(place_table, mask), place(d_out, ROWS), place(d_lse, ROW_SUMS))


@pytest.mark.parametrize("mesh_is_set", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["plain", "samples", "samples_of_groups", "remat"])
def test_on_a_mesh(name, kind, mesh_is_set, data, wanted):
  """Samples and heads stay where they are, mapped ones too: q, k and v are gathered nowhere."""
  mesh, placed = on_mesh(kind, data, ("data",) if "groups" in name else ("data", "heads"))
  call = TRANSFORMED[name](functools.partial(attention, implementation="reference"))
  run = jax.jit(with_gradients(call))
  with jax.set_mesh(mesh) if mesh_is_set else contextlib.nullcontext():
    compiled = run.lower(*placed).compile()
    found = compiled(*placed)
  check(found, wanted)
  text = compiled.as_text()
  assert "all-gather" not in text and "all-to-all" not in text
  for got, like in zip((found[0], *found[2:]), (placed[0], *placed[:3]), strict=True):
    assert got.sharding.is_equivalent_to(like.sharding, 4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_portable_form_on_a_mesh(kind, data, wanted):
  _, placed = on_mesh(kind, data)
  run = with_gradients(functools.partial(attention, implementation="xla"))
  check(jax.jit(run)(*placed), wanted)


def test_keys_that_every_device_has_under_an_explicit_mesh(data):
  """One head of keys serves heads on two devices: its gradient comes back whole. Without jit."""
  data = (data[0], *(x[:, :, :1] for x in data[1:3]), *data[3:])
  wanted = oracle(*data)
  mesh, (q, _, _, *rest) = on_mesh(AxisType.Explicit, data[:1] + (data[0],) * 2 + data[3:])
  k, v = (jax.device_put(x, NamedSharding(mesh, P())) for x in data[1:3])
  found = with_gradients(functools.partial(attention, implementation="reference"))(q, k, v, *rest)
  check(found, wanted)
  assert jax.typeof(found[3]).sharding.spec == P(None, None, None, None)


@pytest.mark.parametrize(
  ("spec", "words"),
  [(P(None, "data", "heads"), "neither of samples nor of heads"), (P("heads"), "others split by")],
)
def test_explicit_shardings_that_would_be_gathered_are_refused(spec, words, data):
  mesh, (q, k, *rest) = on_mesh(AxisType.Explicit, data)
  k = jax.device_put(k, NamedSharding(mesh, spec))
  with pytest.raises(ValueError, match=f"{words}.*use jax.reshard"):
    jax.jit(functools.partial(attention, implementation="reference"))(q, k, *rest[:2])


# ---- inside shard_map, with `check_vma` as by default --------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axes", [("data", "heads"), ("data",)])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_inside_shard_map(implementation, axes, kind, data, wanted):
  """Over both axes of the mesh, and over one, with the other as it was."""
  mesh, placed = on_mesh(kind, data)
  run = with_gradients(functools.partial(attention, implementation=implementation))
  check(jax.jit(shard_mapped(run, mesh, axes))(*placed), wanted)


@pytest.mark.parametrize("name", ["samples", "scan", "remat"])
def test_transformed_inside_shard_map(name, data, wanted):
  mesh, placed = on_mesh(AxisType.Auto, data)
  call = TRANSFORMED[name](functools.partial(attention, implementation="xla"))
  check(jax.jit(with_gradients(shard_mapped(call, mesh, ("data",))))(*placed), wanted)


def test_gradients_of_what_devices_share_are_summed(data):
  """One head of keys, a bias and lengths that do not vary over the heads' axis of the mesh."""
  data = (data[0], *(x[:, :, :1] for x in data[1:3]), *data[3:])
  mesh, _ = on_mesh(AxisType.Auto, data[:1] + (data[0],) * 2 + data[3:])
  table = jax.tree.map(lambda x: P("data", "heads") if x.ndim > 2 else P(), data[3])
  table = dataclasses.replace(table, kv_len=P("data"))
  shared = P("data")
  run = jax.shard_map(
    with_gradients(functools.partial(attention, implementation="xla")),
    mesh=mesh,
    in_specs=(ROWS, shared, shared, table, ROWS, ROW_SUMS),
    out_specs=(ROWS, ROW_SUMS, ROWS, shared, shared),
  )
  check(jax.jit(run)(*data), oracle(*data))


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
  other = jax.jit(lambda: forward_over_reverse("reference" if SEVERAL else "xla"))()
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
