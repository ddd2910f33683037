"""docs/complexity.md shows what its rows say, and the rows of the simulator are what it gives today."""

import json

import pytest

from benchmarks import rows
from benchmarks.pages import complexity, complexity_notes, complexity_page


@pytest.fixture(scope="module")
def found():
  return json.loads((rows.RESULTS / "simulation.json").read_text())


def test_the_page_shows_the_rows(found):
  text = complexity.DOC.read_text()
  assert complexity.fill(text, complexity.tables(found)) == text
  for name in ("scaling", "parts", "validation", "errors"):
    assert f"figures/{name}.svg" in text and (complexity.FIGURES / f"{name}.svg").exists()


def test_every_row_says_whether_it_was_measured(found):
  assert all(
    isinstance(r["measured"], bool) and r["command"].startswith(complexity.COMMAND) for r in found
  )
  assert all(r["measured"] == (r["set"] == "approximation") for r in found)


def test_every_bound_on_the_page_holds(found):
  own = [r for r in found if r["set"] == "approximation"]
  assert len(own) > 100 and all(
    r["holds"] for r in own if r["bound"] is not None and not r["exact"]
  )
  assert any(r["case"].startswith("t = ") for r in own)


def test_the_committed_rows_are_today_s():
  """The counts of methods, the rates and the roofline have not moved away from the page (`make simulate` renews it)."""
  stored = json.loads((rows.RESULTS / "simulation.json").read_text())
  gpu, validation = complexity.validation()
  fresh = (
    validation
    + complexity.published_run(gpu)
    + complexity.several_gpus(gpu)
    + complexity.devices(gpu)
  )
  sets = {r["set"] for r in fresh}
  kept = [r for r in stored if r["set"] in sets]
  assert len(kept) == len(fresh)
  for old, new in zip(kept, fresh, strict=True):
    assert old["seconds"] == pytest.approx(new["seconds"], rel=1e-3), (old, new)


def test_every_table_and_figure_says_what_was_measured(found):
  headers = []
  for name, body in complexity.tables(found).items():
    lines = body.splitlines()
    headers += [
      (name, line)
      for line, rule in zip(lines, lines[1:], strict=False)
      if rule.startswith("| --- ")
    ]
  assert len(headers) == 9 and all("| measured" in line for _, line in headers), headers
  for name, words in {
    "scaling": "simulated",
    "parts": "simulated",
    "validation": "measured simulated",
    "errors": "measured",
  }.items():
    text = (complexity.FIGURES / f"{name}.svg").read_text()
    assert all(f"{word}" in text for word in words.split()), name


def test_sentences_move_with_the_rows():
  def call(name, measured, error, fitted):
    return {"name": name, "measured_seconds": measured, "error": error, "fitted": fitted}

  calls = [
    call("a", 1.0, 0.0, True),
    call("b", 2.0, -0.1, False),
    call("TritonBench a", 1.25, 0.3, False),
  ]
  assert (
    complexity_notes.fit(calls) == "1 rows fitted, 2 not: mean error of these 20.0%, worst 30.0%."
  )
  assert "1 calls were measured twice" in complexity_notes.spread(
    calls
  ) and "+25% to +25%" in complexity_notes.spread(calls)
  dense = {"method": "dense", "seconds": 4.0}
  ours = {"method": "freqformer", "attention_speedup": 30.0, "speedup_over_dense": 2.0}
  rows_of = [
    dense | {"tokens": 10, "attention_seconds": 1.0},
    dense | {"tokens": 2000, "attention_seconds": 3.0},
  ]
  rows_of += [ours | {"tokens": 10}, ours | {"tokens": 2000, "speedup_over_dense": 7.5}]
  text = " ".join(complexity_notes.shares(rows_of).split())
  assert (
    "25% of a dense forward at 10 tokens and 75% at 2,000" in text
    and "At 2,000 tokens" in text
    and "7.5 times" in text
  )


def test_comparisons_name_their_sources_and_what_was_fitted():
  gpu, found = complexity.validation()
  found = [r for r in found if r["set"] == "dense rate alone fitted"]
  text = complexity_page.comparison(found)
  assert (
    "| 25.38 |" in text
    and "| 265.2 (derived) |" in text
    and "* Derived, not measured: FA3 dense on 30x48x80, 10.45 x" in text
  )
  assert (
    "| no | 1 |" in text
    and "| yes | 2 |" in text
    and all(f"* Source {i}: Sliding tile" in text for i in (1, 2))
  )
  assert (
    "* Fitted: attention_flops. Assumed: softmax_exposed, matmul_flops, hbm, l2" in text
    and "WARNING" not in text
  )
  assert "* WARNING: too good." in complexity_page.comparison(
    [found[0] | {"rates_warnings": ["too good"]}]
  )
  # The same SMs at assumed rates would make the H200, with the faster memory, the slower one.
  at = {(r["gpu"], r["method"]): r for r in complexity.devices(gpu)}
  for method in ("dense", "dense, unpadded", "freqformer"):
    assert at["h200", method]["seconds"] < at["h100", method]["seconds"]
  assert at["h100", "dense"]["seconds"] > 1.05 * at["h100", "dense, unpadded"]["seconds"]
  assert (
    "of h100, which has the same SMs; the others assumed | no |"
    in complexity_page.devices_table(list(at.values()))
  )
  assert sum("all rates assumed" in r["rates"] for r in at.values()) == 6


def test_a_page_without_its_marker_is_refused():
  with pytest.raises(ValueError, match="markers"):
    complexity.fill("no marker here", {"sweep": "x"})
