"""Computes what the best linear denoiser loses with a window, a low level, or octaves as keys.

  python -m freqformer.theory --grid=16,32,32 --slope=3.8
  python -m freqformer.theory --grid=64,128,128 --sets=window7,window5+cells4w5+cells16,octaves6r2
  python -m freqformer.theory --data=CACHE/FOLDER --times=0.3,0.6,0.9 --out=runs/theory

Latents are Gaussian, stationary and periodic, with a power law or the measured spectrum of a latent
cache (whose tokens are then latent cells). Nothing is trained. docs/evidence.md says what follows.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from freqformer.analysis.contexts import QUERIES, default_sets, parse, queries
from freqformer.analysis.gaussian import excess, measured_spectrum
from freqformer.config import ConfigError, refusing, require
from freqformer.data.cache import LatentCache
from freqformer.grid.layout import Triple
from freqformer.grid.spectrum import level_mass, power_law, suggested_levels
from freqformer.simulation import plots
from freqformer.simulation.arguments import parse_grid

TIMES = (0.15, 0.3, 0.5, 0.7, 0.85, 0.95)
GRID = (16, 32, 32)
SLOPE = 3.8
# choice: clips of a cache whose spectra are averaged at most.
MOST_CLIPS = 256


@dataclasses.dataclass(frozen=True)
class Question:
  """Sets of keys to compare on a grid.

  Attributes:
    grid: tokens per axis (t, y, x).
    sets: see `contexts.parse`; empty: `contexts.default_sets`.
    times: t of the noisy latents, in (0, 1).
    queries: places of a query that errors are averaged over, at most.
  """

  grid: Triple
  sets: tuple[str, ...] = ()
  times: tuple[float, ...] = TIMES
  queries: int = QUERIES

  def __post_init__(self):
    require(self, "times", above=0, below=1)
    require(self, "queries", least=1)
    if not self.sets:
      object.__setattr__(self, "sets", default_sets(self.grid))
    for name in self.sets:
      parse(name, self.grid)


def answer(question: Question, spectrum: np.ndarray) -> dict:
  """Returns keys and excess of every set, and the Wiener kernel's mass per level.

  Returns:
    `grid`, `tokens`, `times`; `sets`: per name `keys`, `queries` and `excess` in percent per t;
    `mass`: per t the share of each level of `suggested_levels`. Numbers have six digits.
  """
  grid = question.grid
  sets = {}
  for name in question.sets:
    context = parse(name, grid)
    found = excess(spectrum, context, question.times, queries(context, grid, question.queries))
    sets[name] = {
      "keys": _digits(found.keys),
      "queries": found.queries,
      # Rounding of the solver: the excess of a set that has all tokens may be -1e-13.
      "excess": [max(0.0, _digits(p)) for p in found.percent],
    }
  mass = level_mass(spectrum, suggested_levels(grid), question.times)
  return {
    "grid": list(grid),
    "tokens": math.prod(grid),
    "times": list(question.times),
    "sets": sets,
    "mass": [[_digits(share) for share in shares] for shares in mass],
  }


def _digits(x: float) -> float:
  return float(f"{x:.6g}")


def table(found: dict) -> str:
  """Returns an answer for people: a line per set, then a line per level."""
  times = [f"t={t:g}" for t in found["times"]]
  lines = [["keys seen", "keys", *times]]
  for name, of_set in found["sets"].items():
    lines.append([name, f"{of_set['keys']:,.0f}", *(f"{p:,.2f}" for p in of_set["excess"])])
  masses = [["level", "cell", *times]]
  for level, shares in enumerate(zip(*found["mass"], strict=True)):
    masses.append([str(level), str(2**level), *(f"{s:.3f}" for s in shares)])
  grid = "x".join(map(str, found["grid"]))
  return "\n".join(
    [
      f"{grid} = {found['tokens']:,} tokens, spectrum: {found['spectrum']}",
      "",
      "excess error of v over full context, % (best linear denoiser, nothing trained)",
      *_aligned(lines),
      "",
      "share of each level in the Wiener kernel's absolute mass",
      *_aligned(masses),
    ]
  )


def _aligned(lines: list[list[str]]) -> list[str]:
  """Returns lines of cells as text: the first column to the left, the others to the right."""
  first, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return [
    "  ".join([head.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))])
    for head, *cells in lines
  ]


def figure(found: dict) -> Figure:
  """Draws excess and mass over t."""
  drawn = Figure(figsize=(11, 3.8), layout="constrained")
  errors, masses = drawn.subplots(1, 2)
  for name, of_set in found["sets"].items():
    # On a logarithmic axis; less than this is no difference that training could show.
    shown = np.maximum(of_set["excess"], 0.01)
    label = f"{name}: {of_set['keys']:,.0f} keys"
    errors.plot(found["times"], shown, marker="o", mfc="none", ms=4, lw=1.2, label=label)
  errors.set(yscale="log", xlabel="t (1 is noise)", ylabel="excess error of v over all tokens, %")
  for level, shares in enumerate(zip(*found["mass"], strict=True)):
    label = f"cells of {2**level}"
    masses.plot(found["times"], shares, marker="o", mfc="none", ms=4, lw=1.2, label=label)
  masses.set(xlabel="t (1 is noise)", ylabel="share of the Wiener kernel's mass", ylim=(0, 1))
  for axis in (errors, masses):
    axis.legend(frameon=False, fontsize=7)
  grid = "x".join(map(str, found["grid"]))
  drawn.suptitle(f"{grid} tokens, {found['spectrum']}: theory, nothing measured", fontsize=10)
  return drawn


# ---- the command ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> dict:
  """Prints an answer, and writes it where --out says; returns it."""
  path = os.path.expanduser
  parser = argparse.ArgumentParser(
    prog="python -m freqformer.theory", description=__doc__.split("\n")[0], allow_abbrev=False
  )
  parser.add_argument("--grid", help=f"tokens t,y,x; default {','.join(map(str, GRID))}")
  parser.add_argument("--slope", type=float, help=f"of the power law; default {SLOPE}")
  parser.add_argument(
    "--data", type=path, help="folder of a latent cache: its grid and measured spectrum"
  )
  parser.add_argument(
    "--sets", help="window5,cells16,cells4w5,octaves,octaves5r2,coarse,a+b", default=""
  )
  parser.add_argument("--times", help="t between 0 and 1", default=",".join(map(str, TIMES)))
  parser.add_argument("--queries", type=int, help="places of a query, at most", default=QUERIES)
  parser.add_argument("--out", type=path, help="folder for theory.json and theory.png")
  args = parser.parse_args(argv)
  grid, spectrum, source = _spectrum(args)
  with refusing("--times"):
    times = tuple(float(t) for t in args.times.split(","))
  with refusing("python -m freqformer.theory"):
    sets = tuple(name.strip() for name in args.sets.split(",") if name.strip())
    question = Question(grid, sets, times, args.queries)
    found = {"spectrum": source, **answer(question, spectrum)}
  print(table(found))
  if args.out:
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "theory.json").write_text(json.dumps(found, indent=1) + "\n")
    plots.save(figure(found), out / "theory.png")
  return found


def _spectrum(args) -> tuple[Triple, np.ndarray, str]:
  """Returns grid, spectrum and a name of it, measured where --data says so.

  Raises:
    ConfigError: if --data comes with --grid or --slope, or has no spectrum.
  """
  if args.data is None:
    grid = parse_grid(args.grid) if args.grid else GRID
    slope = SLOPE if args.slope is None else args.slope
    with refusing("--slope"):
      return grid, power_law(grid, slope), f"slope {slope:g}"
  if args.grid or args.slope is not None:
    raise ConfigError("--data has a grid and a spectrum of its own: leave out --grid and --slope.")
  cache = LatentCache(pathlib.Path(args.data))
  clips = min(len(cache), MOST_CLIPS)
  with refusing("--data"):
    # Spread over the cache, whose order is by class.
    places = (i * len(cache) // clips for i in range(clips))
    spectrum = measured_spectrum(cache[i]["latent"] for i in places)
  source = f"mean of {clips} clips and {cache.latent_shape[-1]} channels of {cache.path.name}"
  return cache.latent_shape[:3], spectrum, source


if __name__ == "__main__":
  from freqformer.command import cli

  cli.run_plain(main)
