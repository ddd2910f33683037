"""Allocations of heads, counts without tables, and the router's penalty."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from freqformer.kernels.block_sparse.cost import count

from freqformer.config import ConfigError
from freqformer.cost import branch_costs, layer_cost
from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.sizes import coarse_tokens, most_cells
from freqformer.methods.allocation import deal_heads
from freqformer.methods.base import Cond
from freqformer.methods.parts.router import RouterConfig, penalty
from freqformer.methods.radial import count_radial, radial
from freqformer.methods.registry import method_class
from freqformer.methods.spatial_temporal import count_pairs, spatial_temporal
from freqformer.model.attention import AttentionDims, SpectralAttention
from freqformer.simulation.forward import make_method
from freqformer.tables.window import BORDERS, count_window, sliding_tile

LAYOUT = TileLayout((8, 16, 16), (4, 4, 8), 128)

# ---- counts without tables -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_counts_are_those_of_the_tables(seed):
  """Windows, radial bands, spatial and temporal heads, FreqFormer's buffer; random ragged grids."""
  rng = np.random.default_rng(seed)
  grid = tuple(int(e) for e in rng.integers(1, 15, 3))
  layout = TileLayout.fit(grid, int(rng.choice([4, 6, 8, 12])))
  window = tuple(int(w) for w in rng.integers(1, 7, 3))
  border = BORDERS[seed % 2]
  parts = 1 + seed % 2
  sink = int(rng.integers(1, 4))
  deal = ("octant", "as_is")[seed % 2]
  table = sliding_tile(layout, window, border, deal).refine(parts)
  sides = table.kv_counts.shape[1]
  for heads, first in ((sides, 0), (3 * sides, sides + 1)):
    dealt = np.arange(first, heads) % sides
    lists = {"kv_indices": table.kv_indices[:, dealt], "kv_counts": table.kv_counts[:, dealt]}
    counted = count_window(layout, window, border, parts, deal=deal, heads=heads, first=first)
    want = count(dataclasses.replace(table, **lists), 1, heads=heads - first)
    assert dataclasses.astuple(counted.scaled(heads - first)) == pytest.approx(
      dataclasses.astuple(want)
    )
  decay = float(rng.choice([0.3, 1.0, 2.5]))
  assert count_radial(layout, decay, sink) == count(radial(layout, decay, sink), 1)
  reach = (int(rng.integers(0, 3)), int(rng.integers(0, 3)), sink)
  two = spatial_temporal(layout, *reach)
  assert count_pairs(layout, *reach) == tuple(int(mask.pairs().sum()) for mask in two)
  method = make_method(
    f"freqformer(window={window}, border={border}, deal={deal}, low_shared={seed % 3 == 0})"
  )
  tables = method.tables(layout)
  for allocation, table in (((1, 0, 0), tables.low), ((0, 0, 1), tables.high)):
    # `longest` is that of all bands, whoever has heads
    found = dataclasses.replace(method.pairs(layout, sides, allocation), longest=0)
    want = dataclasses.replace(count(table, 1, heads=sides), longest=0)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(want))


@pytest.mark.parametrize("kind", ["block_dct", "dct", "haar"])
def test_sizes_are_the_fitted_basis_s(kind):
  layout = TileLayout.fit((5, 6, 9), 32)
  basis = SpectralBasis(kind, (0.5, 0.25, 0.5), (0.5, 1.0, 1.0))
  tables = basis.fit(layout)
  assert coarse_tokens(basis, layout) == tables.n_coarse
  if kind == "block_dct":
    assert most_cells(basis, layout) == tables.operators.classes[0].compress.shape[0]


@pytest.mark.parametrize(
  "name, block",
  [("radial", 32), ("freqformer", 32), ("spatial_temporal", 32), ("sliding_tile", 64)],
)
def test_a_million_tokens_are_counted_in_little_memory(name, block):
  """Nothing of tiles x tiles, no list, no array of tokens: also for a prime number in a row."""
  method = method_class(name)()
  for grid in ((1, 1, 1_048_573), (64, 128, 128)):
    layout = TileLayout.fit(grid, block)
    tracemalloc.start()
    pairs = method.pairs(layout, 40).pairs
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < pairs <= 40 * layout.n**2 and peak < 64e6


