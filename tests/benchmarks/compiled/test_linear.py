"""Rows of linear attention beside a sparse launch: what is counted of a compiled program."""

import pytest

from benchmarks.arg_specs import AttentionSpec
from benchmarks.compiled import linear
from freqformer.analysis.hlo_bytes import Operation
from freqformer.methods.sparseflow import SparseFlow
from freqformer.simulation.traffic import around_attention


def test_bytes_of_heads_and_in_place():
  """Kernels count by the share of heads, what is written in place once, sparse heads not at all."""
  operations = [
    Operation("a", "custom-call", 100.0, ("jit(f)/sparse_heads/attention_forward/mpmd_map",), True),
    Operation("b", "custom-call", 60.0, ("jit(f)/linear_states/mpmd_map",), True),
    Operation("c", "fusion", 8.0, ("jit(f)/reduce_sum",), False),
    Operation("d", "custom-call", 4.0, ("jit(f)/empty",), True),
    Operation("e", "custom-call", 80.0, ("jit(f)/linear_read/mpmd_map",), True),
  ]
  counted = linear.linear_bytes(operations, 0.5, 20.0)
  assert counted == {"linear_bytes": 30 + 8 + 30, "linear_kernels": 3}


def test_sparseflow_moves_little_more_than_its_rows():
  """Five heads' q, k, v, output and sums, as the simulator's table has it; no other head."""
  spec = AttentionSpec("x", (8, 32, 32), 12, 128)
  row = linear.sparseflow("x", spec, SparseFlow(), "pallas_mgpu")
  assert row["linear_bytes_least"] == 4 * 2 * 8192 * 5 * 128
  assert 1 < row["linear_bytes"] / row["linear_bytes_least"] < 1.3
  assert row["linear_kernels"] <= 5
  table = around_attention(SparseFlow(allocation=linear.SPLIT), spec.layout, 12, 128)
  assert table.bytes == pytest.approx(row["linear_bytes"], rel=0.1)
