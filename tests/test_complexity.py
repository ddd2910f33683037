"""docs/complexity.md shows what its rows say, and the rows of the simulator are what it gives today."""

import json

import pytest

from benchmarks import complexity, rows


@pytest.fixture(scope="module")
def found():
  return json.loads((rows.RESULTS / "simulation.json").read_text())


def test_the_page_shows_the_rows(found):
  text = complexity.DOC.read_text()
  assert complexity.fill(text, complexity.tables(found)) == text
  for name in ("scaling", "parts", "validation", "errors"):
    assert f"figures/{name}.svg" in text and (complexity.FIGURES / f"{name}.svg").exists()


def test_every_row_says_whether_it_was_measured(found):
  assert all(isinstance(r["measured"], bool) and r["command"].startswith(complexity.COMMAND) for r in found)
  assert all(r["measured"] == (r["set"] == "approximation") for r in found)


def test_every_bound_on_the_page_holds(found):
  own = [r for r in found if r["set"] == "approximation"]
  assert len(own) > 100 and all(r["holds"] for r in own if r["bound"] is not None and not r["exact"])
  assert any(r["case"].startswith("t = ") for r in own)


def test_the_committed_rows_are_today_s():
  """The counts of methods, the rates and the roofline have not moved away from the page (`make simulate` renews it)."""
  stored = json.loads((rows.RESULTS / "simulation.json").read_text())
  gpu, validation = complexity.validation()
  fresh = validation + complexity.published_run(gpu) + complexity.several_gpus(gpu) + complexity.devices(gpu)
  sets = {r["set"] for r in fresh}
  kept = [r for r in stored if r["set"] in sets]
  assert len(kept) == len(fresh)
  for old, new in zip(kept, fresh, strict=True):
    assert old["seconds"] == pytest.approx(new["seconds"], rel=1e-3), (old, new)


def test_a_page_without_its_marker_is_refused():
  with pytest.raises(ValueError, match="markers"):
    complexity.fill("no marker here", {"sweep": "x"})
