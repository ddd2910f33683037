"""examples/tour.ipynb runs from its first cell to its last, with fewer steps than it asks for."""

import json
import pathlib

import matplotlib
import numpy as np

import freqformer

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
# What the tests shorten, and to what.
SMALLER = {
  "grid=(4, 32, 32)": "grid=(4, 16, 16)",
  "calls=5": "calls=1",
  "STEPS = 600": "STEPS = 2",
  "steps=24": "steps=2",
}
MOST_BYTES = 300_000  # a code host shows it, and a clone stays small


def code_cells():
  cells = json.loads(NOTEBOOK.read_text())["cells"]
  return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def smaller(cells):
  """Returns the cells with less work to do."""
  for written, wanted in SMALLER.items():
    assert sum(written in source for source in cells) == 1, f"no cell, or two, with {written}"
    cells = [source.replace(written, wanted) for source in cells]
  return cells


def test_the_tour_runs():
  matplotlib.use("agg")
  names = {}
  for number, source in enumerate(smaller(code_cells())):
    exec(compile(source, f"tour.ipynb, code cell {number}", "exec"), names)
  names["folder"].cleanup()
  names["plt"].close("all")
  assert np.abs(names["out"] - names["masked"]).max() < 1e-5
  assert names["run"].step == 2
  assert names["videos"].shape == (3, 4, 128, 128, 3)
  assert len(set(names["density"])) > 1  # the masks depend on the noise level


def test_its_outputs_are_of_its_cells():
  """Committed outputs are of one whole execution, in order, and small."""
  cells = json.loads(NOTEBOOK.read_text())["cells"]
  counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
  assert counts == list(range(1, len(counts) + 1))
  assert NOTEBOOK.stat().st_size < MOST_BYTES
  assert str(freqformer.CHECKOUT) not in NOTEBOOK.read_text()
