"""The rows of linear attention beside a sparse launch: what is counted of a compiled program, and what the rows hold."""

import json

import pytest

from benchmarks import rows
from benchmarks.compiled import linear
from benchmarks.compiled.hlo_bytes import Operation
from freqformer.methods.sparseflow import SparseFlow


def test_bytes_of_heads_and_in_place():
  """Kernels count by the share of the heads, what is written in place once; the sparse heads and allocations not at all."""
  operations = [
    Operation("a", "custom-call", 100.0, ("jit(f)/sparse_heads/attention_forward/mpmd_map",), True),
    Operation("b", "custom-call", 60.0, ("jit(f)/linear_states/mpmd_map",), True),
    Operation("c", "fusion", 8.0, ("jit(f)/reduce_sum",), False),
    Operation("d", "custom-call", 4.0, ("jit(f)/empty",), True),
    Operation("e", "custom-call", 80.0, ("jit(f)/linear_read/mpmd_map",), True),
  ]
  assert linear.linear_bytes(operations, 0.5, 20.0) == (30 + 8 + 30, 3)


SHAPE = linear.Shape((8, 32, 32), 12, 128)


def test_sparseflow_moves_little_more_than_its_rows():
  """Compiled for an H100: five heads' q, k, v and output, sums, 5 kernels at most; no copy of the output, no other head."""
  row = linear.sparseflow("x", SHAPE, SparseFlow(), "pallas_mgpu")
  assert (
    row["linear_bytes"] == pytest.approx(row["linear_bytes_least"], rel=0.3)
    and row["linear_kernels"] <= 5
  )
  assert row["linear_bytes"] > row["linear_bytes_least"] == 4 * 2 * 8192 * 5 * 128


def test_rows_are_what_the_page_says():
  """The recorded rows: kernels against XLA, and what one launch could still win."""
  found = {row["name"]: row for row in json.loads((rows.RESULTS / "linear.json").read_text())}
  for name in ("sparseflow_routed", "sparseflow_fixed", "sparse_linear"):
    for size in linear.GRIDS:
      new, old = found[f"h100_{name}_{size}"], found[f"h100_{name}_{size}_xla"]
      share = 0.75 if size == "21x30x52" else 0.5
      assert (
        new["linear_bytes"] < share * old["linear_bytes"] and new["sparse_s"] == old["sparse_s"]
      )
      assert new["same_launch_block_gain_at_most"] < new["same_launch_gain_at_most"] < 1
  assert found["h100_sparseflow_routed_64k"]["same_launch_block_gain_at_most"] < 0.02


def test_sparseflow_states_the_bytes_of_the_rows():
  """The cost model's bytes of linear attention are the benchmark's."""
  found = {row["name"]: row for row in json.loads((rows.RESULTS / "linear.json").read_text())}
  for size, grid in linear.GRIDS.items():
    shape = linear.Shape(grid, 12, 128)
    row, cost = (
      found[f"h100_sparseflow_fixed_{size}"],
      SparseFlow(allocation=linear.SPLIT).cost(shape.layout(), 12, 128),
    )
    assert cost.linear_bytes == pytest.approx(row["linear_bytes"], rel=0.1)
