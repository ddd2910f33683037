"""The methods' benchmark measures what the methods run, on a tiny shape."""

import dataclasses

import numpy as np
import pytest

from benchmarks import rows
from benchmarks.arg_specs import SPECS
from benchmarks.cpu import methods as benchmark
from freqformer.cost import layer_cost
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.registry import METHODS
from freqformer.methods.sparse_linear import SparseLinear
from tests.kernels.block_sparse.suite import relative_error

TINY = dataclasses.replace(
  SPECS["cpu_1k"], name="tiny", heads=2, head_dim=8, keys=16, block=8
)  # 128 tiles


def test_the_calls_taken_out_are_the_methods_own():
  method = FreqFormer(allocation=(0, 1, 1), mid_tiles=2)  # no head is low: nothing is lifted
  calls = benchmark.calls_of(method, TINY)
  (attention,), out = calls.attention(), calls.whole()[0]
  rows_of_tokens = slice(-TINY.layout.n_buffer, None)
  assert relative_error(attention[:, rows_of_tokens], out) < 3e-6
  (captured,), linear, _, stand_in = calls.around()
  assert not linear and calls.linear is None
  np.testing.assert_array_equal(stand_in, captured[2][:, rows_of_tokens])  # none was computed
  assert calls.density == pytest.approx(np.asarray(captured[3].density(TINY.n)).mean(), rel=1e-5)


def test_linear_heads_are_counted():
  method = SparseLinear(critical=0.1)
  calls = benchmark.calls_of(method, TINY)
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
  (row,) = found = benchmark.measure(TINY, 1, settings=("spatial_temporal(sink=0)",))
  assert row["name"] == "spatial_temporal_vs_dense_mode_tiny" and row["name"] in rows.table(found)
  assert {"around_warmup", "around_profile", "around_run"} <= set(row)
  assert row["value"] == pytest.approx(
    row["dense_mode"]["median_s"] / row["attention"]["median_s"] * row["density"]
  )
