"""Counts against brute force, XLA's own and the field's published arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse import table as block_mask
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.cost import CONCURRENT, REFERENCE_SOFTMAX, count, uniform
from freqformer.kernels.block_sparse.table import dense_mask, from_tiles

from freqformer.cost import BlockShape, Cost, attention_cost, training_flops, utilisation
from freqformer.grid.layout import TileLayout
from freqformer.methods.registry import METHODS, method_class
from freqformer.tables.window import sliding_tile

LAYOUT = TileLayout.fit((6, 12, 10), 24)


def random_mask(seed, block_q=8, block_kv=4, b=2, h=3, q_tiles=7, kv_tiles=9):
  rng = np.random.default_rng(seed)
  tiles = rng.random((b, h, q_tiles, kv_tiles)) < rng.random()
  tiles[:, :, 2] = False  # an empty row
  lengths = rng.integers(0, block_kv + 1, kv_tiles).astype(np.int32)
  return from_tiles(tiles, lengths, block_q, block_kv), tiles


@pytest.mark.parametrize("seed", range(2))
def test_random_tables_equal_brute_force(seed):
  mask, tiles = random_mask(seed)
  cost = count(mask, 16, batch=2, heads=3, concurrent=3)
  assert cost.pairs == np.asarray(mask.to_dense()).sum()
  assert cost.loads == tiles.sum() and cost.computed_pairs == tiles.sum() * 32
  assert cost.items == tiles.any(-1).sum() and cost.rows == tiles[..., 0].size
  assert cost.distinct == tiles.any(2).sum() and cost.longest == tiles.sum(-1).max()
  waves = sum(tiles[:, :, i : i + 3].any(2).sum() for i in range(0, 7, 3))
  assert cost.wave_loads == waves
  assert cost.flops == 4 * cost.pairs * 16 and cost.backward_flops() == 2.5 * cost.flops


def test_tables_are_counted_alike_in_groups_of_rows_and_as_prefixes_of_one_list(monkeypatch):
  mask, _ = random_mask(0)
  whole = count(mask, 16, batch=2, heads=3)
  monkeypatch.setattr(block_mask, "_COUNTED", 1)
  assert count(mask, 16, batch=2, heads=3) == whole
  rng = np.random.default_rng(0)
  shape = mask.kv_counts.shape
  one = np.sort(rng.permutation(mask.kv_tiles)[:4]).astype(np.int32)
  ids = np.broadcast_to(one, (*shape, 4))
  counts = rng.integers(0, 5, shape).astype(np.int32)
  prefixes = dataclasses.replace(mask, kv_indices=ids, kv_counts=counts)
  copied = dataclasses.replace(prefixes, kv_indices=ids.copy())
  assert block_mask.one_list(prefixes.kv_indices)
  assert not block_mask.one_list(copied.kv_indices)
  found = [count(table, 16, batch=2, heads=3, concurrent=3) for table in (prefixes, copied)]
  assert found[0] == found[1]


def test_a_shared_table_counts_for_every_head_and_sample():
  mask, _ = random_mask(0, b=1, h=1)
  one = count(mask, 8)
  many = count(mask, 8, batch=3, heads=5)
  assert many.pairs == 15 * one.pairs and many.kv_bytes() == 15 * one.kv_bytes()
  assert many.longest == one.longest
  with pytest.raises(ValueError, match="heads=3"):
    count(random_mask(0)[0], 8, batch=2, heads=4)


@pytest.mark.parametrize("n", [1, 100, 240])
def test_dense_closed_form_is_the_dense_table(n):
  mask = dense_mask(n, n, 24, 24)
  table = count(mask, 32)
  closed = uniform(mask.q_tiles, mask.q_tiles, mask.q_tiles, 32, block=24)
  for name in ("computed_pairs", "rows", "items", "loads", "distinct", "wave_loads", "longest"):
    assert getattr(closed, name) == getattr(table, name), name
  if n % 24 == 0:
    assert closed.pairs == table.pairs == n * n


def test_windows_union_is_less_than_random_lists_would_need():
  layout = TileLayout.fit((32, 64, 64), 128)
  table = count(sliding_tile(layout, (3, 3, 3)), 128)
  closed = uniform(layout.tiles, 27, layout.tiles, 128)
  assert table.pairs == closed.pairs and table.loads == closed.loads
  assert table.distinct == layout.tiles and table.wave_loads < 0.5 * closed.wave_loads
  assert table.min_bytes() <= table.expected_bytes() <= table.l2_bytes()
  assert table.expected_bytes(cache=1e12) == table.min_bytes()
  assert layout.tiles / CONCURRENT > 2  # or the test above compares nothing


def test_costs_of_one_launch_add_up():
  a = uniform(10, 4, 10, 64)
  b = uniform(10, 7, 10, 64, heads=2)
  assert (a + b).pairs == a.pairs + b.pairs and (a + b).longest == 7
  with pytest.raises(ValueError, match="equal"):
    a + uniform(10, 4, 10, 32)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_lists_of_every_method_hold_its_pairs(name):
  """Counts of lists agree with each other, in a usual step and in the first one."""
  method = method_class(name)()
  for phase in (None, method.phase(0, 50)):
    call = method.pairs(LAYOUT, 12, phase=phase)
    assert call.head_dim == 1 and 0 < call.pairs <= 12 * LAYOUT.n**2 * (1 + 1e-9)
    assert call.pairs <= call.computed_pairs * (1 + 1e-9)  # shares of lists round
    assert call.items <= call.rows and call.distinct <= call.loads


@pytest.mark.parametrize("d", [16, 128])
def test_xla_counts_the_dense_reference_the_same(d):
  n = 512
  heads = 4
  x = jax.ShapeDtypeStruct((1, n, heads, d), jnp.float32)
  run = jax.jit(lambda q, k, v: attention(q, k, v, implementation="reference")[0])
  counted = run.lower(x, x, x).compile().cost_analysis()["flops"]
  pairs = heads * n * n
  ours = attention_cost(pairs, d).attention_flops
  # The softmax is no work of ours, but XLA counts it: the same number per pair whatever d is.
  assert counted == pytest.approx(ours + REFERENCE_SOFTMAX * pairs, rel=2e-3)
  if d >= 128:
    assert counted == pytest.approx(ours, rel=0.02)


def test_xla_counts_a_block_s_matmuls_the_same():
  shape = BlockShape(128, 4, 512, modulation=0)
  n = 256

  def run(x, w):
    for name, *_ in shape.matmuls(n):
      x = x @ w[name]
      x = x[:, :128] if name == "qkv" else x
    return x

  weights = {name: jax.ShapeDtypeStruct((k, c), jnp.float32) for name, _, k, c in shape.matmuls(n)}
  lowered = jax.jit(run).lower(jax.ShapeDtypeStruct((n, 128), jnp.float32), weights)
  assert lowered.cost_analysis()["flops"] == pytest.approx(shape.linear_flops(n), rel=0.02)


# ---- published arithmetic ------------------------------------------------------------------------


def test_hunyuan_dense_attention():
  shape = BlockShape(3072, 24, 12288, text=256, text_mode="joint")
  layer = attention_cost(24 * 115_200**2, 128).attention_flops + shape.text_attention_flops(115_200)
  assert layer == pytest.approx(163.8e12, rel=0.01)
  assert layer == pytest.approx(4.0 * 115_456**2 * 3072)
  assert 60 * 50 * layer == pytest.approx(491e15, rel=0.01)


def test_sta_window():
  layout = TileLayout((30, 48, 80), (6, 8, 8), 384)
  call = method_class("sliding_tile")().pairs(layout, 24)
  assert call.pairs / (24 * layout.n**2) == pytest.approx(0.09, rel=1e-6)
  flops = attention_cost(call.pairs, 128).attention_flops
  assert flops == pytest.approx(14.76e12, rel=0.01)
  assert flops / 25.38e-3 == pytest.approx(582e12, rel=0.01)
  assert call.block_q == 128


def test_backward_and_utilisation():
  cost = Cost(attention_flops=2.0, linear_flops=10.0)
  assert training_flops(cost) == 3 * 10 + 3.5 * 2
  assert utilisation(5e14, 1.0, 1e15) == 0.5
  assert cost.scaled(2) + cost == cost.scaled(3)
