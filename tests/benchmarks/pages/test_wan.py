"""The table of docs/pretrained.md is that of its rows, and they are of the published models."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks.pages import wan
from benchmarks.pages.complexity import fill
from tools.program_cost import program_cost


def test_the_page_shows_its_rows():
  rows = json.loads(wan.ROWS.read_text())
  assert not any(row["measured"] for row in rows)
  page = wan.DOC.read_text()
  assert fill(page, {"expected": wan.table(rows)}) == page


def test_rows_are_of_the_published_sizes():
  """1.42 billion parameters, all but two hundredths in 16 bits; UMT5-XXL's encoder has 5.68."""
  (row, *_) = (row for row in json.loads(wan.ROWS.read_text()) if row["model"] == "wan2.1-1.3b")
  assert row["weight_bytes"] == pytest.approx(2 * 1.42e9, rel=0.02)
  assert row["text_encoder_bytes"] == pytest.approx(2 * 5.68e9, rel=0.01)
  assert row["tokens"] == 21 * 30 * 52


def test_convolutions_are_counted():
  def convolve(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers)

  shapes = ((2, 8, 6, 5), (3, 3, 5, 7))
  found = program_cost(convolve, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
  assert found.flops == 2 * (2 * 4 * 3 * 7) * (3 * 3 * 5)
