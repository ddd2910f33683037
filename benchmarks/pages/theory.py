"""Rows, tables and figure of docs/evidence.md's section on theory; its prose is written by hand.

  python -m benchmarks.pages.theory
  python -m benchmarks.pages.theory --data="a name=data/cache/FOLDER"     a cache's spectrum as well

Rows go to results/theory.json, one per grid and slope, and those of caches to theory_data.json.
They are computed, nothing is trained; it takes half a minute.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

from benchmarks import rows as row_files
from benchmarks.pages.complexity import fill, markdown
from freqformer.analysis import theory
from freqformer.config import ConfigError
from freqformer.grid.spectrum import power_law
from freqformer.simulation import plots

ROOT = pathlib.Path(__file__).parents[2]
DOC = ROOT / "docs" / "evidence.md"
FIGURE = ROOT / "docs" / "figures" / "theory.png"
ROWS = row_files.RESULTS / "theory.json"
DATA_ROWS = row_files.RESULTS / "theory_data.json"
COMMAND = "python -m benchmarks.pages.theory"
GRIDS = ((8, 12, 12), (8, 16, 16), (16, 32, 32), (64, 128, 128))
SLOPES = (2.5, 3.8)
SHOWN = "64x128x128, slope 3.8"  # in full, and in the figure


def row(grid: tuple[int, int, int], slope: float) -> dict:
  """Returns the answer of `freqformer.theory` for one grid and slope, as a row."""
  found = theory.answer(theory.Question(grid), power_law(grid, slope))
  name = f"{'x'.join(map(str, grid))}, slope {slope:g}"
  return {"name": name, "measured": False, "slope": slope, "spectrum": f"slope {slope:g}", **found}


def row_of_data(given: str) -> dict:
  """Returns the answer for a latent cache, given as "name=folder", as a row; or ConfigError."""
  name, _, folder = given.partition("=")
  if not folder:
    raise ConfigError(f"--data={given!r} must read NAME=FOLDER of a latent cache.")
  return {"name": name, "measured": False, **theory.main([f"--data={folder}"])}


def tables(rows: Sequence[dict], of_data: Sequence[dict] = ()) -> dict[str, str]:
  """Returns the page's tables by marker, of rows of power laws and of caches."""
  shown = next(r for r in rows if r["name"] == SHOWN)
  head = (f"{SHOWN}: keys seen", "keys", *(f"t = {t:g}" for t in shown["times"]))
  lines = [
    (name, f"{of_set['keys']:.0f}", *map(_percent, of_set["excess"]))
    for name, of_set in shown["sets"].items()
  ]
  worst = []
  for r in rows:
    everywhere = [s for name, s in r["sets"].items() if name != "coarse"]
    cells = [f"{_percent(max(s['excess']))} ({s['keys']:.0f})" for s in everywhere]
    worst.append((r["name"], *cells))
  columns = ["window + low level" if "+" in name else name for name in shown["sets"]]
  columns.remove("coarse")
  price = ("without the finest level, %", *head[2:])
  return {
    "theory without the finest": markdown(
      price, [(r["name"], *_price(r)) for r in (*rows, *of_data)]
    ),
    "theory over t": markdown(head, lines),
    "theory over grids": markdown(("worst over t (keys)", *columns), worst),
  }


def _price(row: dict) -> list[str]:
  """Returns the error of a pyramid's coarse levels over that of all its levels, in percent."""
  both = (row["sets"][name]["excess"] for name in ("coarse", "octaves"))
  ratios = [(100 + without) / (100 + whole) for without, whole in zip(*both, strict=True)]
  return [f"{100 * (ratio - 1):.2f}" for ratio in ratios]


def _percent(x: float) -> str:
  """Returns two digits; nothing finer than a tenth of a percent."""
  return f"{x:,.1f}" if x < 10 else f"{x:,.0f}"


def main(argv: Sequence[str] | None = None) -> None:
  """Computes the rows and remakes the page's tables and figure."""
  parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
  parser.add_argument("--data", action="append", default=[], help="NAME=FOLDER of a latent cache")
  args = parser.parse_args(argv)
  if args.data:
    row_files.write_rows("theory_data", map(row_of_data, args.data), f"{COMMAND} --data=...")
  row_files.write_rows("theory", [row(grid, s) for grid in GRIDS for s in SLOPES], COMMAND)
  rows = json.loads(ROWS.read_text())
  DOC.write_text(fill(DOC.read_text(), tables(rows, row_files.read_rows(DATA_ROWS))))
  plots.save(theory.figure(next(r for r in rows if r["name"] == SHOWN)), FIGURE)


if __name__ == "__main__":
  main()
