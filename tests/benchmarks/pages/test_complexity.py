"""docs/complexity.md shows what its rows say, and the simulator gives today what the rows say."""

import json
from operator import itemgetter

import pytest

from benchmarks.pages import complexity


@pytest.fixture(scope="module")
def stored():
  return json.loads(complexity.ROWS.read_text())


@pytest.fixture(scope="module")
def validated():
  """The fitted H100, and the rows of both fits."""
  return complexity.validation()


def test_the_page_shows_the_rows(stored):
  page = complexity.DOC.read_text()
  assert complexity.fill(page, complexity.tables(stored)) == page
  for name in ("scaling", "parts", "validation", "errors"):
    assert f"figures/{name}.png" in page and (complexity.FIGURES / f"{name}.png").exists()


def test_every_row_says_whether_it_was_measured(stored):
  for r in stored:
    assert r["measured"] is (r["set"] == "approximation")
    assert r["command"].startswith(complexity.COMMAND)


def test_every_bound_holds(stored):
  own = complexity.of_set(stored, "approximation")
  claimed = [r for r in own if r["bound"] is not None and not r["exact"]]
  assert len(claimed) > 100 and all(r["holds"] for r in claimed)
  assert any(r["case"].startswith("t = ") for r in claimed)


def test_the_stored_rows_are_today_s(stored, validated):
  """Counts of methods, rates and roofline have not moved away from the page."""
  gpu, fresh = validated
  fresh = fresh + complexity.published_run(gpu) + complexity.default_rows()
  fresh += complexity.several_gpus(gpu) + complexity.devices(gpu)
  kept = [r for r in stored if r["set"] in {f["set"] for f in fresh}]
  assert len(kept) == len(fresh)
  for old, new in zip(kept, fresh, strict=True):
    field = "seconds" if "seconds" in new else "density"
    assert old[field] == pytest.approx(new[field], rel=1e-3), (old, new)


def test_a_doubtful_fit_and_an_unknown_source_are_shown(validated):
  found = complexity.of_set(validated[1], "dense rate alone fitted")
  sta = next(r for r in found if r["name"] == "STA 18x24x24 on 30x48x80")
  assert not sta["fitted"] and abs(sta["error"]) < 0.15
  doubtful = [found[0] | {"rates_warnings": ["too good"], "source": "elsewhere"}, found[1]]
  assert "* WARNING: too good." in complexity.notes(doubtful)
  assert "* Measured by: elsewhere; [STA]" in complexity.notes(doubtful)


def test_a_pivot_shows_gaps_and_loses_no_row():
  rows = [{"method": "a", "n": "1"}, {"method": "b", "n": "2"}]
  method, n = itemgetter("method"), itemgetter("n")
  table = complexity.pivot(rows, "m", method, n, lambda r: f"{r['method']}{r['n']}")
  assert table.splitlines() == [
    "| m | 1 | 2 |",
    "|---|---|---|",
    "| a | a1 | - |",
    "| b | - | b2 |",
  ]
  with pytest.raises(ValueError, match="two rows for line 'a' and column '1'"):
    complexity.pivot([*rows, rows[0]], "m", method, n, method)


def test_a_video_that_does_not_fit_is_marked():
  group = {"a": {"memory_bytes": 29e9, "fits": True}, "b": {"memory_bytes": 90e9, "fits": False}}
  assert complexity.resident_text(group) == "90 (does not fit)"
  del group["b"]
  assert complexity.resident_text(group) == "29"


def test_a_page_without_its_marker_is_refused():
  with pytest.raises(ValueError, match="markers"):
    complexity.fill("no marker here", {"sweep": "x"})
