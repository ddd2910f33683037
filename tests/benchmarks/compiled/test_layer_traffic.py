"""The simulator's table of bytes and launches, against a layer compiled here for an H100."""

import pytest

from benchmarks import rows
from benchmarks.compiled import layer_traffic
from freqformer.simulation.forward import make_method
from freqformer.simulation.traffic import around_attention


def test_selection_and_gate_move_what_the_table_says():
  """Beyond the stored row of the dense layer, to 15 % of the bytes and 5 launches."""
  stored = rows.read_rows(rows.RESULTS / "layer_traffic.json")
  dense = next(row for row in stored if row["name"] == "dense")
  gated = layer_traffic.measure("block_topk")
  sizes = (layer_traffic.LAYOUT, layer_traffic.HEADS, layer_traffic.HEAD_DIM)
  told = around_attention(make_method("block_topk"), *sizes)
  assert told.bytes == pytest.approx(gated["bytes"] - dense["bytes"], rel=0.15)
  launches = gated["launches"] + gated["attention_launches"]
  launches -= dense["launches"] + dense["attention_launches"]
  assert told.launches == pytest.approx(launches, abs=5)


@pytest.mark.parametrize(
  "name, filtered, kernels",
  [
    ("around/a_64k", "none", True),
    ("around/a_64k_filter_qkv", "qkv", True),
    ("around/a_64k_filter_v_xla", "v", False),
    ("around/a_64k_xla", "none", False),
  ],
)
def test_names_of_rows_say_what_is_compiled(name, filtered, kernels):
  case = layer_traffic.Case.named(name)
  method = make_method(case.method)
  assert (method.filter, case.kernels, case.layout.n) == (filtered, kernels, 65536)
  assert method.mid_tiles == 25  # 5 % of 512
