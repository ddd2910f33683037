"""The methods' benchmark measures what the methods run, on a tiny shape."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import rows
from benchmarks.arg_specs import SPECS
from benchmarks.cpu import methods as benchmark
from benchmarks.layer import projected
from freqformer.cost import layer_cost
from freqformer.methods.base import Cond
from freqformer.methods.block_topk import BlockTopK
from freqformer.methods.radial import Radial
from freqformer.methods.registry import METHODS
from freqformer.methods.sparse_linear import SparseLinear
from tests.kernels.block_sparse.suite import relative_error

TINY = dataclasses.replace(
  SPECS["cpu_1k"], name="tiny", heads=2, head_dim=8, keys=16, block=8
)  # 128 tiles


def run(method):
  layout, (q, k, v) = TINY.layout, TINY.inputs()
  cond = Cond(jnp.full(1, 0.5), jnp.zeros((1, 8)))
  qkv = projected(jnp.stack([q, k, v], 2), layout.arrays())
  return method(None, qkv, cond, method.tables(layout), {})


@pytest.mark.parametrize(
  "method", [Radial(decay=0.2), BlockTopK(density=0.1, coarse="none")], ids=["radial", "block_topk"]
)
def test_the_calls_taken_out_are_the_methods_own(method):
  calls, (out, _, aux) = benchmark.calls_of(method, TINY, "", {}), run(method)
  (attention,) = calls.attention()
  assert relative_error(attention, out) < 3e-6
  assert calls.density == pytest.approx(float(aux["density"].mean()), rel=1e-5)
  (captured,), linear, _, stand_in = calls.around()
  assert not linear and calls.linear is None
  np.testing.assert_array_equal(stand_in, captured[2])  # no attention was computed


def test_linear_heads_are_counted():
  method = SparseLinear(critical=0.1)
  calls = benchmark.calls_of(method, TINY, "", {})
  layout, d = TINY.layout, TINY.head_dim
  projection = 2 * layout.n * TINY.heads * d**2
  ranking = 4 * TINY.heads * layout.tiles**2 * d
  around = layer_cost(method, layout, TINY.heads, d).linear_flops
  # d + 8 columns run: what is appended for the denominator is padded to 8
  assert calls.linear_flops * (d + 8) / (d + 1) == pytest.approx(around - projection - ranking)
  assert calls.linear()[0][0].shape == (1, layout.n_buffer, TINY.heads, d)


def test_rows_of_a_run():
  # Every method of ours has a setting; a user's own need not have one.
  assert {text.split("(")[0] for text in benchmark.SETTINGS} >= set(METHODS) - {"dense"}
  found = benchmark.measure(TINY, 1, settings=("radial", "adaspa(sparsity=0.9)"))
  assert [row["name"] for row in found] == [
    "radial_vs_dense_mode_tiny",
    "adaspa_vs_dense_mode_tiny",
  ]
  assert {"around_warmup", "around_search_first", "around_reuse", "around_search"} <= set(found[1])
  for row in found:
    assert row["value"] == pytest.approx(
      row["dense_mode"]["median_s"] / row["attention"]["median_s"] * row["density"]
    )
    assert row["name"] in rows.table(found)
