"""The simulator's table of bytes and launches, against a layer compiled here for an H100."""

import math

import pytest

from benchmarks import rows
from benchmarks.compiled import layer_traffic
from freqformer.simulation.forward import make_method
from freqformer.simulation.traffic import around_attention

STORED = {row["name"]: row for row in rows.read_rows(rows.RESULTS / "layer_traffic.json")}
SIZES = (layer_traffic.LAYOUT, layer_traffic.HEADS, layer_traffic.HEAD_DIM)


def launches(row):
  """Kernels of a layer, attention's included."""
  return row["launches"] + row["attention_launches"]


def test_selection_and_gate_move_what_the_table_says():
  """Beyond the stored row of the dense layer, to 15 % of the bytes and 5 launches."""
  dense = STORED["dense"]
  gated = layer_traffic.measure("block_topk")
  told = around_attention(make_method("block_topk"), *SIZES)
  assert told.bytes == pytest.approx(gated["bytes"] - dense["bytes"], rel=0.15)
  assert told.launches == pytest.approx(launches(gated) - launches(dense), abs=5)


def test_octaves_move_what_the_table_says():
  """The layer is compiled here; its other forms are rows. Norm and rotary of the tokens are 4."""
  rows_of = STORED | {"octaves": layer_traffic.measure("octaves")}
  for name in (n for n in rows_of if "octaves" in n and "/" not in n):
    parts = rows_of[name]["parts_passes"]
    passes = sum(count for part, count in parts.items() if part != "other")
    if "statistics" in name:  # read by no part of its own
      passes += parts["other"] - STORED["octaves"]["parts_passes"]["other"]
    told = around_attention(make_method(name), *SIZES)
    unit = 2 * math.prod((layer_traffic.LAYOUT.n, *SIZES[1:]))
    assert told.bytes / unit == pytest.approx(passes - 4, rel=0.03), name
    more = launches(rows_of[name]) - launches(STORED["dense"])
    assert told.launches == pytest.approx(more, abs=7), name  # fewer on a grid as small as this


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
