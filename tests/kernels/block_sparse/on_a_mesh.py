"""Attention on a mesh and inside `shard_map`; `test_eight_devices.py` runs it on eight devices."""

import contextlib
import dataclasses
import functools

import jax
import pytest
from freqformer.kernels.block_sparse.api import attention
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.block_sparse import test_transformed
from tests.kernels.block_sparse.suite import oracle
from tests.kernels.block_sparse.test_transformed import TRANSFORMED, check, with_gradients

ROWS, ROW_SUMS = P("data", None, "heads"), P("data", "heads")
RESULTS = (ROWS, ROW_SUMS, ROWS, ROWS, ROWS)
data, wanted = test_transformed.data, test_transformed.wanted


def on_mesh(kind: AxisType, data, axes=("data", "heads")):
  """Returns a mesh of 4 x 2 devices and the data on it, sharded along `axes`."""
  mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(kind, kind))

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