# ---- allocations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "allocation, said",
  [
    ((0, 0, 0), "none negative and not all 0"),
    ((-1, 1, 12), "none negative"),
    ((float("nan"), 6, 6), "none negative"),
    ((6, 6), "3 head counts"),
    ((1.5, 4.5, 6), "whole numbers"),
  ],
)
def test_an_invalid_allocation_is_refused(allocation, said):
  with pytest.raises(ConfigError, match=said):
    method_class("freqformer")(allocation=allocation)


@pytest.mark.parametrize("name", ["freqformer", "sparseflow", "spatial_temporal"])
def test_invalid_shares_are_refused_where_they_are_counted(name):
  shares = (-1, 2, 3) if name == "freqformer" else (-1, 2)
  with pytest.raises(ConfigError, match="none negative"):
    method_class(name)().pairs(LAYOUT, 12, shares)


def test_an_allocation_is_that_of_the_layer():
  method = method_class("freqformer")(allocation=(13, 13, 13))
  for counted in (method.pairs, lambda *args: layer_cost(method, *args, 32)):
    with pytest.raises(ConfigError, match="hands out 39 heads, the layer has 12"):
      counted(LAYOUT, 12)


# ---- what the router's penalty weighs ------------------------------------------------------------


@pytest.mark.parametrize("name, branches", [("freqformer", 3), ("sparseflow", 2)])
def test_the_penalty_weighs_what_is_counted(name, branches):
  """The loss is `penalty` of the probabilities and of `layer_cost` with all heads in one branch."""
  router = RouterConfig(prior=(1.0,) * branches, budget=1e-3, penalty=0.7)
  method = method_class(name)(router=router)
  layout = TileLayout.fit((4, 8, 16), 32)
  layer = SpectralAttention(AttentionDims(32, 4, 32), method, layout, nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, layout.n_buffer, 32)), jnp.float32)
  cond = Cond(jnp.full(1, 0.5), jnp.ones((1, 32)), train=True, rng=jax.random.key(0))
  branch_costs.cache_clear()  # counted while the layer is traced
  run = nnx.jit(lambda layer, x: layer(x, cond, layout.arrays(), method.tables(layout), {})[2])
  aux = run(layer, x)
  dense = 4 * 32 * layout.n**2
  one_hot = map(tuple, np.eye(branches))
  costs = [layer_cost(method, layout, 4, 8, alone).total / dense for alone in one_hot]
  assert branch_costs(method, layout, 4, 8) == pytest.approx(costs)
  want = float(penalty(router, aux["probs"], np.asarray(costs)))
  assert float(aux["loss"]) == pytest.approx(want, rel=1e-5) and want > 0


def test_every_branch_of_every_head_in_training():
  """Pairs of all branches and work around attention of all heads; sampled: of one branch."""
  method = method_class("sparseflow")()
  training = layer_cost(method, LAYOUT, 4, 32, training=True)
  sparse, linear = (layer_cost(method, LAYOUT, 4, 32, one) for one in ((1, 0), (0, 1)))
  assert training.attention_flops == sparse.attention_flops + linear.attention_flops
  assert training.linear_flops == linear.linear_flops > sparse.linear_flops
  sampled = method_class("sparseflow")(router=dataclasses.replace(method.router, mode="sampled"))
  assert layer_cost(sampled, LAYOUT, 4, 32, training=True) == layer_cost(sampled, LAYOUT, 4, 32)


def test_heads_are_dealt_dearest_first():
  assert deal_heads(np.array([2, 3, 4, 5]), 2) == [[0, 3], [1, 2]]


def test_each_device_has_as_many_heads():
  assert deal_heads(np.array([9, 1, 1, 1]), 2) == [[0, 3], [1, 2]]
  assert deal_heads(np.ones(3), 2) == [[0, 2], [1]]
