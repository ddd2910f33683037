"""Who gets how many heads, what is counted without tables, and what the router's penalty weighs."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from freqformer.kernels.block_sparse.cost import count

from freqformer.config import ConfigError
from freqformer.cost import attention_cost, method_call
from freqformer.grid.basis import SpectralBasis
from freqformer.grid.layout import TileLayout
from freqformer.grid.sizes import TransformSizes
from freqformer.methods.base import Cond
from freqformer.methods.parts.router import RouterConfig, penalty
from freqformer.methods.registry import method_class
from freqformer.model.attention import AttentionDims, SpectralAttention
from freqformer.simulation import command as simulate
from freqformer.simulation.forward import make_method
from freqformer.methods.radial import count_radial, radial
from freqformer.methods.spatial_temporal import count_pairs, spatial_temporal
from freqformer.tables.window import BORDERS, count_window, sliding_tile

LAYOUT = TileLayout((8, 16, 16), (4, 4, 8), 128)


@pytest.mark.parametrize("seed", range(12))
def test_counts_are_those_of_the_tables(seed):
  """Of random ragged grids: windows, radial bands, spatial and temporal heads, and FreqFormer's packed buffer."""
  rng = np.random.default_rng(seed)
  layout = TileLayout.fit(
    tuple(int(e) for e in rng.integers(1, 15, 3)), int(rng.choice([4, 6, 8, 12]))
  )
  window, border = tuple(int(w) for w in rng.integers(1, 7, 3)), BORDERS[seed % 2]
  parts, sink = 1 + seed % 2, int(rng.integers(1, 4))
  assert count_window(layout, window, border, parts) == count(
    sliding_tile(layout, window, border).refine(parts), 1
  )
  decay = float(rng.choice([0.3, 1.0, 2.5]))
  assert count_radial(layout, decay, sink) == count(radial(layout, decay, sink), 1)
  reach = (int(rng.integers(0, 3)), int(rng.integers(0, 3)), sink)
  assert count_pairs(layout, *reach) == tuple(
    int(mask.pairs().sum()) for mask in spatial_temporal(layout, *reach)
  )
  method = make_method(f"freqformer(window={window}, border={border}, low_shared={seed % 3 == 0})")
  tables = method.tables(layout)
  for allocation, table in (((1, 0, 0), tables.low), ((0, 0, 1), tables.high)):
    assert dataclasses.replace(
      method.call_cost(layout, 1, 8, allocation), longest=0
    ) == dataclasses.replace(count(table, 8), longest=0)


@pytest.mark.parametrize("kind", ["block_dct", "dct", "haar"])
def test_transform_sizes_are_the_fitted_basis_s(kind):
  layout = TileLayout.fit((5, 6, 9), 32)
  basis = SpectralBasis(kind, (0.5, 0.25, 0.5), (0.5, 1.0, 1.0))
  assert TransformSizes.of(basis, layout).n_coarse == basis.fit(layout).n_coarse


@pytest.mark.parametrize(
  "name, block",
  [("radial", 32), ("freqformer", 32), ("spatial_temporal", 32), ("sliding_tile", 64)],
)
def test_a_million_tokens_are_counted_in_little_memory(name, block):
  """A prime number of tokens in a row, and in small tiles: nothing of tiles x tiles, no list, no array of tokens."""
  method = method_class(name)()
  for grid in ((1, 1, 1_048_573), (64, 128, 128)):
    layout = TileLayout.fit(grid, block)
    tracemalloc.start()
    cost = method.cost(layout, 40, 128)
    method_call(method, layout, 40, 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
      0 < cost.attention_flops <= attention_cost(40 * layout.n**2, 128).attention_flops
      and peak < 64e6
    )


# ---- allocations and the router's penalty --------------------------------------------------------------------------------


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
def test_an_allocation_that_is_none_is_refused(allocation, said):
  with pytest.raises(ConfigError, match=said):
    method_class("freqformer")(allocation=allocation)


def test_an_allocation_is_that_of_the_layer():
  """Counted and built, whatever counts it: the same sentence."""
  method = method_class("freqformer")(allocation=(13, 13, 13))
  for call in (lambda: method.cost(LAYOUT, 12, 32), lambda: method.call_cost(LAYOUT, 12, 32)):
    with pytest.raises(ConfigError, match="hands out 39 heads, the layer has 12"):
      call()
  for name in ("freqformer", "sparseflow", "spatial_temporal"):
    with pytest.raises(ConfigError, match="none negative"):
      method_class(name)().cost(LAYOUT, 12, 32, (-1, 2, 3)[: 2 + (name == "freqformer")])
  with pytest.raises(ConfigError, match="hands out 39 heads, the layer has 12"):
    simulate.run(
      ["--method=freqformer(allocation=(13, 13, 13))", "--model=wan2.1-1.3b", "--tokens=4096"]
    )


@pytest.mark.parametrize("name", ["freqformer", "sparseflow"])
def test_the_penalty_weighs_what_is_counted(name):
  """The layer's loss is `penalty` of its probabilities and of `cost` with all heads in one branch, over dense."""
  router = RouterConfig(
    prior=(0.3, 0.3, 0.4) if name == "freqformer" else (0.5, 0.5), budget=1e-3, penalty=0.7
  )
  method = method_class(name)(router=router)
  layout, dims = TileLayout.fit((4, 8, 16), 32), AttentionDims(32, 4, 32)
  costs = [
    method.cost(layout, 4, 8, alone).total / (4 * 32 * layout.n**2)
    for alone in np.eye(len(method.branches))
  ]
  assert method.branch_costs(layout, 4, 8) == pytest.approx(costs)
  layer = SpectralAttention(dims, method, layout, nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, layout.n_buffer, 32)), jnp.float32)
  cond = Cond(jnp.full(1, 0.5), jnp.ones((1, 32)), train=True, rng=jax.random.key(0))
  run = nnx.jit(lambda layer, x: layer(x, cond, layout.arrays(), method.tables(layout), {})[2])
  aux = run(layer, x)
  want = penalty(router, aux["probs"], np.asarray(costs))
  assert float(aux["loss"]) == pytest.approx(float(want), rel=1e-5) and float(want) > 0


def test_every_branch_of_every_head_in_training():
  """Pairs of all branches, what lies around them once."""
  method = method_class("sparseflow")()
  both_ways, alone = (
    method.training_cost(LAYOUT, 4, 32),
    [method.cost(LAYOUT, 4, 32, one) for one in np.eye(2)],
  )
  assert both_ways.attention_flops == sum(c.attention_flops for c in alone)
  assert (
    both_ways.linear_flops
    == max(c.linear_flops for c in alone)
    > min(c.linear_flops for c in alone)
  )
  sampled = method_class("sparseflow")(router=dataclasses.replace(method.router, mode="sampled"))
  assert sampled.training_cost(LAYOUT, 4, 32) == sampled.cost(LAYOUT, 4, 32)
