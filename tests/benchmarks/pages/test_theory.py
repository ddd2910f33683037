"""docs/evidence.md shows what the rows of its theory say, and the code still gives them."""

import json

import pytest

from benchmarks import rows as row_files
from benchmarks.pages import theory
from benchmarks.pages.complexity import fill
from freqformer.analysis.theory import Question, answer
from freqformer.config import ConfigError
from freqformer.grid.spectrum import power_law


@pytest.fixture(scope="module")
def stored():
  return json.loads(theory.ROWS.read_text())


def test_the_page_shows_the_rows(stored):
  page = theory.DOC.read_text()
  of_data = row_files.read_rows(theory.DATA_ROWS)
  assert fill(page, theory.tables(stored, of_data)) == page and len(of_data) == 2
  assert "figures/theory.png" in page and theory.FIGURE.exists()
  assert len(stored) == 8 and not any(r["measured"] for r in stored)


def test_the_stored_rows_are_today_s(stored):
  """Two sets on the smallest grid; longer ones take seconds each."""
  question = Question((8, 12, 12), ("octaves", "coarse"))
  for old in (r for r in stored if r["grid"] == [8, 12, 12]):
    new = answer(question, power_law(question.grid, old["slope"]))
    for name, of_set in new["sets"].items():
      assert of_set["excess"] == pytest.approx(old["sets"][name]["excess"], rel=1e-3, abs=1e-4)
    assert sum(new["mass"], []) == pytest.approx(sum(old["mass"], []), abs=1e-4)


def test_a_cache_needs_a_name():
  with pytest.raises(ConfigError, match="--data='carphone' must read NAME=FOLDER"):
    theory.main(["--data=carphone"])


def test_the_price_of_the_finest_level():
  found = {"name": "g", "times": [0.5], "mass": [], "sets": {}}
  for name, percent in (("window3", 50.0), ("octaves", 10.0), ("coarse", 21.0)):
    found["sets"][name] = {"keys": 1, "excess": [percent]}
  shown = theory.tables([found | {"name": theory.SHOWN}])
  assert "| 10.00 |" in shown["theory without the finest"]
  worst = shown["theory over grids"].splitlines()
  assert "coarse" not in worst[0] and "| 50 (1) | 10 (1) |" in worst[2]
