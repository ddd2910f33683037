"""The simulator's table of bytes and launches, against layers compiled here for an H100."""

import pytest

from benchmarks.compiled import layer_traffic
from freqformer.cost import Cost
from freqformer.simulation.forward import make_method
from freqformer.simulation.traffic import around_attention


def test_a_gate_moves_what_the_table_says():
  """A difference of two layers, to 15 % of the bytes and 12 launches."""
  texts = ("block_topk(coarse=none)", "block_topk")
  sizes = (layer_traffic.LAYOUT, layer_traffic.HEADS, layer_traffic.HEAD_DIM)
  off, on = map(layer_traffic.measure, texts)
  told_off, told_on = (around_attention(make_method(text), *sizes, Cost()) for text in texts)
  assert told_on.bytes - told_off.bytes == pytest.approx(on["bytes"] - off["bytes"], rel=0.15)
  launches = on["launches"] - off["launches"] + on["attention_launches"] - off["attention_launches"]
  assert told_on.launches - told_off.launches == pytest.approx(launches, abs=12)


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
