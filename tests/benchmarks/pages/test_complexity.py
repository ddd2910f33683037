"""docs/complexity.md shows what its rows say, and the simulator gives today what the rows say."""

import json

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


def test_comparisons_name_their_sources_and_what_was_fitted(validated):
  found = complexity.of_set(validated[1], "dense rate alone fitted")
  text = complexity.comparison(found)
  sta = next(r for r in found if r["name"] == "STA 18x24x24 on 30x48x80")
  assert not sta["fitted"] and abs(sta["error"]) < 0.15
  assert "| 25.38 |" in text and "| 265.2 (derived) |" in text
  assert "* Derived, not measured: FA3 dense on 30x48x80, 10.45 x" in text
  assert "| no | 1 |" in text and "| yes | 2 |" in text
  assert all(f"* Source {i}: Sliding tile" in text for i in (1, 2))
  assert "* Fitted: attention_flops. Assumed: softmax_exposed, matmul_flops, hbm, l2" in text
  assert "WARNING" not in text
  doubtful = [found[0] | {"rates_warnings": ["too good"]}]
  assert "* WARNING: too good." in complexity.comparison(doubtful)


def test_devices_with_the_same_sms_share_their_rates(validated):
  """At assumed rates the H200, with the faster memory, would come out slower than the H100."""
  at = {(r["gpu"], r["method"]): r for r in complexity.devices(validated[0])}
  for method in ("dense", "dense, unpadded", "freqformer"):
    assert at["h200", method]["seconds"] < at["h100", method]["seconds"]
    assert "of h100, which has the same SMs" in at["h200", method]["rates"]
  assert at["h100", "dense"]["seconds"] > 1.05 * at["h100", "dense, unpadded"]["seconds"]
  assert sum("all rates assumed" in r["rates"] for r in at.values()) == 6


def test_a_page_without_its_marker_is_refused():
  with pytest.raises(ValueError, match="markers"):
    complexity.fill("no marker here", {"sweep": "x"})
