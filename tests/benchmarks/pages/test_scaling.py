"""docs/scaling.md: its tables are those of its rows, and its counts those of a hand."""

import json

import pytest

from benchmarks.pages import scaling
from benchmarks.pages.complexity import fill
from freqformer.simulation.descriptions import load_gpu
from tests import golden

GRID = (16, 64, 64)


def test_the_page_shows_its_rows():
  rows = json.loads(scaling.ROWS.read_text())
  assert not any(row["measured"] for row in rows)
  page = scaling.DOC.read_text()
  assert fill(page, scaling.tables(rows)) == page


def test_tokens_are_exchanged_for_heads():
  """As the compiled program does: q, k and v there, the output back, 2 bytes a number."""
  found = scaling.layer_row("sparseflow", GRID, 8, load_gpu("h100"))
  assert found["sent_bytes"] == 4 * 65536 * 1536 * 2 * 7 / 64
  assert scaling.bound(found, "a host") == "computing" and scaling.bound(found, "hosts") == "link"


def test_a_window_of_whole_frames_receives_the_neighbouring_ones():
  """64 frames of 64 x 64 tokens are 16 of 128 tiles: two on each of eight GPUs."""
  window = "sliding_tile(window=(3, 99, 99), unit=tiles, border=clip)"
  found = scaling.tiles_row(window, (64, 64, 64), 8)
  assert found["received_tiles"] == 2 * 128
  assert found["tiles_bytes"] == 2 * 256 * 128 * 1536 * 2


def test_gradients_of_a_layer_are_added_up():
  found = scaling.training_row(8)
  assert found["data_bytes"] == pytest.approx(2 * 4 * 18 * 1536**2 * 7 / 8)


def test_a_training_step_sends_what_the_compiled_program_does():
  """A device sends seven eighths of what an all-to-all returns, and of a gradient, both ways."""
  compiled = json.loads(golden.path("context").read_text())["training_step"]["exchanged_bytes"]
  sent = 7 / 8 * (compiled["all-to-all"] + 2 * compiled["all-reduce"])
  assert 30 * scaling.training_row(8)["context_bytes"] == pytest.approx(sent, rel=0.01)


@pytest.mark.parametrize("method", scaling.ALLOCATIONS)
def test_heads_dealt_by_cost_are_no_worse(method):
  found = scaling.balance_row(method, 8)
  assert 1 <= found["dealt"] <= found["in_order"]
