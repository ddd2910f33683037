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
  text = complexity.comparison(found) + complexity.notes(found)
  sta = next(r for r in found if r["name"] == "STA 18x24x24 on 30x48x80")
  assert not sta["fitted"] and abs(sta["error"]) < 0.15
  assert f"| 25.38 ms | {1e3 * sta['seconds']:.4g} ms | {sta['error']:+.1%} |" in text
  assert "| 265.2 ms (derived) |" in text and text.count("(fitted)") == 1
  assert "* Derived, not measured: FA3 dense on 30x48x80, 10.45 x" in text
  assert "* Measured by: [STA](https://arxiv.org/abs/2502.04507)." in text
  assert "* Fitted rates: attention_flops; the others are assumed." in text
  error = f"{abs(sta['error']):.1%}"
  assert f"not fitted: 1, mean error {error}, worst {error}." in text
  assert "WARNING" not in text
  doubtful = [found[0] | {"rates_warnings": ["too good"], "source": "elsewhere"}, found[1]]
  assert "* WARNING: too good." in complexity.notes(doubtful)
  assert "* Measured by: elsewhere; [STA]" in complexity.notes(doubtful)


def test_published_rows_lie_at_their_kernel_and_length(validated):
  calls = complexity.of_set(validated[1], "three published rows fitted")
  table = complexity.published_tables(calls, run=[])
  lines = {line.split(" | ")[0]: line.split(" | ") for line in table.splitlines()}
  for r in calls:
    kernel, _, length = r["name"].partition(" n=")
    shown = lines[f"| {kernel}"]
    if length:
      column = lines["| measured ms, error"].index(f"n={length}" + " |" * (length == "16384"))
      assert shown[column].startswith(f"{1e3 * r['measured_seconds']:.4g}, {r['error']:+.1%}")
    else:
      assert shown[3].startswith(f"{r['error']:+.1%}")
  assert table.count("(fitted)") == 3


def test_a_pivot_shows_gaps_and_loses_no_row():
  rows = [{"method": "a", "n": 1}, {"method": "b", "n": 2}]
  method, n = complexity.text("method"), complexity.text("n")
  table = complexity.pivot(rows, "m", method, n, lambda r: f"{r['method']}{r['n']}")
  assert table.splitlines() == [
    "| m | 1 | 2 |",
    "|---|---|---|",
    "| a | a1 | - |",
    "| b | - | b2 |",
  ]
  with pytest.raises(ValueError, match="two rows for line 'a' and column 1"):
    complexity.pivot([*rows, rows[0]], "m", method, n, method)


def test_a_video_that_does_not_fit_is_marked():
  group = {"a": {"memory_bytes": 29e9, "fits": True}, "b": {"memory_bytes": 90e9, "fits": False}}
  assert complexity.resident_text(group) == "90 (does not fit)"
  del group["b"]
  assert complexity.resident_text(group) == "29"


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
